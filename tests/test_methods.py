"""The contract of every method, on a random pico pipeline; and that a new one needs a config, a
function and an index line."""

import inspect
import os
import subprocess
import sys
from dataclasses import is_dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch

import erase.training.loop
from erase.latents import prepare
from erase.latents.config import LatentConfig
from erase.methods import METHODS, get_method
from erase.models import wrap
from erase.models.scopes import select
from erase.models.waiting import Waiting
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.run import EraseConfig, erase_concept
from erase.task import Task
from erase.training.config import MaskConfig, TrainConfig, TunedConfig
from tests.conftest import build_pico_pipeline

DATA = LatentConfig(n_forget=6, n_retain=6, steps=2)
CONCEPT = ConceptSpec(
    "heart", "mushroom", synonyms=("valentine",), retain=("a moon", "a photo of a house")
)
UNNAMED = replace(CONCEPT, templates=("a photo of a {}", "a red {}"))
"""no template is the bare name"""
QUICK = TrainConfig(steps=3, batch_size=2, lr=1e-3, checkpoint_every=1)
ROOT = Path(__file__).parents[1]
LINES = 100  # of a method's file


def quick(name, **change):
    """The method's settings, with few and small steps where it takes any."""
    config = get_method(name).config
    if hasattr(config, "attack_from"):  # before the end of a training that is shorter now
        config = replace(config, attack_from=1, attack_steps=2)
    if isinstance(config, TunedConfig):
        mask = replace(config.mask, batch_size=2, batches=2)
        config = replace(config, train=QUICK, mask=mask)
    if hasattr(config, "samples"):
        config = replace(config, samples=4)
    if hasattr(config, "search_steps"):
        attack = replace(config.attack, steps=2, batch_size=2)
        config = replace(config, rounds=1, search_steps=2, search_lr=1e-3, attack=attack)
    if hasattr(config, "cut_batches"):
        config = replace(config, cut_batches=2)
    if hasattr(config, "critic_steps"):
        config = replace(config, critic_steps=2)
    return replace(config, **change)


@pytest.fixture
def model(make_pico_pipeline):
    return wrap(make_pico_pipeline())


@pytest.fixture(scope="module")
def latents_made():
    return {}


@pytest.fixture
def sampled_once(latents_made, monkeypatch):
    """The base of all tests is one, and so are its latents, where they are not at issue."""
    sample_points = prepare.sample_points

    def once(model, *args, **named):
        asked = repr((args, named))
        if asked not in latents_made:
            latents_made[asked] = sample_points(model, *args, **named)
        return latents_made[asked]

    monkeypatch.setattr(prepare, "sample_points", once)


def edit(model, name, config=None, seed=0, folder=None):
    task = Task(model, [CONCEPT], DATA, seed, folder)
    return get_method(name).edit(task, config or quick(name))


@cache
def plain(name):
    """The method's edit of the `model` of each test, made once; that it always has these bits is
    one of the tests."""
    return edit(wrap(build_pico_pipeline()), name)


def snapshot(model):
    return {name: param.detach().clone() for name, param in model.parameters().items()}


@pytest.mark.parametrize("name", METHODS)
class TestEveryMethod:
    def test_leaves_the_model_as_it_was_found_and_gives_the_same_bits_again(self, model, name):
        before, once = snapshot(model), plain(name).values
        found = edit(model, name)
        assert all(torch.equal(once[n], value) for n, value in found.values.items())
        assert all(
            torch.equal(p, before[n]) and not p.requires_grad for n, p in model.parameters().items()
        )
        assert any(not torch.equal(value, before[n]) for n, value in found.values.items())
        assert all(value.shape == before[n].shape for n, value in found.values.items())

    def test_changes_its_scope_alone(self, model, name):
        found = plain(name)
        scope = select(model.parameters(), quick(name).scope)
        assert set(found.values) <= set(scope)

    @pytest.mark.parametrize("by_block", [False, True], ids=["parts", "blocks"])
    def test_gives_the_same_bits_where_weights_wait(self, make_pico_pipeline, name, by_block):
        pipeline, here = make_pico_pipeline(), plain(name).values
        Waiting(pipeline, torch.device("cpu", 0), by_block)
        moved = edit(wrap(pipeline), name).values
        assert moved.keys() == here.keys()
        assert all(torch.equal(moved[n], here[n]) for n in here)

    def test_has_a_paper_settings_of_its_own_and_a_short_file(self, name):
        method = get_method(name)
        assert method.name == name and method.paper.startswith("https://")
        assert is_dataclass(method.config)
        assert len(inspect.getsource(inspect.getmodule(method.edit)).splitlines()) <= LINES

    def test_makes_a_delta_through_the_front_door(self, model, name, tmp_path):
        config = EraseConfig(method=name, latents=DATA)
        delta = erase_concept(CONCEPT, config, quick(name), model=model, out=tmp_path)
        assert delta.count and delta.metadata["method"] == name
        again = erase_concept(CONCEPT, config, quick(name), model=model, out=tmp_path)
        assert again.sha256 == delta.sha256


UNET_ONLY = {
    "mace": ("xattn_kv", "no closed form"),
    "salun-text": ("text_in", "there are none in scope"),
    "salun-twofold": ("full", "leave twofold out"),
}
"""method -> a scope of its own, and what it says of a text encoder: a closed form answers for
projections of text states alone, and of cross-attention an encoder has none"""
FORGET_ONLY = {"esd", "few-shot", "forget-me-not", "hirm", "mace", "race", "stereo"}
"""methods whose loss has no retain term by default"""
TUNED = [name for name in METHODS if isinstance(get_method(name).config, TunedConfig)]


@pytest.mark.usefixtures("sampled_once")
@pytest.mark.parametrize("name", TUNED)
class TestEveryMethodThatTakesGradientSteps:
    def test_can_be_masked(self, model, name):
        config = quick(name, mask=MaskConfig(density=0.1, batch_size=2))
        before = snapshot(model)
        found = edit(model, name, config)
        count = sum(int((value != before[n]).sum()) for n, value in found.values.items())
        total = sum(param.numel() for param in select(before, config.scope).values())
        assert found.mask.count() == int(0.1 * total) and 0 < count <= found.mask.count()

    @pytest.mark.parametrize(
        "option",
        [{"combine": "surgery"}, {"combine": "barrier"}, {"sam": 0.01}, {"lora_rank": 2}],
        ids=str,
    )
    def test_takes_every_option_and_sees_none(self, model, name, option):
        if "combine" in option and name in FORGET_ONLY:
            with pytest.raises(ErasureError, match="combine .* has no retain term"):
                edit(model, name, quick(name, **option))
            return
        config = get_method(name).config
        if "lora_rank" in option and config.prox_l1 + config.prox_text:
            with pytest.raises(ErasureError, match="choose one"):
                quick(name, **option)
            option = option | {"prox_l1": 0.0, "prox_text": 0.0}
        one, other = plain(name), edit(model, name, quick(name, **option))
        assert len(other.losses) == QUICK.steps * (2 if quick(name).twofold else 1)
        assert "combine" in option or any(
            not torch.equal(one.values[n], value) for n, value in other.values.items()
        )

    def test_encodes_before_training_all_that_it_asks_for(self, model, name, monkeypatch):
        """Within, autocast, other kernels and encoders that were moved away would give other
        states than before, and a resumed run other ones than the run."""
        task, known = Task(model, [UNNAMED], DATA), []
        take = erase.training.loop._Steps.take
        monkeypatch.setattr(
            "erase.training.loop._Steps.take",
            lambda steps: known.append(set(task._states)) or take(steps),
        )
        get_method(name).edit(task, quick(name))
        assert all(states == set(task._states) for states in known)

    def test_trains_a_text_encoder_with_all_guarantees(self, model, name, tmp_path):
        """Masked, stopped, resumed: the denoiser stays, the encoder changes inside the mask, the
        bits are the run's."""
        config = quick(name, scope="text_encoder", mask=MaskConfig(density=0.5, batch_size=2))
        if name in UNET_ONLY:
            scope, message = UNET_ONLY[name]
            with pytest.raises(ErasureError, match=message):
                edit(model, name, config)
            config = replace(config, scope=scope)
        part = "text_encoder" if name not in UNET_ONLY else "unet"
        before = snapshot(model)
        whole = edit(model, name, config)
        changed = {n for n, value in whole.values.items() if not torch.equal(value, before[n])}
        assert changed and all(n.startswith(f"{part}.") for n in whole.values)
        for n, value in whole.values.items():
            assert torch.equal(value[~whole.mask[n]], before[n][~whole.mask[n]])
        assert all(torch.equal(p, before[n]) for n, p in model.parameters().items())

        with pytest.MonkeyPatch.context() as patch:
            stop_before_step(patch, 2)
            with pytest.raises(KeyboardInterrupt):
                edit(model, name, config, folder=tmp_path)
        assert list(tmp_path.glob("training*.pt"))
        resumed = edit(model, name, config, folder=tmp_path)
        assert resumed.losses == whole.losses
        assert all(torch.equal(resumed.values[n], value) for n, value in whole.values.items())


def stop_before_step(patch, step):
    take = erase.training.loop._Steps.take

    def stopping(self):
        if self.run.step == step:
            raise KeyboardInterrupt
        return take(self)

    patch.setattr(erase.training.loop._Steps, "take", stopping)


def test_a_mask_of_another_base_is_refused(model, make_pico_pipeline, tmp_path):
    found = edit(model, "esd", quick("esd", mask=MaskConfig(density=0.5, batch_size=2)))
    replace(found.mask, metadata={"base_fingerprint": "0"}).save(tmp_path / "mask.safetensors")
    config = quick("esd", mask=MaskConfig(file=str(tmp_path / "mask.safetensors")))
    with pytest.raises(ErasureError, match="fingerprint of the base was '0'"):
        edit(model, "esd", config)


def test_a_closed_form_never_makes_a_latent(model, monkeypatch):
    monkeypatch.setattr(
        "erase.latents.prepare.sample_points", lambda *_, **__: pytest.fail("latents were sampled")
    )
    assert edit(model, "uce").values


WRONG = """
from erase.methods import Method
from erase.methods.esd import ESDConfig
from erase.methods.uce import UCEConfig, edit

Method("uce", "https://", UCEConfig(), edit)
Method("mixed", "https://", ESDConfig(), edit)
Method("short", "https://", UCEConfig(), lambda task: edit(task, UCEConfig()))
"""


@pytest.mark.slow
def test_a_wrong_edit_fails_at_lint(tmp_path):
    """The config and the function of a method belong together, by their types."""
    subprocess.run(["make", "-s", ".links"], cwd=ROOT, check=True)
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\ncheck_untyped_defs = True\nignore_missing_imports = True\n"
    )
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(tmp_path / "mypy.ini"),
        "-c",
        WRONG,
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "MYPYPATH": ".links"}
    )
    lines = {
        line.split(":")[1]
        for line in done.stdout.splitlines()
        if "error" in line and line.startswith("<string>")
    }
    assert lines == {"7", "8"}, done.stdout + done.stderr
