"""FreezeAsGuard: learn which tensors of an erased model to freeze, so that fine-tuning brings the
concept back least and learns innocent things most (Huang et al. 2024,
https://arxiv.org/abs/2405.17472).

With m in [0, 1] for each tensor, a user's weights are theta(m) = m theta_0 + (1 - m) theta_user.
Sought is the m that minimises

  U(m) = (-L_target(theta(m)) + L_innocent(theta(m))) / 2,   mean m = rho,

while users go on training under it. Here each user trains on data of their own, and the mean is met
exactly at every m: m = sigmoid((x + shift) / tau), with the one shift that does it, in the place of
a penalty c (rho - mean m)^2 whose weight would have to be found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import inf

import torch
from torch import Tensor, nn

from erase.losses import denoising
from erase.parallel.progress import bar
from erase.prompts.errors import COUNT, POSITIVE, ErasureError, check_names, check_ranges
from erase.task import Task
from erase.tensors import exact
from erase.training.batches import PromptedRows, row_batches
from erase.training.freeze import Freeze
from erase.training.trainable import gradients_on

RULES = ("learned", "random")
BUDGETS = ("parameters", "tensors")
TEMPERATURE = 0.2
"""tau of the paper"""
WIDEST = 1e6
"""of the shift, in units of the scores' root mean square"""
Batches = Callable[[int], PromptedRows]
Scores = dict[str, float]


@dataclass
class FreezeConfig:
    """Which tensors are frozen, and how the choice is learned."""

    rule: str = "learned"
    """learned: by simulated fine-tuning on the concept and on innocent images; random: the control,
    a draw by the seed of the same ratio"""
    ratio: float = 0.5
    """how much is frozen: at most this fraction"""
    of: str = "parameters"
    """what the ratio counts: parameters, or tensors as in the paper, which lets the largest tensors
    count as one each"""
    scope: str = "full"
    """what fine-tuning may change, and the choice is made among: a name as of erase-concept, or a
    pattern"""
    rounds: int = 6
    """how often the mask moves; before each, both users train anew"""
    steps: int = 20
    """of each user's fine-tuning in a round"""
    lr: float = 1e-4
    """rate of their Adam"""
    batch_size: int = 4
    """of their batches"""

    def __post_init__(self) -> None:
        check_names(self, {"rule": RULES, "of": BUDGETS})
        check_ranges(self, {"ratio": (0.001, 0.999), "rounds": COUNT, "steps": (2, inf)})
        check_ranges(self, {"lr": POSITIVE, "batch_size": COUNT})


def find_freeze(task: Task, config: FreezeConfig) -> Freeze:
    """The tensors to freeze; the model is left as it was found.

    Args:
        task: its model is the erased one; its forget latents show the concept, its retain latents
            innocent things.
        config: how much, and how it is chosen.

    Raises:
        ErasureError: a ratio that freezes nothing, or a loss that is not finite.
    """
    params = task.weights(config.scope)
    costs = {name: _cost(param, config.of) for name, param in params.items()}
    if config.rule == "random":
        draw = torch.Generator().manual_seed(task.seed)
        scores = dict(zip(params, torch.rand(len(params), generator=draw).tolist(), strict=True))
    else:
        scores = _Learner(task, config, params, costs).scores()
    frozen = fill(scores, costs, config.ratio)
    if not frozen:
        raise ErasureError(
            f"a ratio of {config.ratio:g} freezes none of the {len(params)} tensors of scope "
            f"{config.scope}; raise it"
        )

    shapes = {name: tuple(params[name].shape) for name in params if name in frozen}
    concepts = [concept.target for concept in task.concepts]
    made = {**asdict(config), "seed": task.seed, "concepts": concepts}
    return Freeze(shapes, task.model.fingerprint, made)


def fill(scores: Mapping[str, float], costs: Mapping[str, int], ratio: float) -> set[str]:
    """Names by falling score, ties in their order, each that still fits into floor(ratio * all
    costs)."""
    room, taken = math.floor(ratio * sum(costs.values())), set()
    for name in sorted(scores, key=lambda name: -scores[name]):
        if costs[name] <= room:
            taken.add(name)
            room -= costs[name]
    return taken


def soft_mask(scores: Mapping[str, float], costs: Mapping[str, int], ratio: float) -> Scores:
    """m = sigmoid((score + shift) / tau), with the shift at which the mean of m, weighted by cost,
    is the ratio; by bisection, to rounding."""
    x = torch.tensor(list(scores.values()), dtype=torch.float64)
    share = torch.tensor([costs[name] for name in scores], dtype=torch.float64)
    share /= share.sum()
    low, high = -WIDEST, WIDEST
    for _ in range(100):
        shift = (low + high) / 2
        m = torch.sigmoid((x + shift) / TEMPERATURE)
        low, high = (shift, high) if float(share @ m) < ratio else (low, shift)
    return dict(zip(scores, m.tolist(), strict=True))


def _cost(param: Tensor, of: str) -> int:
    return param.numel() if of == "parameters" else 1


@dataclass(frozen=True)
class _Learner:
    """The search of one mask."""

    task: Task
    config: FreezeConfig
    params: Mapping[str, nn.Parameter]
    costs: Mapping[str, int]

    def scores(self) -> Scores:
        """What each unit of a tensor's cost gains by its freeze, summed over rounds, in units of
        its root mean square.

        Each round is a step of mirror descent on U under the budget: its direction is the negative
        gradient for each unit of cost.
        """
        sets, total = (self.task.forget(), self.task.retain()), sum(self.costs.values())
        scores = dict.fromkeys(self.params, 0.0)
        users = []
        for place, latents in enumerate(sets):
            size, seed = self.config.batch_size, self.task.seed + place
            users.append(row_batches(self.task, latents, size, seed))
        with bar("freezing", "step", 2 * self.config.rounds * self.config.steps) as progress:
            for turn in range(self.config.rounds):
                mask = soft_mask(scores, self.costs, self.config.ratio)
                target, innocent = (
                    self.slopes(batches, mask, turn * self.config.steps, progress.update)
                    for batches in users
                )
                gains = {
                    name: (target[name] - innocent[name]) / 2 / cost
                    for name, cost in self.costs.items()
                }
                square = sum(self.costs[name] * gain**2 for name, gain in gains.items()) / total
                for name, gain in gains.items():
                    scores[name] += gain / (math.sqrt(square) or 1.0) / self.config.rounds
        return scores

    def slopes(
        self,
        batches: Batches,
        mask: Mapping[str, float],
        first: int,
        tell: Callable[[], object] = lambda: None,
    ) -> Scores:
        """d L / d m of each tensor, mean over the steps of one user's fine-tuning under the mask.

        Since theta(m) = theta_0 + (1 - m) change, it is -<d L / d theta, change>: the very gradient
        that the user's step takes tells it, on a batch that the change has not seen.

        Args:
            batches: the user's.
            mask: m by tensor.
            first: of the batches.
            tell: called after each step.
        """
        base = {name: param.detach().clone() for name, param in self.params.items()}
        changes = {name: nn.Parameter(torch.zeros_like(value)) for name, value in base.items()}
        adam, steps = torch.optim.Adam(changes.values(), lr=self.config.lr), self.config.steps
        sums = {name: torch.zeros(()) for name in base}
        with gradients_on(self.params), _restored(self.params, base):
            for step in range(first, first + steps):
                gradients = self._gradients(batches(step))
                for name, gradient in gradients.items():
                    sums[name] = sums[name] - exact(gradient * changes[name]).sum()
                    changes[name].grad = (1 - mask[name]) * gradient
                adam.step()
                self._put(base, changes, mask)
                tell()
        return {name: float(found) / steps for name, found in sums.items()}

    def _gradients(self, batch: PromptedRows) -> dict[str, Tensor]:
        rows, prompts = batch
        loss = denoising(self.task.predict(rows, prompts), rows.target)
        if not loss.isfinite():
            raise ErasureError(
                f"the loss of a simulated user is {loss.item()}; lower lr ({self.config.lr:g})"
            )
        values = list(self.params.values())
        found = torch.autograd.grad(loss, values, allow_unused=True, materialize_grads=True)
        return dict(zip(self.params, found, strict=True))

    @torch.no_grad()
    def _put(
        self, base: Mapping[str, Tensor], changes: Mapping[str, Tensor], mask: Mapping[str, float]
    ) -> None:
        for name, param in self.params.items():
            param.copy_(base[name] + (1 - mask[name]) * changes[name])


@contextmanager
def _restored(params: Mapping[str, nn.Parameter], base: Mapping[str, Tensor]) -> Iterator[None]:
    """After the block, whatever happened there, these values again."""
    try:
        yield
    finally:
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(base[name])
