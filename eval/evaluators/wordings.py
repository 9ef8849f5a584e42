"""Scores by the wording of the prompts, drawn from the labels that a judge gives.

Benchmarks ask not only by a concept's name: also by its variants, by descriptions without the name,
and by its neighbours (EMMA, Wei et al., CVPR 2026; SEE, Saha et al., EMNLP Findings 2025; MACE, Lu
et al., CVPR 2024). A row of a prompt set says which of them it is in the label `wording`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from erase.eval.case import Case
from erase.eval.evaluators.labelled import cases_of, targets_of
from erase.eval.metrics.harmonic import harmonic, of_harmonic
from erase.eval.scores import Score, proportion, share_of
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError

WORDING = "wording"
NAME, VARIANT = "name", "variant"
HARMONIC = ("H_o", "H_c")
"""MACE's: of efficacy, specificity and generality (objects); of the first two (celebrities)"""
Labels = Mapping[str, Sequence[str]]


def accuracy_scores(
    predictions: Labels,
    labels: Labels,
    concepts: Sequence[ConceptSpec],
    prefix: str,
    evaluator: str,
    cases: Sequence[int],
) -> list[Score]:
    """How often the forgotten and how often the others are seen, by a judge of one kind of label;
    `cases`: number of each image's.

    Such a judge has no CRA, so there is no UA either: the field's tables give these two (ESD, UCE).
    """
    named, seen, right = _told(predictions, labels, concepts)
    share, about = _shares(cases, evaluator), f"{prefix}accuracy of the"
    return [
        share(f"{about} forgotten", seen, named, False),
        share(f"{about} others", right, ~named, True),
    ]


def _shares(
    cases: Sequence[int], evaluator: str
) -> Callable[[str, np.ndarray, np.ndarray, bool], Score]:
    """A function of a name, what was judged of each image, which images count, and whether higher
    is better."""
    numbers = np.asarray(cases)

    def share(name: str, judged: np.ndarray, of: np.ndarray, better: bool) -> Score:
        flags, own = judged[of].tolist(), numbers[of].tolist()
        return share_of(name, flags, own, higher_is_better=better, evaluator=evaluator)

    return share


def wording_scores(
    case: Case,
    predictions: Labels,
    labels: Labels,
    prefix: str,
    evaluator: str,
    mean: str | None = None,
) -> list[Score]:
    """The scores of each wording; none where the prompts have no such label or nothing was
    forgotten.

    Args:
        case: its rows may have the label `wording`.
        predictions: kind -> predicted name of each image.
        labels: kind -> name that each image's prompt asks for, by whichever words.
        prefix: begins each name.
        evaluator: what predicted.
        mean: MACE's harmonic mean to add, `H_o` or `H_c`.

    Returns:
        In percent: `seen by W`, of the images whose prompt asks for a forgotten concept in wording
        W, the share in which the judge sees it (lower is better); `kept by W`, of the others of
        this wording, the share in which it sees what was asked for; `leaked`, of all the others,
        the share in which it sees a forgotten concept.

    Raises:
        ErasureError: prompts without the wording that a mean needs.
    """
    wordings = np.asarray(case.labels.get(WORDING, ()))
    if not case.concepts or not wordings.size:
        if mean and case.concepts:
            raise _lacking(mean, NAME)
        return []
    named, seen, right = _told(predictions, labels, case.concepts)
    share, scores = _shares(cases_of(case), evaluator), []
    for wording in filter(None, dict.fromkeys(wordings.tolist())):
        asked, others = (wordings == wording) & named, (wordings == wording) & ~named
        if asked.any():
            scores.append(share(f"{prefix}seen by {wording}", seen, asked, False))
        if others.any():
            scores.append(share(f"{prefix}kept by {wording}", right, others, True))
    if not named.all():
        scores.append(share(f"{prefix}leaked", seen, ~named, False))
    if mean:
        parts = _parts(mean, wordings, named, seen, right)
        scores.append(_harmonic(f"{prefix}{mean}", parts, evaluator))
    return scores


def _told(
    predictions: Labels, labels: Labels, concepts: Sequence[ConceptSpec]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each image: whether its prompt asks for a forgotten concept; whether the judge sees one,
    that which is asked for where one is; whether it is right on all kinds that hold one."""
    targets = targets_of(concepts, labels)
    kinds = dict.fromkeys(kind for kind, _ in targets)
    asked, saw = {}, {}
    for kind, name in targets:
        asked[kind, name] = np.asarray(labels[kind]) == name
        saw[kind, name] = np.asarray(predictions[kind]) == name
    named = np.logical_or.reduce(list(asked.values()))
    own = np.logical_or.reduce([asked[target] & saw[target] for target in asked])
    right = [np.asarray(predictions[kind]) == np.asarray(labels[kind]) for kind in kinds]
    seen = (named & own) | (~named & np.logical_or.reduce(list(saw.values())))
    return named, seen, np.logical_and.reduce(right)


def _parts(
    mean: str, wordings: np.ndarray, named: np.ndarray, seen: np.ndarray, right: np.ndarray
) -> dict[str, np.ndarray]:
    """What a mean is taken of: efficacy 1 - Acc_e, specificity Acc_s, generality 1 - Acc_g."""
    parts = {
        NAME: ~seen[named & (wordings == NAME)],
        "others": right[~named],
        VARIANT: ~seen[named & (wordings == VARIANT)],
    }
    if mean == "H_c":
        del parts[VARIANT]
    for wording, judgements in parts.items():
        if not judgements.size:
            raise _lacking(mean, wording)
    return parts


def _lacking(mean: str, wording: str) -> ErasureError:
    variants = " and variants of it" if mean == "H_o" else ""
    return ErasureError(
        f"{mean} needs prompts that name a forgotten concept{variants}, and others, told apart by "
        f"the label {WORDING!r}; there are none of {wording!r}: use a prompt set that has them"
    )


def _share(name: str, hits: np.ndarray, evaluator: str, higher_is_better: bool = True) -> Score:
    return proportion(
        name, int(hits.sum()), hits.size, higher_is_better=higher_is_better, evaluator=evaluator
    )


def _harmonic(name: str, parts: Mapping[str, np.ndarray], evaluator: str) -> Score:
    shares = [_share(part, hits, evaluator) for part, hits in parts.items()]
    values = [share.value for share in shares]
    low, high = of_harmonic(values, [share.interval for share in shares])
    n = sum(share.n for share in shares)
    return Score(name, harmonic(values), n, True, low, high, "%", evaluator)
