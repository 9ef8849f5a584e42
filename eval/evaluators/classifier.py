"""The classifier evaluator: UA, IRA and CRA by a classifier with one head per kind of concept, that
of the embedded world or any of torchvision or timm.

UnlearnCanvas: Zhang et al. 2024, "UnlearnCanvas: A Stylized Image Dataset for Enhanced Machine
Unlearning Evaluation".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from erase.eval.case import Case
from erase.eval.evaluators import Evaluator
from erase.eval.evaluators.judges import Judge, canvas_judge
from erase.eval.evaluators.labelled import (
    cases_of,
    check_price,
    label_scores,
    labels_of,
    of_canvas,
    words_on,
)
from erase.eval.evaluators.library_judges import LIBRARIES, library_judge
from erase.eval.evaluators.wordings import HARMONIC, accuracy_scores, wording_scores
from erase.eval.images import ImageSet
from erase.eval.metrics.labels import confusion
from erase.eval.scores import Score
from erase.parallel.processes import in_shares
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import COUNT, ErasureError, check_names, check_ranges, unknown


@dataclass
class Config:
    """classifier: UA, IRA and CRA, by a classifier with one head per kind of concept."""

    judge: str = "canvas"
    """which classifier; `canvas` is that of the embedded world, `torchvision:NAME` and `timm:NAME`
    are any of these libraries, with their own preprocessing"""
    classes: str | None = None
    """names of a library classifier's outputs: `imagenette`, `unlearncanvas`, or a YAML file"""
    weights: str | dict[str, str] | None = None
    """a library classifier's weights: a file (safetensors, or a .pt of plain tensors), or one for
    each kind of the classes ({style: FILE, object: FILE}); default: torchvision's own, where
    torch.hub's folder has them, for nothing is downloaded"""
    resize: int | None = None
    """squash an image to a square of this many pixels, bilinear, instead of a library's own
    resizing and cropping (UnlearnCanvas: 224)"""
    batch_size: int = 64
    """images judged at once; no score depends on it"""
    cra_with_target: bool = False
    """count images whose prompt names a forgotten concept in CRA too (the default leaves them out
    of IRA and CRA)"""
    harmonic: str | None = None
    """add MACE's harmonic mean over the wordings of the prompts: H_o (efficacy, specificity,
    generality) or H_c (the first two)"""

    def __post_init__(self) -> None:
        check_ranges(self, {"batch_size": COUNT, "resize": COUNT}, "classifier")
        if self.harmonic is not None:
            check_names(self, {"harmonic": HARMONIC})
        if self.judge == "canvas" and (self.classes or self.weights or self.resize):
            raise ErasureError(
                "classes, weights and resize are for a classifier of torchvision or timm, and "
                "canvas brings its own; name the judge, or leave them out"
            )
        if self.judge != "canvas" and self.judge.partition(":")[0] not in LIBRARIES:
            raise ErasureError(
                f"{unknown('judge', self.judge, JUDGES)}; or a library's: torchvision:NAME, "
                "timm:NAME"
            )


JUDGES = {"canvas": canvas_judge}


def load_judge(name: str) -> Judge:
    """The judge of that name, which brings all it needs.

    Raises:
        ErasureError: there is none; the near one is suggested.
    """
    if name not in JUDGES:
        raise unknown("judge", name, JUDGES)
    return JUDGES[name]()


def judge_of(config: Config) -> Judge:
    """The judge that the settings describe.

    Raises:
        ErasureError: see `library_judge`.
    """
    if config.judge in JUDGES:
        return load_judge(config.judge)
    return library_judge(config.judge, config.classes, config.weights, config.resize)


def predict(judge: Judge, images: ImageSet, batch_size: int = 64) -> dict[str, list[str]]:
    """kind -> predicted name of each image, in row order."""
    return split(likeliest(judge, images, batch_size))[0]


def split(
    found: Mapping[str, Sequence[tuple[str, float]]],
) -> tuple[dict[str, list[str]], dict[str, list[float]]]:
    """Names and probabilities apart, by kind."""
    names, shares = {}, {}
    for kind, column in found.items():
        names[kind] = [name for name, _ in column]
        shares[kind] = [share for _, share in column]
    return names, shares


def likeliest(
    judge: Judge, images: ImageSet, batch_size: int = 64
) -> dict[str, list[tuple[str, float]]]:
    """kind -> predicted name of each image and its probability, in row order."""

    @torch.inference_mode()
    def classify(rows: range) -> dict[str, list[tuple[str, float]]]:
        logits = judge.logits(judge.batch(images, [images.rows[row] for row in rows]))
        labels = {}
        for kind, names in judge.classes.items():
            places = logits[kind][:, : len(names)].argmax(1)
            shares = logits[kind].float().softmax(1).gather(1, places[:, None]).squeeze(1)
            best = [names[place] for place in places.tolist()]
            labels[kind] = list(zip(best, shares.tolist(), strict=True))
        return labels

    parts = in_shares(len(images.rows), batch_size, classify, "classifier", "image")
    labels = {}
    for kind in judge.classes:
        labels[kind] = [one for part in parts for one in part[kind]]
    return labels


@dataclass(frozen=True)
class Judged:
    """The label that a judge gives each image, beside the one that its prompt asked for: judged
    once, for all scores drawn from it."""

    judge: Judge
    labels: Mapping[str, Sequence[str]]
    """kind -> name in each image's prompt"""
    predictions: Mapping[str, Sequence[str]]
    """kind -> predicted name of each image, as the case calls it (`Case.called`)"""
    cases: Sequence[int] = ()
    """number of each image's case"""
    shares: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """kind -> probability of each predicted name"""

    def scores(self, concepts: list[ConceptSpec], config: Config) -> list[Score]:
        """See `evaluate`."""
        evaluator = f"classifier {self.judge.name}"
        if concepts and len(self.judge.classes) == 1:
            return accuracy_scores(
                self.predictions, self.labels, concepts, "", evaluator, self.cases
            )
        return label_scores(
            self.predictions,
            self.labels,
            concepts,
            config.cra_with_target,
            "",
            evaluator,
            self.cases,
        )

    def by_wording(self, case: Case, config: Config) -> list[Score]:
        """See `wording_scores`."""
        evaluator = f"classifier {self.judge.name}"
        return wording_scores(case, self.predictions, self.labels, "", evaluator, config.harmonic)

    def confusions(self, case: Case) -> dict[str, dict[str, Any]]:
        """kind -> {"kind", "labels", "counts"}: counts[i][j] images labelled labels[i] were
        classified as labels[j]. JSON-ready."""
        tables = {}
        for kind, asked in self.labels.items():
            names = list(dict.fromkeys(case.called(kind, self.judge.classes[kind])))
            counts = confusion(self.predictions[kind], asked, names).tolist()
            tables[kind] = {"kind": kind, "labels": names, "counts": counts}
        return tables


def judged(judge: Judge, case: Case, config: Config) -> Judged:
    """The labels that this judge gives.

    Raises:
        ErasureError: images without labels or with unknown ones.
    """
    labels = labels_of(case, judge.classes)
    found, shares = split(likeliest(judge, case.images, config.batch_size))
    names = {kind: case.called(kind, column) for kind, column in found.items()}
    return Judged(judge, labels, names, cases_of(case), shares)


def check(case: Case, config: Config) -> None:
    """Refuse what `evaluate` would refuse, and a UA that would stand without its price."""
    judge = judge_of(config)
    labels = labels_of(case, judge.classes)
    foreseen = Judged(judge, labels, labels, cases_of(case))
    check_price(foreseen.scores(case.concepts, config))
    foreseen.by_wording(case, config)


def evaluate(case: Case, config: Config) -> list[Score]:
    """UA, IRA and CRA of the forgotten concepts; without concepts, the accuracy of each kind.

    Args:
        case: its images' labels are what their prompts say; each concept is judged on its kind.
        config: which judge, and how.

    Returns:
        Scores in percent, higher is better, with n and Wilson's interval; where the judge knows one
        kind of label, the accuracies of `accuracy_scores` instead; where the prompts tell their
        wording, the scores of `wording_scores` too. The confusions go to the case's extras, that of
        the first concept's kind first, and the judge's word on each image to its judgements.

    Raises:
        ErasureError: an unknown judge, images without labels or with unknown ones, a concept that
            no prompt names.
    """
    seen = judged(judge_of(config), case, config)
    tables, own = seen.confusions(case), case.concepts[0].kind if case.concepts else None
    case.add_extra("confusion", sorted(tables.values(), key=lambda table: table["kind"] != own))
    case.add_judgements("classifier", words_on(case, seen.labels, seen.predictions, seen.shares))
    return seen.scores(case.concepts, config) + seen.by_wording(case, config)


CLASSIFIER = Evaluator("classifier", Config(), evaluate, check, fits=of_canvas)
