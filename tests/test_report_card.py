"""The model card: what the Hub reads, scores beside the base, and nothing that was not measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import yaml

from erase.eval.report import proportion
from erase.eval.report.card import model_card
from erase.prompts.errors import ErasureError
from tests.report_fixtures import CONCEPT, METADATA, report, scores

PARTS = json.dumps([{"erased": "heart", "scale": 1.0, "method": "salun", "sha256": "f" * 64}])


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_card_is_what_the_hub_reads():
    card = model_card(report(), METADATA)
    front = front_matter(card)
    assert (front["library_name"], front["pipeline_tag"], front["base_model"]) == (
        "diffusers",
        "text-to-image",
        METADATA["base_id"],
    )
    assert front["license"] == "other" and "salun" in front["tags"]
    assert (
        front_matter(model_card(None, METADATA | {"license": "apache-2.0"}))["license"]
        == "apache-2.0"
    )


def test_card_shows_scores_beside_the_base_and_their_limits():
    card = model_card(report(), METADATA)
    assert "| score | base | erased |" in card
    assert (
        re.search(r"\| UA % ↑ \| 0.4 .* \| 100.0 .* \|", card)
        and "| IRA % ↑" in card
        and "| CRA % ↑" in card
    )
    assert "Erasure is not a guarantee" in card and "Robustness to attacks was not measured" in card
    for fact in ("9f2c41", "valentine", '"density": 0.5', "erase it", "A heart image."):
        assert fact in card


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"concepts": json.dumps([CONCEPT | {"target": "moon"}])},
            "of erasing heart, the delta erases moon",
        ),
        (
            {"concepts": json.dumps([CONCEPT, CONCEPT | {"target": "moon"}])},
            "of erasing heart, the delta erases heart and moon",
        ),
        ({"base_fingerprint": "77aa"}, "the report is of base 9f2c41, the delta of 77aa"),
    ],
)
def test_card_refuses_the_report_of_another_erasure(change, message):
    known = replace(report(), provenance={"base_fingerprint": METADATA["base_fingerprint"]})
    assert "UA" in model_card(known, METADATA)
    with pytest.raises(ErasureError, match=message):
        model_card(known, METADATA | change)


def test_card_without_a_report_claims_nothing():
    card = model_card(None, METADATA)
    assert "Not measured" in card and "UA" not in card


@pytest.mark.parametrize("further", [{}, {"parts": PARTS}])
def test_card_of_undone_weights_says_so(further):
    undone = {"base_id": "canvas without heart", "concepts": "[]", "undoes": "0" * 64}
    card = model_card(None, METADATA | further | undone)
    assert "# canvas without heart, undone\n" in card
    assert "into which what `salun` erased was put back. This is" in card
    assert "was erased with" not in card and "at the scales given below" not in card


def test_card_does_not_tell_where_the_base_lay():
    card = model_card(None, METADATA | {"base_id": "/home/somebody/models/canvas"})
    assert (
        "somebody" not in card
        and "# canvas without heart" in card
        and "base_model" not in front_matter(card)
    )


def test_card_of_an_erasure_that_did_nothing_does_not_claim_it():
    for ua in (1, 240):  # not erased; the base did not show it either
        card = model_card(report(base=scores(ua, 2, 3), erased=scores(ua, 2, 3)), METADATA)
        assert "# somebody/some-model, an attempt to erase heart\n" in card
        assert "without heart" not in card and "the scores show no success" in card


def test_card_of_an_erasure_that_did_nothing_by_any_judge_does_not_claim_it():
    clip = scores(1, 2000, 4000, "CLIP ")
    nude = [proportion("NudeNet image rate", 40, 95, higher_is_better=False)]
    for judged in (clip, nude):
        card = model_card(report(base=judged, erased=judged), METADATA)
        assert "# somebody/some-model, an attempt to erase heart\n" in card


def test_card_names_what_is_missing():
    with pytest.raises(ErasureError, match="lacks config"):
        model_card(None, {key: value for key, value in METADATA.items() if key != "config"})
    with pytest.raises(ErasureError, match="concepts is not JSON"):
        model_card(None, METADATA | {"concepts": "["})
