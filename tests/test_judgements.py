"""What judges say of single images, for the page: labels, boxes, whether the concept is seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from erase.eval.attempts import PICTURES, few
from erase.eval.case import Case
from erase.eval.evaluators import nudenet, q16_type
from erase.eval.evaluators.labelled import words_on
from erase.eval.images import ImageRow, ImageSet
from erase.eval.judgements import Judgement
from erase.prompts.concepts import ConceptSpec, load_concepts

HEART = ConceptSpec("heart", "star", kind="object")
LABELS = {"object": ["heart", "heart", "moon", "moon"], "style": ["Flat", "Neon", "Flat", "Neon"]}


def case_of(*concepts: ConceptSpec) -> Case:
    """Rows with labels, and no images."""
    rows = []
    for case in range(4):
        labels = {kind: names[case] for kind, names in LABELS.items()}
        rows.append(ImageRow(f"{case}.png", 10 + case, "a prompt", 0, 1.0, labels, ""))
    return Case(ImageSet(Path("none"), rows, {}), concepts)


def test_a_judge_of_labels_names_the_concepts_kind_and_what_else_is_wrong():
    said = {"object": ["star", "heart", "heart", "moon"], "style": ["Flat", "Neon", "Flat", "Flat"]}
    shares = {"object": [0.987, 0.5, 0.4, 1.0], "style": [1.0, 1.0, 1.0, 0.61]}
    assert words_on(case_of(HEART), LABELS, said, shares) == {
        10: Judgement("star 99 %", False, False),
        11: Judgement("heart 50 %", True, True),
        12: Judgement("heart 40 %", True, False),
        13: Judgement("moon 100 %, Flat 61 %", False, False),
    }
    plain = words_on(case_of(), LABELS, said, {})
    assert plain[11] == Judgement("heart, Neon", None, True), "nothing was forgotten"


def test_nudenets_word_is_its_best_counted_box():
    def box(name: str, score: float) -> dict[str, object]:
        return {"class": name, "score": score, "box": [0, 0, 1, 1]}

    config = nudenet.Config()
    found = [box("FACE_FEMALE", 0.99), box("FEET_EXPOSED", 0.61), box("BELLY_EXPOSED", 0.808)]
    assert nudenet.word(found, config) == "belly exposed 0.81, +1"
    assert nudenet.word(found[:2], config) == "feet exposed 0.61"
    assert nudenet.word(found[:1], config) == "no box"


@pytest.mark.parametrize(
    ("targets", "looks"), [((), False), (("nudity",), True), (("nudity", "heart"), False)]
)
def test_nudenet_looks_for_the_concept_where_it_is_nudity(targets, looks):
    assert nudenet.of_nudity([ConceptSpec(name, "a moon") for name in targets]) is looks


@pytest.mark.parametrize(
    ("target", "synonyms", "looks"),
    [
        ("Naked people", (), True),
        ("reclining nude", (), True),
        ("sexual content", ("porn", "erotica"), True),
        ("nsfw", ("nudity", "topless-woman"), True),
        ("nsfw", ("nudity", "gore", "drugs"), False),
        ("naked mole rat", (), False),
        ("mole", ("naked mole-rat",), False),
        ("nude lipstick", ("a nude lip colour",), False),
        ("violence", ("sexual violence", "a fight"), False),
        ("beach", ("nude beach", "naked people on a beach", "the sea"), False),
    ],
)
def test_a_name_that_only_holds_a_word_for_nudity_is_another_thing(target, synonyms, looks):
    assert nudenet.of_nudity([ConceptSpec(target, "a moon", synonyms)]) is looks


@pytest.mark.parametrize("name", ["nudity", "violence"])
def test_of_the_shipped_concepts_nudity_alone_is_nudenets(name):
    assert nudenet.of_nudity(load_concepts(name)) is (name == "nudity")
    for concept in load_concepts(name):
        names = [replace(concept, target=one, synonyms=()) for one in concept.names]
        assert {nudenet.of_nudity([one]) for one in names} == {name == "nudity"}


def test_q16_types_word_is_kept_for_every_image(tmp_path, monkeypatch):
    class Blind:
        """Calls every second image unsafe."""

        name = "blind"

        def texts(self, captions, batch_size):
            sign = 1.0 if "negative" in captions[0] else -1.0
            return torch.tensor([[sign, 0.0]] * len(captions))

        def embed(self, images):
            return torch.tensor([[(-1.0) ** place, 0.0] for place, _ in enumerate(images)])

    monkeypatch.setattr(q16_type, "load_clip", lambda config: Blind())
    monkeypatch.setattr(ImageSet, "image", lambda self, row: None)
    case = case_of(HEART)
    (score,) = q16_type.evaluate(case, q16_type.Config())
    assert score.value == 50
    told = case.extras["judged"]["Q16-type"]
    assert list(told["words"].values()) == ["inappropriate", "not inappropriate"] * 2
    assert told["seen"] is None and told["wrong"] is None


def test_the_few_pictures_of_an_attempt_are_those_that_show_the_concept_first():
    flags = np.array([False, True, False, False, False, True, True])
    assert few(flags.tolist()) == [1, 5, 6, 0] and PICTURES == 4
    assert few([False]) == [0]
