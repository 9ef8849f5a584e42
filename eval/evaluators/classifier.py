"""The classifier evaluator: UA, IRA and CRA by a classifier with one head per kind of concept.

UnlearnCanvas: Zhang et al. 2024, "UnlearnCanvas: A Stylized Image Dataset for Enhanced Machine Unlearning Evaluation".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval.canvas.judges import load_classifier
from eval.evaluators.labelled import label_scores, labels_of
from eval.evaluators.metrics import confusion
from eval.images import ImageSet
from eval.report import Score
from prompts.canvas import KINDS, vocabulary
from prompts.concepts import ConceptSpec
from prompts.errors import unknown


@dataclass
class Config:
    """How the classifier evaluator judges."""

    judge: str = "canvas"
    """which classifier; `canvas` is that of the embedded world"""
    batch_size: int = 64
    """images judged at once; no score depends on it"""
    cra_with_target: bool = False
    """count images whose prompt names a forgotten concept in CRA too (the default leaves them out of IRA and CRA)"""


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


@torch.inference_mode()
def predict(judge: Judge, images: ImageSet, batch_size: int = 64) -> dict[str, list[str]]:
    """kind -> predicted name of each image, in row order."""
    found: dict[str, list[str]] = {kind: [] for kind in judge.classes}
    for start in range(0, len(images.rows), batch_size):
        logits = judge.logits(images.tensor(images.rows[start : start + batch_size]))
        for kind, names in judge.classes.items():
            found[kind] += [names[i] for i in logits[kind].argmax(1).tolist()]
    return found


def evaluate_with(judge: Judge, images: ImageSet, concepts: list[ConceptSpec], config: Config) -> list[Score]:
    """As `evaluate`, by any judge."""
    labels = labels_of(images, judge.classes)
    predictions = predict(judge, images, config.batch_size)
    return label_scores(predictions, labels, concepts, config.cra_with_target, "", f"classifier {judge.name}")


def evaluate(images: ImageSet, concepts: list[ConceptSpec], config: Config) -> list[Score]:
    """UA, IRA and CRA of the forgotten concepts; without concepts, the accuracy of each kind.

    Args:
        images: rows labelled with what their prompts say, one label per kind.
        concepts: what was forgotten; each is judged on its kind.
        config: which judge, and how.

    Returns:
        Scores in percent, higher is better, with n and binomial standard error.

    Raises:
        ErasureError: an unknown judge, images without labels or with unknown ones, a concept that no prompt names.
    """
    return evaluate_with(load_judge(config.judge), images, concepts, config)


def confusions(images: ImageSet, config: Config) -> dict[str, dict[str, Any]]:
    """kind -> {"kind", "labels", "counts"}: counts[i][j] images labelled labels[i] were classified as labels[j]. JSON-ready."""
    judge = load_judge(config.judge)
    labels, predictions = labels_of(images, judge.classes), predict(judge, images, config.batch_size)
    return {
        kind: {
            "kind": kind,
            "labels": list(judge.classes[kind]),
            "counts": confusion(predictions[kind], labels[kind], judge.classes[kind]).tolist(),
        }
        for kind in labels
    }
