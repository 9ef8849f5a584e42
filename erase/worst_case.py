"""Worst-case forget sets: which m of n prompts are hardest to forget (Fan et al., ECCV 2024,
https://arxiv.org/abs/2403.07362).

  min over w in [0, 1]^n, 1^T w = m   of   sum_i w_i l_i(theta_u(w)) + gamma |w|^2

theta_u(w) is what an erasure of the prompts makes of the model, each in proportion to w_i; l_i is
how far that raised the denoising error on what prompt i showed. Low is hard: erased with weight,
and still known. (The paper has the error itself, by which a prompt whose images are easy to denoise
is hard to forget.) An erasure that is measured on random prompts is measured on easy ones, too:
this is a tool of evaluation, not a method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from erase.attacks.relearning import changed_to
from erase.latents.batches import draw_rows, rows_at
from erase.latents.latent_set import LatentSet, texts_of
from erase.losses import denoising
from erase.methods.esd import ESDConfig
from erase.objectives.negative_guidance import away_loss
from erase.prompts.errors import COUNT, POSITIVE, ErasureError, check_ranges
from erase.task import Edit, Task
from erase.training.batches import PromptedRows
from erase.training.fine_tune import fine_tune

GOLDEN = (math.sqrt(5) - 1) / 2
LEVELS = (0.2, 0.4, 0.6, 0.8)
"""where on the schedule the denoising error is measured, as fractions of the timesteps"""
Losses = Callable[[Tensor], Tensor]
"""weights, shape (n,) -> losses after the erasure that they mean, shape (n,)"""


@dataclass
class WorstCaseConfig:
    """How a worst-case set is searched."""

    budget: int = 2
    """m: prompts of the set"""
    rounds: int = 8
    """of erasing with the present weights and moving them"""
    lr: float = 0.25
    """how far a weight moves in a round for a loss one standard deviation from the mean"""
    ridge: float = 0.0
    """gamma, in the same units: draws the weights together"""

    def __post_init__(self) -> None:
        check_ranges(self, {"budget": COUNT, "rounds": COUNT, "lr": POSITIVE, "ridge": (0, 1e6)})


@dataclass(frozen=True)
class Selection:
    """A worst-case set."""

    chosen: tuple[int, ...]
    """exactly m places of prompts, ascending"""
    weights: tuple[float, ...]
    """the last w"""
    losses: tuple[tuple[float, ...], ...]
    """of each round, each prompt"""


def select(losses: Losses, count: int, config: WorstCaseConfig) -> Selection:
    """The m prompts of largest weight, ties by place, after projected gradient descent from equal
    weights.

    A step moves against l + 2 gamma w, with l in units of its standard deviation over the prompts:
    the mean does not matter, since the weights' sum is fixed.

    Args:
        losses: erases and measures.
        count: n.
        config: budget, rounds, rate.

    Raises:
        ErasureError: a budget of all prompts or more, or losses that are not finite.
    """
    if config.budget >= count:
        raise ErasureError(
            f"a worst-case set of {config.budget} out of {count} prompts is no choice; give more "
            "prompts or a smaller budget"
        )
    weights = torch.full((count,), config.budget / count, dtype=torch.float64)
    told = []
    for turn in range(config.rounds):
        found = losses(weights).double()
        if found.shape != (count,) or not found.isfinite().all():
            raise ErasureError(
                f"the erasure of round {turn} left losses that are not {count} finite numbers; "
                "lower its learning rate"
            )
        told.append(tuple(found.tolist()))
        scaled = (found - found.mean()) / found.std().clamp_min(torch.finfo(torch.float64).tiny)
        step = scaled + 2 * config.ridge * weights
        weights = project(weights - config.lr * step, config.budget)
    ranked = sorted(range(count), key=lambda place: -float(weights[place]))
    return Selection(tuple(sorted(ranked[: config.budget])), tuple(weights.tolist()), tuple(told))


def project(point: Tensor, budget: float) -> Tensor:
    """The nearest w in [0, 1]^n with sum m: clip(point - shift, 0, 1), with the shift at which the
    sum is m, found by bisection to rounding.

    Args:
        point: shape (n,), finite.
        budget: m, from 0 to n.

    Raises:
        ErasureError: no such w, or a point that is not finite.
    """
    values = point.double()
    if not 0 <= budget <= len(values):
        raise ErasureError(f"{len(values)} weights of at most 1 cannot sum to {budget}")
    if not values.isfinite().all():
        raise ErasureError("a point that is not finite has no nearest weights; lower lr")
    low, high = float(values.min()) - 1, float(values.max())
    for _ in range(200):
        shift = (low + high) / 2
        kept = (values - shift).clamp(0, 1)
        low, high = (shift, high) if float(kept.sum()) > budget else (low, shift)
    return kept


@dataclass(frozen=True)
class WeightedESD:
    """Erasures by ESD of prompts in proportion to weights, and what they do to each prompt.

    The rows of the task's forget latents are training and measuring data; those of one prompt have
    the same text.
    """

    task: Task
    config: ESDConfig

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """The prompts, in the order of their first rows."""
        return tuple(dict.fromkeys(self.latents.prompts))

    @property
    def latents(self) -> LatentSet:
        return self.task.forget()

    def edit(self, weights: Tensor | Sequence[float]) -> Edit:
        """theta_u(w): ESD on batches that hold each prompt in proportion to its weight."""
        loss = away_loss(self.task, self.config.guidance)
        return fine_tune(self.task, loss, self._batches(torch.as_tensor(weights)), self.config)

    def losses(self, weights: Tensor) -> Tensor:
        """By how much the erasure raises the denoising error of each prompt, shape (n,); the model
        is left as it was found."""
        base = self._base_errors
        with changed_to(self.task.model, self.edit(weights).values):
            return self._errors() - base

    @cached_property
    def _base_errors(self) -> Tensor:
        return self._errors()

    @torch.no_grad()
    def _errors(self) -> Tensor:
        """Of each prompt, on its rows at a few timesteps, always the same noise."""
        model, found = self.task.model, []
        for prompt in self.prompts:
            own = self._rows_of(prompt)
            generator = self.task.generator(0)
            errors = []
            for level in LEVELS:
                t = int(level * model.timesteps)
                rows = rows_at(model, self.latents, own, t, generator)
                predicted = self.task.predict(rows, [prompt] * len(own))
                errors.append(denoising(predicted, rows.target))
            found.append(torch.stack(errors).mean())
        return torch.stack(found).double().cpu()

    def _rows_of(self, prompt: str) -> Tensor:
        return torch.tensor([row for row, p in enumerate(self.latents.prompts) if p == prompt])

    def _batches(self, weights: Tensor) -> Callable[[int], PromptedRows]:
        """Step -> rows in proportion to their prompts' weights.

        The draws of all steps together are a golden-ratio sequence along the summed weights: after
        k of them each prompt has come k times its share, within a few. Chance would add noise to
        the losses that the weights follow.
        """
        task, size, share = self.task, self.config.train.batch_size, weights.double()
        if share.shape != (len(self.prompts),) or float(share.min()) < 0 or not share.any():
            raise ErasureError(
                f"{len(self.prompts)} prompts take as many weights, none below 0 and not all 0"
            )
        rows = torch.cat([self._rows_of(prompt) for prompt in self.prompts])
        each = torch.tensor([self.latents.prompts.count(prompt) for prompt in self.prompts])
        ends = (share / each).repeat_interleave(each).cumsum(0)

        def batches(step: int) -> PromptedRows:
            places = torch.arange(step * size, (step + 1) * size, dtype=torch.float64)
            points = (0.5 + GOLDEN * places) % 1 * ends[-1]
            drawn = rows[torch.searchsorted(ends, points, right=True).clamp_max(len(rows) - 1)]
            noised = draw_rows(task.model, self.latents, drawn, task.generator(step))
            return noised, texts_of(self.latents.prompts, drawn)

        return batches
