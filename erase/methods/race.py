"""RACE: robust adversarial concept erasure (Kim et al., ECCV 2024,
https://arxiv.org/abs/2405.16341).

ESD, whose text states are moved within a small box to where the concept comes back best, found at a
single timestep. The cheap adversarial training; nothing retains the rest but ESD's scope."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from erase.latents.batches import Rows
from erase.losses import denoising
from erase.methods import Method
from erase.models import Cond
from erase.objectives.negative_guidance import AwayConfig, check_attacked, forget_set, target
from erase.prompts.errors import COUNT, POSITIVE, check_ranges
from erase.task import Edit, Task
from erase.training.batches import PromptedRows, row_batches
from erase.training.config import MOST_STEPS, TrainConfig
from erase.training.fine_tune import fine_tune
from erase.training.trainable import Base

PAPER = "https://arxiv.org/abs/2405.16341"
Batch = tuple[PromptedRows, Tensor | None]
"""forget rows, and where the attack starts, shape (n, tokens, dim); None: no attack yet"""


@dataclass
class RACEConfig(AwayConfig):
    """Settings of RACE."""

    scope: str = "xattn"
    radius: float = 0.1
    """how far the attack may move each value of the text states (epsilon)"""
    attack_steps: int = 10
    """of projected gradient descent, each a quarter of the radius long, in each step of training"""
    attack_from: int = 1000
    """the first step with an attack, below train.steps; those before are ESD's"""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=2000, lr=1e-5, batch_size=1)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"radius": POSITIVE, "attack_steps": COUNT})
        check_ranges(self, {"attack_from": (0, MOST_STEPS)})
        check_attacked(self.attack_from, self.train.steps)


def attack(task: Task, rows: Rows, cond: Cond, start: Tensor, config: RACEConfig) -> Tensor:
    """argmin |eps(x_t, c + delta) - noise|^2 over |delta|_inf <= radius, by steps along the
    gradient's signs."""
    states, delta = cond.embeddings.detach(), start
    for _ in range(config.attack_steps):
        delta = delta.detach().requires_grad_()
        with torch.enable_grad():
            moved = replace(cond, embeddings=states + delta)
            error = denoising(task.model.predict(rows.noisy, rows.t, moved), rows.target)
        (slope,) = torch.autograd.grad(error, delta)
        delta = delta - config.radius / 4 * slope.sign()
        delta = delta.clamp(-config.radius, config.radius)
    return delta.detach()


def edit(task: Task, config: RACEConfig) -> Edit:
    """Minimise |eps(x_t, c + delta) - [eps_0(x_t) - eta (eps_0(x_t, c) - eps_0(x_t))]|^2, delta the
    attack's answer to the model as it is."""
    rows_of = row_batches(task, forget_set(task, config.prompts), config.train.batch_size)
    shape = config.train.batch_size, *task.cond([""]).embeddings.shape[1:]

    def batches(step: int) -> Batch:
        if step < config.attack_from:
            return rows_of(step), None
        start = 2 * torch.rand(shape, generator=task.generator(~step)) - 1
        return rows_of(step), config.radius * start

    def loss(batch: Batch, base: Base) -> dict[str, Tensor]:
        (rows, prompts), start = batch
        wanted = target(task, rows, prompts, base, config.guidance)
        cond = task.cond(prompts)
        if start is not None:
            moved = cond.embeddings + attack(task, rows, cond, start, config)
            cond = replace(cond, embeddings=moved)
        predicted = task.model.predict(rows.noisy, rows.t, cond)
        return {"forget": denoising(predicted, wanted)}

    return fine_tune(task, loss, batches, config)


METHODS = {"race": Method("race", PAPER, RACEConfig(), edit)}
