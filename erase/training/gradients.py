"""The gradient of a step, from the terms of the loss, and the operations on the values after the
step.

Every option is off at zero, and then leaves the plain step's bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from erase.prompts.errors import ErasureError
from erase.tensors import exact
from erase.training.config import TunedConfig
from erase.training.confine import Restraint
from erase.training.trainable import Trainable

FORGET, RETAIN = "forget", "retain"
Gradients = dict[str, Tensor]
"""name of a trained value -> its gradient"""
Take = Callable[[tuple[str, ...] | None], Gradients]
"""(names of terms; None: all) -> gradient of their sum at the values as they are, averaged over
parts and processes"""
Total = Callable[[Tensor], Tensor]
"""sums a vector over the shards of all processes"""


def step_gradients(
    trainable: Trainable, take: Take, config: TunedConfig, generator: torch.Generator
) -> Gradients:
    """The gradient of one step.

    Without options it is that of the sum of all terms. `sam` and `smoothing` take the forget term's
    gradient beside the values; `combine: surgery` removes from it what conflicts with the retain
    term; `combine: guard` from the sum what conflicts with the forget term; `combine: barrier`
    takes as much of it as forgetting needs.
    """
    if config.combine in ("guard", "barrier"):
        beside = config.sam or config.smoothing
        forget = _beside(trainable, take, config, generator) if beside else take((FORGET,))
        aim, rate = take((RETAIN,)), config.barrier
        if config.combine == "guard":
            aim, rate = _sum(forget, aim), 0.0
        return behind_barrier(forget, aim, rate, trainable.layout.total)
    surgery = config.combine == "surgery"
    if config.sam or config.smoothing:
        retain = take((RETAIN,))
        whole = _sum(_beside(trainable, take, config, generator), retain)
    else:
        whole = take(None)
        retain = take((RETAIN,)) if surgery else {}

    return without_conflict(whole, retain, trainable.layout.total) if surgery else whole


def check_terms(terms: Iterable[str], combine: str) -> None:
    """Refuse to weigh forgetting against retaining where a loss has no such term.

    Raises:
        ErasureError: names the option.
    """
    if combine != "sum" and RETAIN not in terms:
        raise ErasureError(
            f"combine {combine} weighs forgetting against retaining, and the method's loss has no "
            "retain term as it is set; take combine sum, or give that term a weight (alpha) where "
            "the method has one"
        )


def without_conflict(whole: Gradients, retain: Gradients, total: Total) -> Gradients:
    """Gradient surgery (Yu et al. 2020, https://arxiv.org/abs/2001.06782), tensor by tensor.

    Where the forget gradient f = whole - retain points against the retain gradient r (f.r < 0), its
    part along r is removed: whole - (f.r / r.r) r, so that what is left of f is orthogonal to r.
    Elsewhere `whole` stays, bit for bit.

    Args:
        whole: gradient of the sum of all terms, by name.
        retain: gradient of the retain term, by name.
        total: sums a vector over the shards of all processes.
    """
    names = [name for name in whole if name in retain]
    if not names:
        return whole
    dots = total(torch.stack([_dot(whole[name] - retain[name], retain[name]) for name in names]))
    squares = total(torch.stack([_dot(retain[name], retain[name]) for name in names]))

    gradients = dict(whole)
    for name, dot, square in zip(names, dots.tolist(), squares.tolist(), strict=True):
        if dot < 0:
            gradients[name] = whole[name] - (dot / square) * retain[name]
    return gradients


def behind_barrier(forget: Gradients, aim: Gradients, rate: float, total: Total) -> Gradients:
    """The direction nearest to a gradient r along which the forget loss, of gradient f, falls at a
    rate of at least rate f.f.

    argmin_d |d - r|^2 where f.d >= rate f.f, which is r + max(0, rate - f.r / f.f) f. With r of the
    retain term a dynamic barrier (BOME, Ye et al. 2022, https://arxiv.org/abs/2209.08709); with the
    sum's and rate 0 gradient episodic memory (Lopez-Paz and Ranzato 2017,
    https://arxiv.org/abs/1706.08840).

    Args:
        forget: gradient f, by name.
        aim: gradient r; a name that is missing counts as zero.
        rate: at 0 the forget loss does not rise.
        total: sums a vector over the shards of all processes.
    """
    if not forget:
        return aim
    dots = [_dot(forget[name], aim[name]) for name in forget if name in aim]
    squares = [_dot(gradient, gradient) for gradient in forget.values()]
    sums = torch.stack([sum(dots, torch.zeros_like(squares[0])), sum(squares[1:], squares[0])])
    dot, square = total(sums).tolist()

    factor = max(0.0, rate - dot / square) if square else 0.0
    return _sum({name: factor * gradient for name, gradient in forget.items()}, aim)


@torch.no_grad()
def soften(trainable: Trainable, threshold: float, pull: float = 0.0) -> None:
    """The proximal step of threshold * |value - base|_1 + pull / 2 * |value - base|_2^2.

    The first makes smaller changes go back to the base's bits and larger ones shrink: SalUn-soft
    (Fan et al., ICLR 2024) without a mask computed beforehand. The second divides every change by
    1 + pull: L2-SP (Li et al. 2018, https://arxiv.org/abs/1802.01483), whose penalty stands in the
    loss there; as a step of its own an adaptive optimizer does not rescale it.
    """
    if not threshold and not pull:
        return
    for name, value in trainable.values.items():
        base = trainable.base_values(name)
        change = value - base
        if threshold:
            shrunk = value - threshold * change.sign()
            value.copy_(torch.where(change.abs() <= threshold, base, shrunk))
        if pull:
            value.copy_(torch.lerp(base, value, 1 / (1 + pull)))


@torch.no_grad()
def restrain(trainable: Trainable, restraints: Mapping[str, Restraint], lr: float) -> None:
    """Changes of matrices restrained (`erase.training.confine`).

    The change is, not its gradient (as in CUIG, https://arxiv.org/abs/2511.07970), so that it holds
    under any optimizer. Under a mask what this spreads to other weights is dropped, which for a
    null space is one round of alternating projections at each step.

    Args:
        trainable: what is trained.
        restraints: by parameter name; parameters of which nothing is trained count for nothing.
        lr: the step's learning rate.
    """
    for name, restraint in restraints.items():
        if name in trainable.values:
            value, base = trainable.values[name], trainable.base_values(name)
            dense = trainable.dense(name, value - base)
            value.copy_(base + trainable.picked(name, restraint(dense, lr)))


@contextmanager
def moved(trainable: Trainable, by: Mapping[str, Tensor]) -> Iterator[None]:
    """The trained values displaced within the block; afterwards they are restored to the bit."""
    old = {name: trainable.values[name].detach().clone() for name in by}
    try:
        _set(trainable, {name: old[name] + step for name, step in by.items()})
        yield
    finally:
        _set(trainable, old)


@torch.no_grad()
def _set(trainable: Trainable, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        trainable.values[name].copy_(value)
    trainable.put()


def _beside(
    trainable: Trainable, take: Take, config: TunedConfig, generator: torch.Generator
) -> Gradients:
    """The forget term's gradient uphill by `sam` (Foret et al. 2021), or its mean over random
    displacements (`smoothing`)."""
    if config.sam:
        uphill = take((FORGET,))
        norm = _norm(uphill, trainable.layout.total)
        factor = config.sam / norm if norm else 0.0
        with moved(trainable, {name: factor * gradient for name, gradient in uphill.items()}):
            return take((FORGET,))

    mean: Gradients = {}
    for _ in range(config.smoothing_draws):
        with moved(trainable, _noise(trainable, config.smoothing, generator)):
            mean = _sum(mean, take((FORGET,)))
    return {name: gradient / config.smoothing_draws for name, gradient in mean.items()}


def _noise(trainable: Trainable, sigma: float, generator: torch.Generator) -> Gradients:
    """Normal noise of this standard deviation, drawn for the whole of each value and then cut to
    this process's part."""
    noise = {}
    for name, value in trainable.values.items():
        whole = sigma * torch.randn(trainable.whole_shape(name), generator=generator)
        noise[name] = trainable.local_part(name, whole).to(value.device)
    return noise


def _sum(one: Gradients, other: Gradients) -> Gradients:
    """Of two sparse sums: a name that one of them lacks counts as zero there."""
    both = dict(one)
    for name, gradient in other.items():
        both[name] = both[name] + gradient if name in both else gradient
    return both


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (exact(one) * exact(other)).sum()


def _norm(gradients: Gradients, total: Total) -> float:
    squares = [_dot(gradient, gradient) for gradient in gradients.values()]
    return float(total(torch.stack(squares).sum().view(1)).sqrt()) if squares else 0.0
