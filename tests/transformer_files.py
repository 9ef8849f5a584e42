"""What tests of transformers in files of their own share: comparisons, and the two ways out."""

from __future__ import annotations

import numpy as np
import torch

from erase.export import export_single_file
from erase.export.formats import usage
from erase.foreign import read_erased
from erase.models import LoadConfig, load_model, wrap
from erase.models.single_file import write_single_file
from tests.test_clients import moved


def options(folder, **more):
    return LoadConfig(config=str(folder), **more)


def state(pipeline):
    return pipeline.transformer.state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def drawn_by_its_card(base, folder, path):
    """The stock pipeline of a transformer's file, made by the code on its card."""
    code = usage("single-file", base, ["transformer"]).code
    places = {
        "path/to/this/folder/model.safetensors": str(path),
        "path/to/base": str(folder),
    }
    for said, meant in places.items():
        code = code.replace(said, meant)
    found = {}
    exec(compile(code, "card", "exec"), found)
    return found["pipeline"]


def check_drawn_by_its_card(folder, tmp_path, image):
    """An erased transformer draws in stock diffusers, loaded as its card says, what it draws
    here."""
    base = load_model(folder)
    delta = moved(base, "transformer.")
    export_single_file(delta, str(folder), tmp_path / "erased.safetensors")
    erased = image(delta.apply(base).pipeline())
    stock = drawn_by_its_card(base, folder, tmp_path / "erased.safetensors")
    assert np.array_equal(image(stock), erased)


def check_file_both_ways(it, tmp_path, image):
    """The base in one file gives the delta that its folder gives; the erased file, read again,
    draws what the erased model draws."""
    base = it.write_base(tmp_path / "base.safetensors")
    delta = it.from_one_file(base, tmp_path / "run")
    assert delta.sha256 == it.delta.sha256
    # the base is read as the delta says it was
    out = export_single_file(delta, str(base), tmp_path / "out.safetensors")
    model = load_model(out, options=options(it.base))
    assert np.array_equal(image(model.pipeline()), it.image)


def check_read_as_erased(make, tmp_path, chosen="transformer.", write=write_single_file):
    """What another program erased is read from its file; returns that."""
    base, other = wrap(make(), "base"), make()
    delta = moved(base, chosen)
    delta.apply(wrap(other, "other"))
    read = read_erased(base, [write(other, tmp_path / "erased.safetensors")])
    assert read.values.keys() == delta.values.keys() and read.count == delta.count
    assert same(state(read.apply(base).pipeline()), state(other))
    return read
