"""The arithmetic of forgetting: predictions, labels and targets -> UA, IRA, CRA and confusion
counts. No images, no models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Tally:
    """Judgements, and how many of them count."""

    hits: int
    n: int
    outcomes: tuple[tuple[int, bool], ...] = field(default=(), repr=False, compare=False)
    """place of the image among all, and whether the judgement counts; in the order of the images"""


def _tally(*judgements: tuple[np.ndarray, np.ndarray]) -> Tally:
    """Of masks over the images: which were judged, and, of those, which count."""
    places = np.concatenate([np.flatnonzero(judged) for judged, _ in judgements])
    counts = np.concatenate([hits for _, hits in judgements])
    order = np.argsort(places, kind="stable")
    outcomes = zip(places[order].tolist(), counts[order].tolist(), strict=True)
    return Tally(int(counts.sum()), counts.size, tuple(outcomes))


def forgetting(
    predictions: Mapping[str, Sequence[str]],
    labels: Mapping[str, Sequence[str]],
    targets: Sequence[tuple[str, str]],
    cra_with_target: bool = False,
) -> dict[str, Tally]:
    """UA, IRA and CRA of UnlearnCanvas (Zhang et al. 2024, section 4), for one forgotten concept or
    several.

    - UA: of the images whose prompt names a target, those not classified as it.
    - IRA: of the images whose prompt names no target, those classified right, on the kinds that
    hold a target.
    - CRA: the same on the other kinds, averaged over them. Where every kind holds a target, it is
    taken over all of them.

    An image that names two targets is judged once for each. CRA is absent where there is one kind
    only.

    Args:
        predictions: kind -> predicted name of each image, n per kind.
        labels: kind -> name in each image's prompt, n per kind, same kinds and order.
        targets: (kind, name) of each forgotten concept, at least one.
        cra_with_target: take CRA over the images that name a target too, as UnlearnCanvas's
            `accuracy.py` does (its README does not).

    Returns:
        "UA", "IRA", "CRA" -> hits and n; n counts judgements, so CRA's is images x kinds. n may be
        0.
    """
    truth = {kind: np.asarray(values) for kind, values in labels.items()}
    guess = {kind: np.asarray(predictions[kind]) for kind in truth}
    named = {target: truth[target[0]] == target[1] for target in targets}
    retained = ~np.logical_or.reduce(list(named.values()))
    erased_kinds = {kind for kind, _ in targets}
    own = [kind for kind in truth if kind in erased_kinds]
    others = [kind for kind in truth if kind not in own] or own
    right = {kind: guess[kind] == truth[kind] for kind in truth}
    scores = {
        "UA": _tally(
            *((where, guess[kind][where] != name) for (kind, name), where in named.items())
        ),
        "IRA": _tally(*((retained, right[kind][retained]) for kind in own)),
    }
    if len(truth) > 1:
        where = np.ones_like(retained) if cra_with_target else retained
        scores["CRA"] = _tally(*((where, right[kind][where]) for kind in others))
    return scores


def accuracies(
    predictions: Mapping[str, Sequence[str]], labels: Mapping[str, Sequence[str]]
) -> dict[str, Tally]:
    """kind -> images classified right."""
    tallies = {}
    for kind in labels:
        right = np.asarray(predictions[kind]) == np.asarray(labels[kind])
        tallies[kind] = _tally((np.ones_like(right), right))
    return tallies


def confusion(predicted: Sequence[str], labels: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Counts of one kind: [i, j] is how many images labelled names[i] were predicted to be
    names[j]; int64, (names, names)."""
    index = {name: i for i, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(counts, ([index[name] for name in labels], [index[name] for name in predicted]), 1)
    return counts
