"""erase-evaluate --validate: what would run, on how many images, what is missing, how long."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from time import perf_counter

import pytest

from erase.attacks import Asked
from erase.eval.budget import Budget, Speed, speed
from erase.eval.evaluators import EVALUATORS
from erase.eval.generate import GenerateConfig, generate
from erase.eval.plan import Plan, duration, plan
from erase.eval.run import EvaluateConfig, evaluate
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import of_prompts
from erase.scripts import run_evaluate
from erase.scripts.cli import run
from tests.test_evaluate import CONFIG, PROMPTS, delta_of
from tests.test_evaluate import model as model


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_a_plan_counts_what_is_left_to_draw_and_writes_nothing(model, tmp_path):
    delta, out, kept = delta_of(model), tmp_path / "out", tmp_path / "kept"
    before = model.fingerprint
    found = plan(model, delta, PROMPTS, out, CONFIG, base_images=kept)
    assert found.to_draw == {"base": 3, "erased": 3} and not found.missing
    (judged,) = found.judged
    assert (judged.images, judged.concepts) == (3, ["heart"])
    assert list(judged.evaluators) == ["classifier"]
    assert not out.exists() and not kept.exists() and model.fingerprint == before

    evaluate(model, delta, PROMPTS, out, CONFIG, base_images=kept)
    there = files(tmp_path)
    again = plan(model, delta, PROMPTS, out, CONFIG, base_images=kept)
    assert again.to_draw == {"base": 0, "erased": 0} and again.seconds == {}
    (out / "erased" / "00001.png").unlink()
    assert plan(model, delta, PROMPTS, out, CONFIG, base_images=kept).to_draw["erased"] == 1
    assert len(files(tmp_path)) == len(there) - 1


def test_of_a_budget_a_plan_tells_what_is_not_usual(model, tmp_path):
    attack = EVALUATORS.get("attack").config
    attack = replace(attack, pseudo_token=replace(attack.pseudo_token, steps=9))
    config = EvaluateConfig(["attack"], CONFIG.generate, {"attack": attack})
    (judged,) = plan(model, delta_of(model), PROMPTS, tmp_path / "out", config).judged
    told = {name: value for name, value in judged.evaluators["attack"].items() if "token" in name}
    assert told == {"pseudo_token.steps": 9}


def test_a_plan_tells_all_that_is_missing(model, tmp_path, monkeypatch):
    absent = replace(EVALUATORS.get("drift"), packages=("no-such-package",))
    get = EVALUATORS.get
    monkeypatch.setattr(
        type(EVALUATORS), "get", lambda _, name: absent if name == "drift" else get(name)
    )
    config = EvaluateConfig(["classifier", "drift", "nudenet"], CONFIG.generate)
    delta, unlabelled = delta_of(model), of_prompts(["a photo"], 0)
    found = plan(model, delta, unlabelled, tmp_path / "out", config)
    assert any(one.startswith("classifier: ") for one in found.missing)
    assert "drift: no-such-package is not installed; install it" in found.missing
    with pytest.raises(ErasureError, match="this evaluation cannot run: .*classifier.*; .*drift"):
        found.check()
    assert found.seconds == {}


def test_images_of_other_settings_are_missing_too(model, tmp_path):
    about = {"model": "x"}
    generate(model.pipeline(), PROMPTS, tmp_path / "kept", CONFIG.generate, about)
    found = plan(
        model, delta_of(model), PROMPTS, tmp_path / "out", CONFIG, base_images=tmp_path / "kept"
    )
    (told,) = found.missing
    assert "holds images made with model 'x'" in told


def test_a_set_of_what_must_stay_is_planned_without_those_that_need_a_concept(model, tmp_path):
    others = replace(of_prompts(["a photo of the sea"], 0), name="sea")
    config = EvaluateConfig(["classifier"], CONFIG.generate)
    found = plan(model, delta_of(model), [PROMPTS, others], tmp_path, config)
    assert [(one.name, one.images, list(one.evaluators)) for one in found.judged] == [
        ("three", 3, ["classifier"]),
        ("sea", 1, []),
    ]
    assert not found.missing and found.to_draw["base"] == 4


def test_the_estimate_counts_drawing_and_every_budget():
    speed, budget = Speed(7.0, 2.0, 1.0), Budget(4, Asked(10, 3))
    found = Plan([], {"base": 10, "erased": 20}, [], speed, {"attack": budget}, ["mine"], 2)
    assert found.seconds == {"drawing": 105, "attack": 4 * 7 / 2 + 20 + 3}
    told = found.lines()
    assert told[1] == "drawing takes about 2 min (7 s an image, from denoising steps timed here)"
    assert told[2].startswith("attack takes about 37 s at most (4 images and 10 predictions")
    assert told[3:] == [
        "together about 2 min", "not in it: judging, what mine asks of the model"
    ]  # fmt: skip
    assert Plan([], {"base": 10}, []).lines() == ["images to draw: base: 10"]
    assert [duration(s) for s in (0.2, 40, 100, 6000)] == ["1 s", "40 s", "2 min", "1.7 h"]


def test_the_estimate_is_near_what_drawing_takes(model, tmp_path):
    config = EvaluateConfig(generate=GenerateConfig(steps=12, batch_size=4))
    prompts = of_prompts([f"a red star number {i}" for i in range(24)], 0)
    told = min(speed(model, prompts, config.generate).image for _ in range(3)) * 24
    began = perf_counter()
    generate(model.pipeline(), prompts, tmp_path / "images", config.generate, {})
    assert told / 4 < perf_counter() - began < told * 4


def test_the_command_says_it_and_exits_by_it(model, tmp_path, capsys):
    delta_of(model).save(tmp_path / "delta.safetensors")
    flags = ["--delta", str(tmp_path / "delta.safetensors"), "--out", str(tmp_path / "out")]
    flags += ["--validate", "--generate.steps", "1", "--prompts", "einstein"]
    assert run(run_evaluate.main, [*flags, "--evaluators", "[drift]"]) == 0
    told = " ".join(capsys.readouterr().out.split())  # a console folds lines
    assert "einstein" in told and "drift" in told and "images to draw: base: " in told
    assert "from denoising steps timed here" in told
    assert run(run_evaluate.main, [*flags, "--evaluators", "[classifier,attack]"]) == 2
    caught = capsys.readouterr()
    assert "this evaluation cannot run: classifier: " in caught.err and "attack" in caught.out
    assert not (tmp_path / "out").exists()
