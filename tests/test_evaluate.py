"""Evaluating as a whole: the model stays as it was, the report names its delta, and another run's
evidence is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from erase.delta import ErasedDelta
from erase.eval.case import Case
from erase.eval.evaluators import EVALUATORS, Evaluator, classifier
from erase.eval.generate import GenerateConfig, planned
from erase.eval.report import EvalReport
from erase.eval.run import EvaluateConfig, Evidence, evaluate
from erase.eval.scores import Score, proportion
from erase.mask import SaliencyMask
from erase.models import load_model
from erase.prompts.canvas import canvas_concept
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import PromptRow, PromptSet

LABELS = [("heart", "Flat", "red"), ("star", "Neon", "blue"), ("moon", "Flat", "blue")]
PROMPTS = PromptSet(
    "three",
    tuple(
        PromptRow(
            i, f"a {colour} {thing}", i, labels={"object": thing, "style": style, "colour": colour}
        )
        for i, (thing, style, colour) in enumerate(LABELS)
    ),
)
CONFIG = EvaluateConfig(evaluators=["classifier"], generate=GenerateConfig(steps=1, batch_size=4))


@pytest.fixture
def model(make_pico_pipeline, tmp_path: Path):
    make_pico_pipeline().save_pretrained(tmp_path / "base")
    return load_model(str(tmp_path / "base"))


def delta_of(model, name: str = "heart", shift: float = 0.5, **metadata: str) -> ErasedDelta:
    """Every second weight of the UNet's first convolution moved."""
    param = model.parameters()["unet.conv_in.weight"].detach()
    moved = param.clone().flatten()
    moved[::2] += shift
    about = {
        "base_fingerprint": model.fingerprint,
        "base_id": model.name,
        "method": "salun",
        "config": json.dumps({"erase": {}, "method": {}}),
        "concepts": json.dumps([canvas_concept(name).to_dict()]),
        "created_with": "a test",
    }
    return ErasedDelta.between(
        {"unet.conv_in.weight": param},
        {"unet.conv_in.weight": moved.view(param.shape)},
        about | metadata,
    )


def bits_of(model) -> dict[str, torch.Tensor]:
    return {
        name: param.detach().clone().view(torch.int32) for name, param in model.parameters().items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_loaded_model_is_as_it_was_after_it_was_evaluated(model, tmp_path: Path):
    before, fingerprint = bits_of(model), model.fingerprint
    report = evaluate(model, delta_of(model), PROMPTS, tmp_path / "report", CONFIG)
    assert same(before, bits_of(model)) and model.fingerprint == fingerprint
    first, second = (
        (tmp_path / "report" / row / "00000.png").read_bytes() for row in ("base", "erased")
    )
    assert first != second and report.rows.keys() == {"base", "erased"}


def test_a_loaded_model_is_as_it_was_after_an_evaluation_that_failed(
    model, tmp_path: Path, monkeypatch
):
    before, fingerprint, made = bits_of(model), model.fingerprint, []

    def full(*arguments):
        made.append(bits_of(model))
        if len(made) == 2:
            raise ErasureError("the disk is full")

    monkeypatch.setattr("erase.eval.run.generate", full)
    with pytest.raises(ErasureError, match="the disk is full"):
        evaluate(model, delta_of(model), PROMPTS, tmp_path / "report", CONFIG)
    assert not same(before, made[1])
    assert same(before, bits_of(model)) and model.fingerprint == fingerprint


def test_a_report_names_its_delta_by_digest_and_strength(model, tmp_path: Path):
    delta = delta_of(model)
    evaluate(model, delta, PROMPTS, tmp_path / "report", CONFIG)
    told = EvalReport.load(tmp_path / "report" / "report.json").provenance
    assert told["delta_sha256"] == delta.sha256
    assert told["delta_settings"] == {"method": "salun", "strength": 1.0}
    weaker = delta_of(
        model,
        shift=0.1,
        parts=json.dumps([{"erased": "heart", "scale": 0.2, "method": "salun", "sha256": "0"}]),
    )
    evaluate(model, weaker, PROMPTS, tmp_path / "other", CONFIG)
    told = EvalReport.load(tmp_path / "other" / "report.json").provenance
    assert told["delta_sha256"] == weaker.sha256 != delta.sha256
    assert told["delta_settings"]["strength"] == [0.2]


# ---- the case as evaluators see it ---------------------------------------------------------------


def case_of(model, delta: ErasedDelta | None) -> Case:
    images = planned(PROMPTS, Path("nowhere"), GenerateConfig())
    return Case(images, [canvas_concept("heart")], base=model, delta=delta)


def test_a_case_lends_base_and_erased_model_in_turn(model):
    delta = delta_of(model)
    base, case = bits_of(model), case_of(model, delta)
    with case.model() as erased:
        changed = bits_of(erased)
        with (
            pytest.raises(ErasureError, match="one object; leave one block before the next begins"),
            case.base_model(),
        ):
            pass
        with pytest.raises(ErasureError, match="one object"), case.model():
            pass
    assert [name for name in base if not torch.equal(base[name], changed[name])] == [
        "unet.conv_in.weight"
    ]
    with case.base_model() as lent:
        assert same(base, bits_of(lent))
    with case_of(model, None).model() as lent:
        assert same(base, bits_of(lent))


def test_a_case_has_its_base_back_after_a_fault(model):
    base, fingerprint = bits_of(model), model.fingerprint
    case = case_of(model, delta_of(model))
    with pytest.raises(RuntimeError, match="mid-way"), case.model():
        raise RuntimeError("mid-way")
    assert same(base, bits_of(model)) and model.fingerprint == fingerprint
    with case.model():
        pass


def test_a_package_that_an_evaluator_lacks_is_named_before_anything_is_drawn(
    model, tmp_path: Path, monkeypatch
):
    wants = Evaluator(
        "wants",
        classifier.Config(),
        classifier.evaluate,
        classifier.check,
        packages=("absent-lib",),
    )
    monkeypatch.setitem(EVALUATORS.ours, "wants", "one_judge:WANTS")
    monkeypatch.setitem(sys.modules, "one_judge", SimpleNamespace(WANTS=wants))
    with pytest.raises(
        ErasureError, match="evaluator wants needs absent-lib, which is not installed; install it"
    ):
        evaluate(model, delta_of(model), PROMPTS, tmp_path / "report", EvaluateConfig(["wants"]))
    assert not (tmp_path / "report").exists()


def test_evaluators_get_both_image_sets_both_models_and_a_folder_of_their_row(
    model, tmp_path: Path, monkeypatch
):
    """And a report that names a score's giver where the score does not."""
    seen = []

    def judge(case: Case, config: classifier.Config) -> list[Score]:
        seen.append(
            (case.images.folder.name, case.base_images.folder.name, case.folder, case.delta)
        )
        with case.model() as held, case_of(held, None).base_model():
            return [proportion("seen", 1, 3)]

    one = Evaluator("one", classifier.Config(), judge, lambda case, config: None)
    monkeypatch.setitem(EVALUATORS.ours, "one", "one_judge:ONE")
    monkeypatch.setitem(sys.modules, "one_judge", SimpleNamespace(ONE=one))
    delta = delta_of(model)
    report = evaluate(
        model,
        delta,
        PROMPTS,
        tmp_path,
        EvaluateConfig(["one"], GenerateConfig(steps=1, batch_size=4)),
    )
    assert seen == [
        ("base", "base", tmp_path / "work" / "base", None),
        ("erased", "base", tmp_path / "work" / "erased", delta),
    ]
    assert [score.evaluator for scores in report.rows.values() for score in scores] == [
        "one",
        "one",
    ]
    assert not (tmp_path / "work").exists(), "who keeps nothing leaves nothing"


# ---- evidence ------------------------------------------------------------------------------------


def run_folder(folder: Path, model, delta: ErasedDelta, density: float = 1.0) -> Path:
    """What an erasure leaves beside its delta."""
    folder.mkdir()
    name = "unet.conv_in.weight"
    params = {name: model.parameters()[name]}
    SaliencyMask.random(params, density, 0, {"base_fingerprint": model.fingerprint}).save(
        folder / "mask.safetensors"
    )
    (folder / "training.json").write_text(
        json.dumps({"losses": [2.0, 1.0], "delta_sha256": delta.sha256})
    )
    (folder / "run.json").write_text(json.dumps(delta.metadata))
    return folder


def test_the_evidence_of_a_run_is_taken_for_its_delta(model, tmp_path: Path):
    delta = delta_of(model)
    found = Evidence.of(run_folder(tmp_path / "run", model, delta), delta)
    assert found.losses == [2.0, 1.0] and found.mask is not None
    assert Evidence.of(tmp_path / "nothing", delta) == Evidence()


def test_a_mask_brings_the_overlap_that_it_tells(model, tmp_path: Path):
    folder, name = tmp_path / "run", "unet.conv_in.weight"
    folder.mkdir()
    params = {name: model.parameters()[name]}
    for told, expected in (("0.25", 0.25), (None, None), ("a quarter", ErasureError)):
        about = {"base_fingerprint": model.fingerprint} | ({"overlap": told} if told else {})
        SaliencyMask.random(params, 0.5, 0, about).save(folder / "mask.safetensors")
        if expected is ErasureError:
            with pytest.raises(ErasureError, match="mask.safetensors"):
                Evidence.of(folder)
        else:
            assert Evidence.of(folder).overlap == expected


@pytest.mark.parametrize(
    ("change", "file"),
    [
        (
            lambda folder, model: (folder / "training.json").write_text(
                '{"losses": [1.0], "delta_sha256": "0"}'
            ),
            "training.json",
        ),
        (
            lambda folder, model: (folder / "run.json").write_text(
                json.dumps(delta_of(model, "star").metadata)
            ),
            "run.json",
        ),
        (
            lambda folder, model: mask_of(model, 0.5).save(folder / "mask.safetensors"),
            "mask.safetensors",
        ),
        (
            lambda folder, model: mask_of(model, 1.0, base="0").save(folder / "mask.safetensors"),
            "mask.safetensors",
        ),
        (
            lambda folder, model: mask_of(model, 1.0, part="unet.conv_out.bias").save(
                folder / "mask.safetensors"
            ),
            "mask.safetensors",
        ),
    ],
    ids=[
        "losses",
        "concept",
        "mask of other weights",
        "mask of another base",
        "mask of another part",
    ],
)
def test_the_evidence_of_another_delta_is_refused(change, file: str, model, tmp_path: Path):
    delta = delta_of(model)
    folder = run_folder(tmp_path / "run", model, delta)
    change(folder, model)
    with pytest.raises(
        ErasureError,
        match=f"{file} is of another delta than .*; name the delta of that run, or move this one",
    ):
        Evidence.of(folder, delta)


def mask_of(
    model, density: float, base: str = "", part: str = "unet.conv_in.weight"
) -> SaliencyMask:
    return SaliencyMask.random(
        {part: model.parameters()[part]},
        density,
        1,
        {"base_fingerprint": base or model.fingerprint},
    )


def test_a_damaged_run_json_beside_evidence_is_named(model, tmp_path: Path):
    folder = run_folder(tmp_path / "run", model, delta_of(model))
    for text in ("{", "[1]", '{"concepts": 5}', '{"concepts": "["}'):
        (folder / "run.json").write_text(text)
        with pytest.raises(ErasureError, match=r"run\.json is damaged"):
            Evidence.of(folder, delta_of(model))
