"""The classifier evaluator: UA, IRA and CRA by a classifier with one head per kind of concept.

UnlearnCanvas: Zhang et al. 2024, "UnlearnCanvas: A Stylized Image Dataset for Enhanced Machine
Unlearning Evaluation".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from erase.eval.canvas.judges import load_classifier
from erase.eval.case import Case
from erase.eval.evaluators import Evaluator
from erase.eval.evaluators.labelled import (
    cases_of,
    check_price,
    label_scores,
    labels_of,
    of_canvas,
)
from erase.eval.images import ImageSet
from erase.eval.metrics.labels import confusion
from erase.eval.scores import Score
from erase.parallel.processes import in_shares
from erase.prompts.canvas import KINDS, vocabulary
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import COUNT, check_names, check_ranges, unknown


@dataclass
class Config:
    """classifier: UA, IRA and CRA, by a classifier with one head per kind of concept."""

    judge: str = "canvas"
    """which classifier; `canvas` is that of the embedded world"""
    batch_size: int = 64
    """images judged at once; no score depends on it"""
    cra_with_target: bool = False
    """count images whose prompt names a forgotten concept in CRA too (the default leaves them out
    of IRA and CRA)"""

    def __post_init__(self) -> None:
        check_ranges(self, {"batch_size": COUNT})
        check_names(self, {"judge": JUDGES})


@dataclass(frozen=True)
class Judge:
    """A classifier and the names of its classes."""

    name: str
    logits: Callable[[Tensor], Mapping[str, Tensor]]
    """(n, 3, H, W) in [0, 1] -> kind -> (n, classes of that kind)"""
    classes: Mapping[str, Sequence[str]]
    """kind -> class names, in the order of the logits"""


def canvas_judge() -> Judge:
    """The shipped classifier of the embedded world."""
    return Judge("canvas", load_classifier(), {kind: vocabulary().names(kind) for kind in KINDS})


JUDGES = {"canvas": canvas_judge}


def load_judge(name: str) -> Judge:
    """The judge of that name.

    Raises:
        ErasureError: there is none; the near one is suggested.
    """
    if name not in JUDGES:
        raise unknown("judge", name, JUDGES)
    return JUDGES[name]()


def predict(judge: Judge, images: ImageSet, batch_size: int = 64) -> dict[str, list[str]]:
    """kind -> predicted name of each image, in row order."""

    @torch.inference_mode()
    def classify(rows: range) -> dict[str, list[str]]:
        logits = judge.logits(images.tensor(images.rows[row] for row in rows))
        labels = {}
        for kind, names in judge.classes.items():
            labels[kind] = [names[i] for i in logits[kind].argmax(1).tolist()]
        return labels

    parts = in_shares(len(images.rows), batch_size, classify, "classifier", "image")
    labels = {}
    for kind in judge.classes:
        labels[kind] = [name for part in parts for name in part[kind]]
    return labels


@dataclass(frozen=True)
class Judged:
    """The label that a judge gives each image, beside the one that its prompt asked for: judged
    once, for all scores drawn from it."""

    judge: Judge
    labels: Mapping[str, Sequence[str]]
    """kind -> name in each image's prompt"""
    predictions: Mapping[str, Sequence[str]]
    """kind -> predicted name of each image"""
    cases: Sequence[int] = ()
    """number of each image's case"""

    def scores(self, concepts: list[ConceptSpec], config: Config) -> list[Score]:
        """See `evaluate`."""
        evaluator = f"classifier {self.judge.name}"
        return label_scores(
            self.predictions,
            self.labels,
            concepts,
            config.cra_with_target,
            "",
            evaluator,
            self.cases,
        )

    def confusions(self) -> dict[str, dict[str, Any]]:
        """kind -> {"kind", "labels", "counts"}: counts[i][j] images labelled labels[i] were
        classified as labels[j]. JSON-ready."""
        return {
            kind: {
                "kind": kind,
                "labels": list(self.judge.classes[kind]),
                "counts": confusion(
                    self.predictions[kind], names, self.judge.classes[kind]
                ).tolist(),
            }
            for kind, names in self.labels.items()
        }


def judged(judge: Judge, case: Case, config: Config) -> Judged:
    """The labels that this judge gives.

    Raises:
        ErasureError: images without labels or with unknown ones.
    """
    labels = labels_of(case, judge.classes)
    return Judged(judge, labels, predict(judge, case.images, config.batch_size), cases_of(case))


def check(case: Case, config: Config) -> None:
    """Refuse what `evaluate` would refuse, and a UA that would stand without its price."""
    judge = load_judge(config.judge)
    labels = labels_of(case, judge.classes)
    scores = Judged(judge, labels, labels, cases_of(case)).scores(case.concepts, config)
    check_price(scores)


def evaluate(case: Case, config: Config) -> list[Score]:
    """UA, IRA and CRA of the forgotten concepts; without concepts, the accuracy of each kind.

    Args:
        case: its images' labels are what their prompts say; each concept is judged on its kind.
        config: which judge, and how.

    Returns:
        Scores in percent, higher is better, with n and Wilson's interval. The confusion of the
        first concept's kind goes to the case's extras.

    Raises:
        ErasureError: an unknown judge, images without labels or with unknown ones, a concept that
            no prompt names.
    """
    seen = judged(load_judge(config.judge), case, config)
    kind = case.concepts[0].kind if case.concepts else None
    if kind and kind in seen.labels:
        case.add_extra("confusion", seen.confusions()[kind])
    return seen.scores(case.concepts, config)


CLASSIFIER = Evaluator("classifier", Config(), evaluate, check, fits=of_canvas)
