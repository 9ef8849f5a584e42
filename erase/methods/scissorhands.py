"""Scissorhands (Wu and Harandi, ECCV 2024, https://arxiv.org/abs/2401.06187).

The connections that the concept needs most are cut: their weights are drawn anew. Then training
repairs what else they did, and must not bring the concept back. Thorough, and dear to retention
where the cut is wide."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from erase.methods import Method
from erase.objectives.importance import importance
from erase.objectives.remap import Remap, RemapConfig
from erase.prompts.errors import COUNT, ErasureError, check_ranges
from erase.task import Edit, Task
from erase.training.config import TrainConfig
from erase.training.fine_tune import fine_tune
from erase.training.rules import scores

PAPER = "https://arxiv.org/abs/2401.06187"


@dataclass
class ScissorhandsConfig(RemapConfig):
    """Settings of Scissorhands."""

    scope: str = "xattn"
    cut: float = 0.005
    """fraction of the scope's weights that are drawn anew"""
    cut_batches: int = 12
    """batches of forget latents that rank them"""
    alpha: float = 10.0
    """weight of the retain loss (the paper weighs the forget loss by 0.1 instead)"""
    anchor_from: str = "current"
    retain_target: str = "noise"
    anchor_latents: float = 0.0
    retain_dropout: float = 0.0
    combine: str = "guard"
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=500, lr=1e-5, batch_size=8)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"cut": (1e-9, 1), "cut_batches": COUNT})


def trimmed(task: Task, config: ScissorhandsConfig) -> dict[str, Tensor]:
    """The scope's weights, of which the fraction `cut` with the largest |w sum g| is drawn anew, g
    the gradient of the concept's denoising error (SNIP, Lee et al. 2019).

    They are drawn from the normal distribution with the mean and the standard deviation that the
    weights of their tensor have.
    """
    weights, generator = task.weights(config.scope), torch.Generator().manual_seed(task.seed)
    size = config.train.batch_size
    found = importance(task, config.scope, ("objective.sum",), config.cut_batches, size)
    chosen = scores(found, "weight-gradient", weights).cut(config.cut)
    values = {}
    for name, weight in weights.items():
        old = weight.detach()
        drawn = torch.randn(old.shape, generator=generator).to(old)
        drawn = old.mean() + (old.std() if old.numel() > 1 else 0) * drawn
        values[name] = torch.where(chosen[name].to(old.device), drawn, old)
    return values


def edit(task: Task, config: ScissorhandsConfig) -> Edit:
    """Cut; then go down L_f + alpha L_r, from whose gradient is removed what would make L_f rise:
    L_r = |eps(x_t, c_r) - noise|^2, L_f = |eps(x_t, c) - sg eps(x_t, a)|^2.

    A mask keeps its weights from the cut as well.
    """
    count = sum(weight.numel() for weight in task.weights(config.scope).values())
    if config.cut * count < 1:
        raise ErasureError(
            f"cut {config.cut:g} of {count} weights draws none anew; use a larger cut or a wider "
            "scope"
        )
    remap = Remap(task, config)
    start = trimmed(task, config)
    return fine_tune(task, remap.loss, remap.batches, config, start=start)


METHODS = {"scissorhands": Method("scissorhands", PAPER, ScissorhandsConfig(), edit)}
