"""Rules: how statistics of gradients become a score for each weight. The highest scores may change.

A rule's score is a function of one tensor's statistics, so that it costs no memory of the model's
size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from erase.mask import Saliency, SaliencyMask
from erase.prompts.errors import ErasureError
from erase.tensors import exact, kth_largest
from erase.training.statistics import Statistics, Values

FLOOR = 0.1
"""of the median of the costs: what is added to each, so that a weight that costs nothing does not
outweigh all others"""
LADDER = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""densities that `find_density` tries"""
ENOUGH = 0.6
"""share of the squared benefit of all weights (`held`) at which a mask is taken to be wide enough;
measured on the embedded world (docs/results/thin_masks.md)"""
WEIGHT = "weight"
"""name of the base values beside the statistics"""
Score = Callable[[Mapping[str, Tensor], float], Tensor]
"""(statistics of one parameter, floor of the cost) -> not negative, the parameter's shape"""


@dataclass(frozen=True)
class Rule:
    """A way to rank weights."""

    needs: tuple[str, ...]
    """statistics"""
    score: Score
    source: str
    cost: str | None = None
    """the statistic that a benefit is divided by"""
    weighs: bool = False
    """whether it looks at the weights"""


def _benefit(statistics: Mapping[str, Tensor], floor: float) -> Tensor:
    """|sum g_objective| / (sqrt(mean g_retain^2) + floor)."""
    return statistics["objective.sum"].abs() / (statistics["retain.square"].sqrt() + floor)


def _fisher_ratio(statistics: Mapping[str, Tensor], floor: float) -> Tensor:
    """sum g_objective^2 / (sum g_retain^2 + floor^2)."""
    return statistics["objective.square"] / (statistics["retain.square"] + floor**2)


def _agreement(statistics: Mapping[str, Tensor], floor: float) -> Tensor:
    """|sum g| / sqrt(sum g^2) of the objective: how far the batches agree on a direction, up to
    sqrt(batches)."""
    return statistics["objective.sum"].abs() / statistics["objective.square"].sqrt().clamp_min(
        torch.finfo(torch.float32).tiny
    )


RULES = {
    "forget": Rule(
        ("forget.sum",),
        lambda statistics, floor: statistics["forget.sum"].abs(),
        "SalUn, Fan et al. 2024, eq. 3",
    ),
    "remap": Rule(
        ("objective.sum",),
        lambda statistics, floor: statistics["objective.sum"].abs(),
        "this toolkit",
    ),
    "benefit": Rule(
        ("objective.sum", "retain.square"), _benefit, "this toolkit", cost="retain.square"
    ),
    "fisher-ratio": Rule(
        ("objective.square", "retain.square"),
        _fisher_ratio,
        "SSD, Foster et al. 2024",
        cost="retain.square",
    ),
    "weight-gradient": Rule(
        ("objective.sum",),
        lambda statistics, floor: (statistics["objective.sum"] * statistics[WEIGHT]).abs(),
        "SelFT, of CUIG",
        weighs=True,
    ),
    "agreement": Rule(("objective.sum", "objective.square"), _agreement, "this toolkit"),
}
"""name -> rule; the first is the paper's, whose gradient is that of the concept's own denoising
error"""


def scores(
    statistics: Statistics, rule: str, weights: Mapping[str, Tensor] | None = None
) -> Saliency:
    """The scores of all weights by one rule.

    Args:
        statistics: at least those that the rule needs.
        rule: a name of `RULES`.
        weights: base values by parameter name; only `weight-gradient` looks at them.

    Raises:
        ErasureError: the statistics lack what the rule needs.
    """
    chosen = RULES[rule]
    absent = [name for name in chosen.needs if name not in statistics.values]
    if absent:
        raise ErasureError(
            f"mask.rule {rule} needs the statistics {' and '.join(absent)}, which are not among "
            f"{', '.join(sorted(statistics.values))}; leave mask.saliency out to compute them"
        )
    needed = {name: statistics.values[name] for name in chosen.needs}
    floor = _floor(needed[chosen.cost]) if chosen.cost else 0.0
    if chosen.weighs:
        if weights is None:
            raise ValueError(f"rule {rule} looks at the weights; give them")
        needed[WEIGHT] = weights

    values = Scores(chosen.score, needed, floor)
    return Saliency(values, {**statistics.metadata, "rule": rule})


def overlap(statistics: Statistics, density: float) -> float | None:
    """How far forgetting and retaining look at the same weights: the intersection over the union of
    the weights with the largest |objective.sum| and of those with the largest retain.square, a
    fraction `density` of all each; None where one of them is not among the statistics.

    Two random choices overlap by density / (2 - density).
    """
    if not {"objective.sum", "retain.square"} <= set(statistics.values):
        return None
    forget = scores(statistics, "remap").cut(density)
    retain = Saliency(statistics.values["retain.square"]).cut(density)

    shared = union = 0
    for name in forget.bits:
        ours, theirs = forget[name], retain[name]
        shared += int((ours & theirs).sum())
        union += int((ours | theirs).sum())
    return shared / union


def held(statistics: Statistics, mask: SaliencyMask) -> float:
    """The share of the squared benefit of all weights that a mask holds, 0 to 1.

    With g the objective's mean gradient and r^2 the mean square of the retain gradients (a diagonal
    Fisher information), the steepest descent of the objective at a given cost to what is retained
    gains sum g^2 / r^2 to first order, which is a sum over weights: this share is what is left of
    it where only those in the mask may move.
    """
    return _share(scores(statistics, "benefit"), mask)


def _share(benefit: Saliency, mask: SaliencyMask) -> float:
    inside = total = 0.0
    for name, score in benefit.values.items():
        gain = exact(score).square()
        total += float(gain.sum())
        inside += float(gain[mask[name]].sum())
    return inside / total


def find_density(statistics: Statistics, allocation: str = "global") -> float:
    """The smallest density of `LADDER` at which the mask of `benefit` holds `ENOUGH`; the largest,
    where none does."""
    benefit = scores(statistics, "benefit")
    for density in LADDER:
        if _share(benefit, benefit.cut(density, allocation)) >= ENOUGH:
            return density
    return LADDER[-1]


class Scores(Mapping[str, Tensor]):
    """Parameter name -> scores, computed whenever they are asked for: they take no memory beside
    the statistics."""

    def __init__(self, score: Score, needed: Mapping[str, Values], floor: float) -> None:
        self._score, self._needed, self._floor = score, needed, floor

    def __getitem__(self, name: str) -> Tensor:
        statistics = {key: values[name].detach().cpu() for key, values in self._needed.items()}
        return self._score(statistics, self._floor)

    def __iter__(self) -> Iterator[str]:
        return iter(next(iter(self._needed.values())))

    def __len__(self) -> int:
        return len(next(iter(self._needed.values())))


def _floor(squares: Mapping[str, Tensor]) -> float:
    """A tenth of the median of sqrt(squares), exact over all weights, in constant memory; where the
    median is zero, that of the weights that cost anything; 1 where none does."""
    every = sum(value.numel() for value in squares.values())
    some = sum(int(value.count_nonzero()) for value in squares.values())
    if not some:
        return 1.0
    median = kth_largest(squares, (every + 1) // 2) or kth_largest(squares, (some + 1) // 2)
    return FLOOR * float(median) ** 0.5
