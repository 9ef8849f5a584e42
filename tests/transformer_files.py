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


def check_drawn_by_its_card(folder, tmp_path, image):
    """An erased transformer draws in stock diffusers, loaded as its card says, what it draws
    here."""
    base = load_model(folder)
    delta = moved(base, "transformer.")
    export_single_file(delta, str(folder), tmp_path / "erased.safetensors")
    erased = image(delta.apply(base).pipeline())
    code = usage("single-file", base, ["transformer"]).code
    places = {
        "path/to/this/folder/model.safetensors": str(tmp_path / "erased.safetensors"),
        "path/to/base": str(folder),
    }
    for said, meant in places.items():
        code = code.replace(said, meant)
    found = {}
    exec(compile(code, "card", "exec"), found)
    assert np.array_equal(image(found["pipeline"]), erased)


def check_read_as_erased(make, tmp_path):
    """What another program erased is read from its file."""
    base, other = wrap(make(), "base"), make()
    delta = moved(base, "transformer.")
    delta.apply(wrap(other, "other"))
    read = read_erased(base, [write_single_file(other, tmp_path / "erased.safetensors")])
    assert read.values.keys() == delta.values.keys() and read.count == delta.count
    assert same(state(read.apply(base).pipeline()), state(other))
