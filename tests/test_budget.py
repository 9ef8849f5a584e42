"""Budgets: what evaluators say that they ask of the model is what they ask; the time of it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from erase.attacks import GRADIENT, Asked
from erase.attacks.baselines import RandomTokensConfig, SeedSearchConfig
from erase.attacks.p4d import P4DConfig
from erase.attacks.pseudo_token import PseudoTokenConfig
from erase.attacks.ring_a_bell import RingABellConfig
from erase.attacks.transferred import TransferredConfig
from erase.attacks.unlearndiffatk import UnlearnDiffAtkConfig
from erase.eval.budget import Budget, Speed, predictions, speed
from erase.eval.case import Case
from erase.eval.detectors import Detector
from erase.eval.evaluators import attack, probes, relearning
from erase.eval.generate import GenerateConfig, generate, planned
from erase.models import wrap
from erase.prompts.canvas import canvas_concept
from erase.prompts.prompt_sets import canvas_grid
from tests.test_evaluate import delta_of
from tests.test_round_trips import FAMILIES

HEART = canvas_concept("heart")
GENERATE = GenerateConfig(steps=4, batch_size=4)
PROMPTS = replace(canvas_grid((188,), {"object": "heart"}), name="six")
PROMPTS = replace(PROMPTS, rows=PROMPTS.rows[:6])
BUDGETS = {
    "pseudo_token": PseudoTokenConfig(steps=3, batch_size=2),
    "unlearndiffatk": UnlearnDiffAtkConfig(words=2, steps=2, batch_size=2, per_prompt=True),
    "p4d": P4DConfig(words=2, steps=2, draws=3),
    "transferred": TransferredConfig(steps=3, batch_size=2),
    "random_tokens": RandomTokensConfig(words=2, tries=3),
    "seed_search": SeedSearchConfig(tries=2),
    "ring_a_bell": RingABellConfig(words=2, population=5, generations=2, pairs=3),
}


@pytest.fixture(scope="module")
def model(make_pico_pipeline):
    return wrap(make_pico_pipeline())


@pytest.fixture(scope="module")
def images(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return generate(model.pipeline(), PROMPTS, folder, GENERATE, {})


@contextmanager
def counted(model):
    """Rows that pass the denoiser meanwhile: {"rows": n}."""
    count = {"rows": 0}

    def look(module, args, kwargs, output):
        gradient = torch.is_grad_enabled() and output[0].requires_grad
        count["rows"] += len(output[0]) * (GRADIENT if gradient else 1)

    unet = model.pipeline().unet
    handle = unet.register_forward_hook(look, with_kwargs=True)
    try:
        yield count
    finally:
        handle.remove()


@pytest.fixture
def blind(monkeypatch):
    """A judge that never sees the concept, so that no attack stops early."""
    judge = Detector("blind", lambda images: [False] * len(images))
    for module in (attack, probes, relearning):
        monkeypatch.setattr(module, "detector", lambda case, name: judge)


QUESTIONS = {
    **{
        name: (
            attack.ATTACK,
            attack.Config([name], images=4, references=3, rates=[1e-2, 2e-2], **{name: budget}),
        )
        for name, budget in BUDGETS.items()
    },
    "probes": (
        probes.PROBES,
        probes.Config(images=3, etas=[1.0, 1.4], levels=[0.5], iterations=3, prompt="nameless"),
    ),
    "relearning": (
        relearning.RELEARNING,
        relearning.Config([1, 2], [1, 2], ["full", "benign"], batch_size=2, prompts=2),
    ),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_what_an_evaluator_says_that_it_asks_is_what_passes_the_denoiser(
    model, images, blind, tmp_path, name
):
    evaluator, config = QUESTIONS[name]
    foreseen = planned(PROMPTS, tmp_path / "x", GENERATE)
    told = evaluator.budget(Case(foreseen, [HEART], base=model), config)
    assert told is not None

    delta = delta_of(model)
    erased = {"base_images": images, "delta": delta, "folder": tmp_path / "erased"}
    with counted(model) as count:
        for own in ({"folder": tmp_path / "base"}, erased):
            case = Case(images, [HEART], base=model, shared=tmp_path / "shared", **own)
            evaluator.evaluate(case, config)
    drawn = told.images * GENERATE.steps * predictions(GENERATE.guidance)
    assert count["rows"] == pytest.approx(drawn + told.asked.predictions)
    assert count["rows"] > 0


def test_noise_that_a_flow_does_not_have_is_not_foreseen(model, tmp_path):
    foreseen, config = planned(PROMPTS, tmp_path / "x", GENERATE), probes.Config(images=3)
    rest = replace(config, probes=[name for name in config.probes if name != "noise"])
    flow = wrap(FAMILIES["sd3"]())
    of_flow = probes.PROBES.budget(Case(foreseen, [HEART], base=flow), config)
    assert of_flow == probes.PROBES.budget(Case(foreseen, [HEART], base=model), rest)
    assert of_flow != probes.PROBES.budget(Case(foreseen, [HEART], base=model), config)


def test_seconds_of_a_budget_by_hand():
    pace = Speed(image=2.0, prediction=0.5, text=0.1)
    budget = Budget(6, Asked(10, 20)) + Budget(2, Asked(4))
    assert pace.of(budget) == pytest.approx(8 * 2 + 14 * 0.5 + 20 * 0.1)
    assert pace.of(budget, processes=2) == pytest.approx(8 + 14 * 0.5 + 20 * 0.1)


def test_the_speed_is_a_steps_time_by_the_steps_and_the_decoding(model):
    # texts, first step, two steps, decoding
    ticks = iter([0.0, 3.0, 10.0, 50.0, 100.0, 104.0, 200.0, 201.0])
    made = GenerateConfig(steps=10, batch_size=3)
    found = speed(model, PROMPTS, made, lambda: next(ticks))
    assert found.image == pytest.approx((20 + 1) / 3)
    assert found.prediction == pytest.approx(2 / 3 / 2), "each row with and without its prompt"
    assert found.text == pytest.approx(1.0)
