"""Names of weights: the same whether `CLIPTextModel` holds its layers itself, as transformers has
it since 5.6, or in `text_model`, as it had them before."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextModel, PreTrainedModel

from erase.delta import ErasedDelta
from erase.export.lora import extract_lora
from erase.foreign import read_erased
from erase.methods import get_method
from erase.models import wrap
from erase.models.base import fingerprint
from erase.models.half_precision import stand_ins
from erase.models.single_file import write_single_file
from erase.prompts.errors import ErasureError
from tests.bare import SGD, task_of
from tests.families import FAMILIES

LAYER = "text_encoder.encoder.layers.1.mlp.fc1.weight"


class Nested(CLIPTextModel):
    """A `CLIPTextModel` of transformers before 5.6."""

    def __init__(self, flat):
        PreTrainedModel.__init__(self, flat.config)
        self.text_model = flat

    def get_input_embeddings(self):
        return self.text_model.get_input_embeddings()

    def forward(self, *args, **keywords):
        return self.text_model(*args, **keywords)


def nested(pipeline):
    """The pipeline with its `CLIPTextModel` as before 5.6, which it may be already."""
    if not hasattr(pipeline.text_encoder, "text_model"):
        pipeline.text_encoder = Nested(pipeline.text_encoder).eval()
    return pipeline


@pytest.fixture
def models(make_pico_pipeline):
    """One checkpoint, as the newest transformers has it and as an earlier one has."""
    return wrap(make_pico_pipeline(), "pico"), wrap(nested(make_pico_pipeline()), "pico")


def moved(model, concepts="[]"):
    """A delta that moves every weight."""
    base = {name: param.detach() for name, param in model.parameters().items()}
    facts = {"base_fingerprint": model.fingerprint, "method": "salun", "config": "{}"}
    erased = {name: value + 0.1 for name, value in base.items()}
    return ErasedDelta.between(base, erased, {**facts, "concepts": concepts})


@pytest.mark.parametrize("family", FAMILIES)
def test_one_checkpoint_has_one_fingerprint_and_one_set_of_names(family):
    flat, deep = wrap(FAMILIES[family]()), FAMILIES[family]()
    deep = wrap(nested(deep) if isinstance(deep.text_encoder, CLIPTextModel) else deep)
    assert list(flat.parameters()) == list(deep.parameters())
    assert flat.fingerprint == deep.fingerprint


def test_the_names_are_those_of_the_newest_version(models):
    for model in models:
        assert LAYER in model.parameters() and LAYER in model.parameters("text_encoder")


def test_a_delta_goes_from_one_to_the_other(models):
    one, other = models
    delta, back = moved(one), moved(other)
    assert delta.sha256 == back.sha256
    assert back.apply(one).fingerprint == delta.apply(other).fingerprint


def test_what_is_written_of_one_is_read_beside_the_other(models, tmp_path):
    for base, erased in (models, models[::-1]):
        delta, path = moved(base), tmp_path / "text.safetensors"
        with delta.applied(erased):
            save_file(erased.component("text_encoder").state_dict(), path)
        found = read_erased(base, [path])
        assert found.values.keys() == {n for n in delta.values if n.startswith("text_encoder.")}


def test_a_single_file_is_read_beside_both(tmp_path):
    flat, deep = wrap(FAMILIES["sd1"]()), wrap(nested(FAMILIES["sd1"]()))
    delta, path = moved(deep), tmp_path / "erased.safetensors"
    with delta.applied(deep):
        write_single_file(deep.pipeline(), path)
    assert read_erased(flat, [path]).sha256 == read_erased(deep, [path]).sha256 == delta.sha256


def test_a_lora_of_one_is_that_of_the_other(models):
    loras = [extract_lora(moved(model), model, rank=1) for model in models]
    assert loras[0].down.keys() == loras[1].down.keys() >= {LAYER.removesuffix(".weight")}
    assert loras[0].kohya == loras[1].kohya


def test_weights_in_half_precision_stand_in_for_those_of_their_names(models):
    for model in models:
        parts = {"text_encoder": model.component("text_encoder")}
        with stand_ins(parts, torch.bfloat16, torch.device("cpu")) as own:
            assert LAYER in own and own.keys() <= model.parameters().keys()


def test_both_are_trained_alike(models):
    config = get_method("few-shot").config
    config = type(config)(train=SGD)
    one, other = (
        get_method("few-shot").edit(task_of(model.pipeline()), config).values for model in models
    )
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_a_delta_with_the_former_names_says_that_it_is_of_this_base(models):
    for model in models:
        before = [
            (name.replace("text_encoder.", "text_encoder.text_model."), param)
            for name, param in model.parameters().items()
        ]
        delta = moved(model)
        delta.metadata["base_fingerprint"] = fingerprint(before)
        with pytest.raises(ErasureError, match=r"as transformers before 5\.6 does; erase again"):
            delta.apply(model)
