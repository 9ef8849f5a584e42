"""Twofold: two trainings that know nothing of each other, and the changes of both."""

import pytest
import torch

from erase.mask import SaliencyMask
from erase.methods import get_method
from erase.models import wrap
from erase.models.scopes import select
from erase.prompts.errors import ErasureError
from erase.run import EraseConfig, erase_concept
from erase.task import Task
from erase.training.config import MaskConfig
from erase.training.state import Run
from tests.conftest import build_pico_pipeline
from tests.families import tiny_sd3
from tests.flow_families import tiny_klein
from tests.test_methods import CONCEPT, DATA, quick


def edit(name, folder=None, model=None, **change):
    task = Task(model or wrap(build_pico_pipeline()), [CONCEPT], DATA, 0, folder)
    return get_method(name).edit(task, quick(name, **change))


def test_it_is_off_but_in_its_preset():
    on = [name for name in ("salun", "esd", "salun-twofold") if quick(name).twofold]
    assert on == ["salun-twofold"]


@pytest.mark.parametrize("name", ["salun", "salun-soft", "doco", "esd"])
def test_each_half_is_what_it_is_where_it_trains_alone(name, tmp_path):
    base = wrap(build_pico_pipeline()).parameters()
    mask = MaskConfig(rule="random", density=0.3) if name != "salun-soft" else MaskConfig(density=1)
    both = edit(name, scope="full", mask=mask, twofold=True)
    if both.mask is None:
        metadata = {"base_fingerprint": wrap(build_pico_pipeline()).fingerprint}
        given = SaliencyMask.whole(both.values, metadata)
    else:
        given = both.mask
    text = set(select(base, "xattn"))
    losses = []
    for names in (text, set(both.values) - text):
        given.within(names).save(tmp_path / "half.safetensors")
        only = MaskConfig(file=str(tmp_path / "half.safetensors"))
        alone = edit(name, scope="full", mask=only)
        assert names and all(torch.equal(both.values[n], alone.values[n]) for n in names)
        assert any(not torch.equal(both.values[n], base[n]) for n in names)
        losses += alone.losses
    assert list(both.losses) == losses


@pytest.mark.parametrize("step", [2, 5])
def test_a_run_that_is_stopped_in_either_half_goes_on_to_the_same_bits(step, tmp_path, monkeypatch):
    config = {"twofold": True, "scope": "full"}
    whole = edit("salun", **config)
    advance, taken = Run.advance, []

    def stop(self, *args):
        advance(self, *args)
        taken.append(1)
        if len(taken) == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "advance", stop)
    with pytest.raises(KeyboardInterrupt):
        edit("salun", tmp_path, **config)
    again = edit("salun", tmp_path, **config)
    assert len(taken) < 2 * quick("salun").train.steps + step
    assert all(torch.equal(again.values[name], value) for name, value in whole.values.items())


@pytest.mark.parametrize("scope, where", [("xattn", "outside"), ("selfattn", "in it")])
def test_a_scope_that_has_nothing_on_one_side_is_refused_before_latents_are_made(
    scope, where, monkeypatch
):
    monkeypatch.setattr(
        "erase.latents.prepare.sample_points", lambda *_, **__: pytest.fail("latents were sampled")
    )
    config, model = EraseConfig(method="esd", latents=DATA), wrap(build_pico_pipeline())
    with pytest.raises(ErasureError, match=f": {where} there is nothing"):
        erase_concept(CONCEPT, config, quick("esd", scope=scope, twofold=True), model=model)


def test_a_mask_that_has_nothing_on_one_side_is_refused(tmp_path):
    model = wrap(build_pico_pipeline())
    params = model.parameters()
    text = select(params, "xattn")
    whole = SaliencyMask.whole(params, {"base_fingerprint": model.fingerprint})
    whole.within(text).save(tmp_path / "half.safetensors")
    mask = MaskConfig(file=str(tmp_path / "half.safetensors"))
    with pytest.raises(ErasureError, match=": outside there is nothing"):
        edit("esd", scope="full", mask=mask, twofold=True)


def test_with_lora_a_side_that_has_vectors_alone_is_refused(tmp_path):
    model = wrap(build_pico_pipeline())
    params = model.parameters()
    vectors = {name for name, value in params.items() if value.dim() == 1}
    whole = SaliencyMask.whole(params, {"base_fingerprint": model.fingerprint})
    whole.within(vectors | set(select(params, "xattn"))).save(tmp_path / "half.safetensors")
    mask = MaskConfig(file=str(tmp_path / "half.safetensors"))
    with pytest.raises(ErasureError, match="lora_rank matrices alone: outside there is nothing"):
        edit("esd", scope="full", mask=mask, twofold=True, lora_rank=2)


@pytest.mark.parametrize("family", ["sd3", "klein"])
def test_it_trains_a_flow_transformer_too(family):
    model = wrap({"sd3": tiny_sd3, "klein": tiny_klein}[family]())
    before = {name: value.detach().clone() for name, value in model.parameters().items()}
    both = edit("salun-twofold", model=model)
    changed = [name for name, value in both.values.items() if not torch.equal(value, before[name])]
    text = select(before, "xattn")
    assert {name in text for name in changed} == {True, False}
