"""What a delta says of itself, written by hand, by another program or by a newer version: taken or
refused in a sentence, never a traceback."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from erase.compose import compose, conflicts
from erase.delta import ErasedDelta
from erase.delta.base import load_base
from erase.eval.report.card import model_card
from erase.eval.run import evaluate
from erase.export import export_delta
from erase.export.lora import extract_lora
from erase.models.sd import StableDiffusion
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import canvas_grid
from erase.scripts.cli import run
from erase.scripts.run_evaluate import main as evaluate_command
from tests.texts import raises

NAME = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
CONCEPT = {"target": "heart", "anchor": "moon", "kind": "object"}
GOOD = {
    "base_id": "pico", "method": "salun", "config": '{"erase": {"load": {}}, "method": {}}',
    "created_with": "test", "concepts": json.dumps([CONCEPT]),
}  # fmt: skip
PART = {"erased": "heart", "scale": 1.0, "method": "salun", "sha256": "f" * 64}


def load(**options: object) -> dict[str, str]:
    return {"config": json.dumps({"erase": {"load": options}})}


TAKEN = {
    "as written": {},
    "a newer key": {"hardware": "x"},
    "a newer key of a concept": {"concepts": json.dumps([CONCEPT | {"strength": 2}])},
    "a newer way of loading": load(quantised="int4"),
    "a base that waits in main memory": load(offload="blocks"),
    "a config without erase": {"config": "{}"},
    "infinity in its config": {"config": '{"method": {"clip": Infinity, "low": -1e999}}'},
    "no base": {"base_id": None},
    "no maker": {"created_with": None},
    "a composed one": {
        "config": '{"parts": [{"erase": {"load": {}}}]}',
        "parts": json.dumps([PART]),
    },
    "no concept": {"concepts": "[]"},
    "a concept without an anchor": {"concepts": '[{"target": "heart"}]'},
    "an anchor that is the target": {"concepts": '[{"target": "a", "anchor": "a"}]'},
    "a template without a place": {"concepts": json.dumps([CONCEPT | {"templates": ["a"]}])},
}
REFUSED = {
    "no method": ({"method": None}, "method"),
    "no config": ({"config": None}, "config"),
    "no concepts": ({"concepts": None}, "concepts"),
    "no base fingerprint": ({"base_fingerprint": None}, "which base"),
    "an empty base": ({"base_id": ""}, "base"),
    "a base with a NUL": ({"base_id": "a\0b"}, "base"),
    "a base of 9000 letters": ({"base_id": "x" * 9000}, "base"),
    "concepts that are no JSON": ({"concepts": "heart"}, "concepts"),
    "concepts that are a mapping": ({"concepts": json.dumps(CONCEPT)}, "concepts"),
    "concepts that are null": ({"concepts": "null"}, "concepts"),
    "a concept that is text": ({"concepts": '["heart"]'}, "concept 1"),
    "a concept that is null": ({"concepts": "[null]"}, "concept 1"),
    "a concept without a target": ({"concepts": '[{"anchor": "a"}]'}, "concept 1"),
    "a target that is a number": ({"concepts": '[{"target": 5, "anchor": "a"}]'}, "target"),
    "a target that is null": ({"concepts": '[{"target": null, "anchor": "a"}]'}, "target"),
    "an anchor that is a list": ({"concepts": '[{"target": "a", "anchor": ["b"]}]'}, "anchor"),
    "synonyms that are text": (
        {"concepts": json.dumps([CONCEPT | {"synonyms": "valentine"}])},
        "synonyms",
    ),
    "a synonym that is null": (
        {"concepts": json.dumps([CONCEPT | {"synonyms": [None]}])},
        "synonyms",
    ),
    "retain that is a list's name": (
        {"concepts": json.dumps([CONCEPT | {"retain": "objects"}])},
        "retain",
    ),
    "half a character": ({"concepts": '[{"target": "\\ud800", "anchor": "a"}]'}, "concepts"),
    "half a character in the config": ({"config": '{"erase": {}, "x": "\\ud800"}'}, "config"),
    "brackets without end": ({"config": "[" * 100_000}, "config"),
    "a config that nests without end": ({"config": '{"a":' * 500 + "1" + "}" * 500}, "config"),
    "an integer without end": ({"config": '{"a": ' + "9" * 10_000 + "}"}, "config"),
    "a config that is a list": ({"config": "[]"}, "config"),
    "a config that is null": ({"config": "null"}, "config"),
    "a config that is empty": ({"config": ""}, "config"),
    "erase that is a list": ({"config": '{"erase": []}'}, "config"),
    "load that is text": ({"config": '{"erase": {"load": "fp16"}}'}, "config"),
    "load that is null": ({"config": '{"erase": {"load": null}}'}, "config"),
    "a variant that is a number": (load(variant=16), "load.variant"),
    "a dtype that is a list": (load(dtype=["float32"]), "load.dtype"),
    "an unknown dtype": (load(dtype="float8"), "float8"),
    "offline that is text": (load(offline="no"), "load.offline"),
    "another way of waiting": (load(offload="layers"), "load.offload"),
    "waiting that is a list": (load(offload=["blocks"]), "load.offload"),
    "an unknown prediction": (load(prediction="eps"), "eps"),
    "no parts in a composed config": ({"config": '{"parts": []}'}, "config"),
    "parts that are a mapping": ({"config": '{"parts": {}}'}, "config"),
    "a part that is text": ({"config": '{"parts": ["x"]}'}, "config"),
    "parts that are no JSON": ({"parts": "["}, "parts"),
    "a part that is null": ({"parts": "[null]"}, "parts"),
    "a part without a scale": ({"parts": json.dumps([{**PART, "scale": None}])}, "parts"),
    "a scale without end": ({"parts": json.dumps([{**PART, "scale": 10**400}])}, "parts"),
    "a scale that is no number": ({"parts": json.dumps([PART]).replace("1.0", "NaN")}, "parts"),
    "another program's file that is text": ({"foreign": '["x"]'}, "another program"),
    "its concepts that are text": ({"foreign": '[{"erased": "x"}]'}, "another program"),
    "a digest that is a number": ({"parts": json.dumps([{**PART, "sha256": 5}])}, "parts"),
}


@pytest.fixture(scope="module")
def model(make_pico_pipeline):
    return StableDiffusion(make_pico_pipeline(), "pico")


def by_hand(
    folder: Path, model: StableDiffusion, changes: dict[str, str | None], name: str = NAME
) -> Path:
    """A file with one changed weight and these metadata."""
    size = model.parameters()[NAME].numel()
    bits = torch.zeros(size // 8, dtype=torch.uint8)
    bits[0] = 1
    said = {"format": "delta", "base_fingerprint": model.fingerprint, **GOOD, **changes}
    path = folder / "d.safetensors"
    save_file(
        {f"values.{name}": torch.ones(1), f"bits.{name}": bits},
        path,
        {key: text for key, text in said.items() if text is not None},
    )
    return path


class Drawn(Exception):
    """Something would have been drawn."""


@pytest.fixture
def undrawn(model, monkeypatch):
    """Drawing raises; `load_model` gives the base wherever it is said to lie."""
    from erase.models import load_model

    def draw(*_: object) -> None:
        raise Drawn

    monkeypatch.setattr("erase.eval.run.generate", draw)
    monkeypatch.setattr("erase.delta.base.is_here", lambda name, options: True)
    monkeypatch.setattr(
        "erase.delta.base.load_model",
        lambda name, *rest: model if name == "pico" else load_model(name, *rest),
    )


def use_everywhere(delta: ErasedDelta, model: StableDiffusion, folder: Path) -> list[str]:
    """What each entry point says against it."""
    calls = {
        "base": lambda: load_base(delta),
        "check": lambda: delta.check(model),
        "compose": lambda: compose(model, [(delta, 0.5), (delta, 1.0)]).save(
            folder / "both.safetensors"
        ),
        "conflicts": lambda: conflicts(model, [delta, delta]),
        "lora": lambda: extract_lora(delta, model, 1).as_delta(model),
        "delta": lambda: export_delta(delta, folder / "delta", "card"),
        "inverse": lambda: delta.inverse(model),
        "card": lambda: model_card(None, delta.metadata),
        "evaluate": lambda: evaluate(model, delta, canvas_grid((1,)), folder / "report"),
        "repr": lambda: (repr(delta), delta.title, delta.concepts, delta.sha256),
    }
    said = []
    for name, call in calls.items():
        try:
            call()
        except Drawn:
            json.dumps(delta.origin.config, allow_nan=False, ensure_ascii=False, indent=2).encode()
        except ErasureError as error:
            said.append(f"{name}: {error}")
    return said


@pytest.mark.parametrize("changes", TAKEN.values(), ids=TAKEN)
def test_hand_made_metadata_that_are_whole_are_used_or_refused_in_a_sentence(
    changes, model, tmp_path, undrawn
):
    delta = ErasedDelta.load(by_hand(tmp_path, model, changes))
    said = use_everywhere(delta, model, tmp_path)
    assert all("\n" not in line and len(line) < 700 for line in said), said
    assert changes or not said


@pytest.mark.parametrize("changes, word", REFUSED.values(), ids=REFUSED)
def test_hand_made_metadata_that_are_not_a_deltas_are_refused_when_they_are_read(
    changes, word, model, tmp_path, undrawn
):
    path = by_hand(tmp_path, model, changes)
    with raises(str(path), word):
        ErasedDelta.load(path)
    metadata = {"base_fingerprint": model.fingerprint, **GOOD, **changes}
    size = model.parameters()[NAME].numel()
    bits = torch.tensor([1] + [0] * (size // 8 - 1), dtype=torch.uint8)
    said = {key: text for key, text in metadata.items() if text is not None}
    delta = ErasedDelta({NAME: torch.ones(1)}, {NAME: bits}, said)  # made in memory
    assert any(line.startswith("evaluate") for line in use_everywhere(delta, model, tmp_path))


def test_what_a_newer_version_says_is_told_and_left_out(model, tmp_path, undrawn, caplog):
    newer = {
        "hardware": "x",
        **load(quantised="int4"),
        "concepts": json.dumps([CONCEPT | {"strength": 2}]),
    }
    with caplog.at_level(logging.WARNING, "erase"):
        delta = ErasedDelta.load(by_hand(tmp_path, model, newer))
    assert all(
        word in caplog.text for word in ("hardware", "strength", "load.quantised", "made with test")
    )
    assert (
        use_everywhere(delta, model, tmp_path) == [] and delta.origin.concepts[0].target == "heart"
    )


@pytest.mark.parametrize("key", ["method", "config"])
def test_a_delta_without_method_or_config_is_refused_before_anything_is_drawn(
    key, model, tmp_path, capsys
):
    path = by_hand(tmp_path, model, {key: None})
    assert run(evaluate_command, ["--delta", str(path), "--out", str(tmp_path / "report")]) == 2
    assert f"does not say its {key}" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_a_delta_of_parameters_that_the_base_lacks_is_refused_before_anything_is_drawn(
    model, tmp_path, undrawn
):
    delta = ErasedDelta.load(by_hand(tmp_path, model, {}, "unet.nowhere.weight"))
    with raises("unet.nowhere.weight", "the model does not have"):
        evaluate(model, delta, canvas_grid((1,)), tmp_path / "report")
    for said in use_everywhere(delta, model, tmp_path):
        assert "unet.nowhere.weight" in said, said
