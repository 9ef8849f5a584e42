"""Relearning: plain fine-tuning, one run for all counts; its curve, its area, its known answers."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from erase.attacks.relearning import changed_to, relearn
from erase.eval.case import Case
from erase.eval.detectors import Detector
from erase.eval.evaluators import relearning
from erase.eval.evaluators.relearning import Config, Curve, evaluate
from erase.eval.images import ImageRow, ImageSet
from erase.eval.metrics.intervals import of_rate
from erase.latents.latent_set import Given, LatentSet
from erase.models import wrap
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.task import Task
from erase.training.batches import row_batches
from erase.training.config import TrainConfig, TunedConfig

CONCEPT = ConceptSpec("heart", "star", retain=("a moon", "a sun"))
TUNED = TunedConfig(train=TrainConfig(lr=1e-3, batch_size=2))
SMALL = Config(
    images=[1, 2], steps=[1, 3], kinds=["full", "lora"], lr=[1e-3], batch_size=2, prompts=2
)


@pytest.fixture
def model(make_pico_pipeline):
    return wrap(make_pico_pipeline())


@pytest.fixture
def latents():
    values = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return LatentSet(values, None, ("a heart", "a red heart") * 2)


def weights(model):
    return {name: param.detach().clone() for name, param in model.parameters().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---- the attack ----------------------------------------------------------------------------------


def test_it_is_adam_on_the_denoising_error(model, latents):
    ((_, found),) = relearn(model, [CONCEPT], latents, TUNED, [2])

    task = Task(model, [CONCEPT], Given(latents, latents))
    batches, params = row_batches(task, latents, 2), model.parameters("unet")
    own = {name: torch.nn.Parameter(param.detach().clone()) for name, param in params.items()}
    adam = torch.optim.Adam(own.values(), lr=1e-3)
    for step in range(2):
        rows, prompts = batches(step)
        with changed_to(model, {name: value.detach() for name, value in own.items()}):
            cond = model.encode(prompts)
            for param in params.values():
                param.requires_grad_(True)
            loss = (model.predict(rows.noisy, rows.t, cond) - rows.target).square().mean()
            gradients = torch.autograd.grad(loss, list(params.values()))
        for value, gradient in zip(own.values(), gradients, strict=True):
            value.grad = gradient
        adam.step()
    moved = [float((found[name] - own[name]).abs().max()) for name in own]
    # Adam's early steps are the rate times a sign, so a rounded gradient near 0 may turn one over
    assert sorted(moved)[len(moved) // 2] < 1e-5


@pytest.mark.parametrize("rank", [0, 2])
def test_one_run_read_at_several_counts_is_as_many_runs(model, latents, tmp_path, rank):
    before, config = weights(model), replace(TUNED, lora_rank=rank)
    anew = dict(relearn(model, [CONCEPT], latents, config, [3, 1]))
    kept = dict(relearn(model, [CONCEPT], latents, config, [1, 3], folder=tmp_path))
    assert list(anew) == [1, 3]
    assert all(same(anew[count], kept[count]) for count in anew) and not same(anew[1], anew[3])
    assert same(weights(model), before)


def test_a_run_goes_on_where_it_stopped_and_not_backwards(model, latents, tmp_path, monkeypatch):
    runs = relearn(model, [CONCEPT], latents, TUNED, [1, 3], folder=tmp_path)
    next(runs)
    runs.close()
    steps, predict = [], Task.predict
    monkeypatch.setattr(Task, "predict", lambda *given: (steps.append(1), predict(*given))[1])
    ((_, resumed),) = relearn(model, [CONCEPT], latents, TUNED, [3], folder=tmp_path)
    assert len(steps) == 2
    monkeypatch.undo()
    ((_, whole),) = relearn(model, [CONCEPT], latents, TUNED, [3])
    assert same(resumed, whole)
    with pytest.raises(ErasureError, match="is of step 3, beyond the 2 that are asked for"):
        list(relearn(model, [CONCEPT], latents, TUNED, [2], folder=tmp_path))


def test_a_falling_rate_is_refused(model, latents):
    falling = TunedConfig(train=TrainConfig(schedule="linear"))
    with pytest.raises(ErasureError, match="schedule linear depends on the last; use constant"):
        list(relearn(model, [CONCEPT], latents, falling, [1]))


# ---- the curve -----------------------------------------------------------------------------------


def test_the_area_is_the_mean_over_the_steps():
    curve = Curve("full", 16, 1e-4, [0, 10, 50], [20, 10, 0], 20)
    area = curve.area()
    # 10 steps at 75 % on average, 40 at 25 %
    assert area.value == pytest.approx((10 * 75 + 40 * 25) / 50) and area.n == 20
    lows = [100 * of_rate(left, 20)[0] for left in (20, 10, 0)]
    assert area.low == pytest.approx(
        (10 * (lows[0] + lows[1]) / 2 + 40 * (lows[1] + lows[2]) / 2) / 50
    )
    names = [score.name for score in curve.scores("")]
    assert names == [
        "UA after 10 steps (full, 16 images)",
        "UA after 50 steps (full, 16 images)",
        "relearning area (full, 16 images)",
    ]
    flat = Curve("lora", 1, 1e-4, [0, 7, 9], [20, 20, 20], 20).area()
    assert flat.value == flat.high == 100 and flat.low < 100


# ---- the evaluator -------------------------------------------------------------------------------


@pytest.fixture
def case(model, tmp_path, monkeypatch):
    """A heart is seen where the top left pixel is above its median: arbitrary, but a function of
    the image."""

    def sees(images):
        return (images[:, 0, 0, 0] > 0.5).tolist()

    monkeypatch.setattr(relearning, "detector", lambda case, judge: Detector("a pixel", sees))
    return make_case(model, tmp_path / "work" / "base")


def make_case(model, folder):
    rows = [ImageRow("", i, "a heart", i, 3.0, {}, "") for i in range(3)]
    images = ImageSet(Path("nowhere"), rows, {"steps": 2, "batch_size": 2})
    return Case(images, [CONCEPT], base=model, folder=folder)


def test_it_scores_the_most_images_and_an_area_for_each_count(case, model):
    before = weights(model)
    scores = {score.name: score for score in evaluate(case, SMALL)}
    assert list(scores) == [
        "UA before relearning",
        "UA after 1 steps (full, 2 images)",
        "UA after 3 steps (full, 2 images)",
        "relearning area (full, 2 images)",
        "relearning area (full, 1 image)",
        "UA after 1 steps (lora, 2 images)",
        "UA after 3 steps (lora, 2 images)",
        "relearning area (lora, 2 images)",
        "relearning area (lora, 1 image)",
    ]
    assert all(score.n == 2 and score.evaluator == "a pixel" for score in scores.values())
    curves = case.extras["relearning"]
    assert [(curve["kind"], curve["images"]) for curve in curves] == [
        ("full", 2), ("full", 1), ("lora", 2), ("lora", 1)
    ]  # fmt: skip
    assert same(weights(model), before)


def test_another_seed_is_another_attacker(case, model, monkeypatch):
    """Other images, and weights that training leads elsewhere; the same seed, the same again."""
    found, plain = [], relearning.relearn

    def watched(model, concepts, latents, *given, **named):
        for count, values in plain(model, concepts, latents, *given, **named):
            found.append([latents.latents, *values.values()])
            yield count, values

    monkeypatch.setattr(relearning, "relearn", watched)
    config = replace(SMALL, kinds=["full"], images=[2], steps=[1])
    for seed in (0, 1, 1):
        evaluate(make_case(model, None), replace(config, seed=seed))
    one, other, again = found
    assert not any(torch.equal(*pair) for pair in zip(one, other, strict=True))
    assert all(torch.equal(*pair) for pair in zip(other, again, strict=True))


def test_of_several_rates_the_best_for_the_attacker_counts(case, model, tmp_path, monkeypatch):
    """Only training at the rate 0.5 brings it back: its weights are far away."""
    far = weights(model)
    key = next(name for name in far if "conv_out.weight" in name)

    def shown(self, current, **_):
        moved = float((current.parameters()[key] - far[key]).abs().max())
        return [moved > 0.1] * 2

    monkeypatch.setattr(relearning.Attempts, "shown", shown)
    config = replace(SMALL, kinds=["full"], lr=[1e-6, 0.5, 1e-5])
    scores = {score.name: score.value for score in evaluate(case, config)}
    assert scores["UA before relearning"] == 100 and scores["relearning area (full, 1 image)"] < 50
    assert {curve["lr"] for curve in case.extras["relearning"]} == {0.5}


def test_a_stopped_evaluation_goes_on_and_ends_the_same(case, model, tmp_path, monkeypatch, capfd):
    whole = evaluate(case, SMALL)
    again = make_case(model, tmp_path / "work" / "base")
    shown, asked = relearning.Attempts.shown, []
    monkeypatch.setattr(
        relearning.Attempts, "shown", lambda *a, **k: (asked.append(1), shown(*a, **k))[1]
    )
    assert evaluate(again, SMALL) == whole and not asked, "all was kept"

    for folder in tmp_path.rglob("relearning-*"):
        shutil.rmtree(folder)

    def stop(*given, **named):
        asked.append(1)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return shown(*given, **named)

    monkeypatch.setattr(relearning.Attempts, "shown", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(make_case(model, tmp_path / "work" / "base"), SMALL)
    assert evaluate(make_case(model, tmp_path / "work" / "base"), SMALL) == whole
    assert not list(tmp_path.rglob("*.pt"))
    assert "relearning: " in (bars := capfd.readouterr().err) and "erasing" not in bars


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"images": []}, "relearning.images is"),
        ({"steps": [5, 5]}, "each once"),
        ({"kinds": ["ful"]}, "did you mean 'full'"),
        ({"steps": [0]}, "relearning.steps holds 0"),
        ({"lr": [0.0]}, "relearning.lr holds 0.0"),
    ],
)
def test_an_impossible_budget_is_refused(wrong, said):
    with pytest.raises(ErasureError, match=said):
        Config(**wrong)


def test_check_refuses_images_alone_and_benign_without_retained_prompts(case):
    with pytest.raises(ErasureError, match="needs the model"):
        relearning.check(Case(case.images, [CONCEPT]), SMALL)
    case.concepts[0] = ConceptSpec("heart", "star")
    relearning.check(case, SMALL)
    with pytest.raises(ErasureError, match="leave benign out"):
        relearning.check(case, replace(SMALL, kinds=["benign"]))
