"""EraseDiff (Wu et al., CVPR 2025, https://arxiv.org/abs/2401.05779).

Retaining is the aim and forgetting its constraint: each step goes where the retain loss falls most,
among the directions along which the forget loss falls. For concepts that are near to what must
stay; where there is no conflict it is a plain sum."""

from __future__ import annotations

from dataclasses import dataclass, field

from erase.methods import Method
from erase.objectives.remap import RemapConfig, trained
from erase.task import Edit, Task
from erase.training.config import TrainConfig

PAPER = "https://arxiv.org/abs/2401.05779"


@dataclass
class EraseDiffConfig(RemapConfig):
    """Settings of EraseDiff; scope noxattn is that for nudity, xattn that for classes."""

    scope: str = "noxattn"
    combine: str = "barrier"
    anchor_from: str = "current"
    retain_target: str = "noise"
    anchor_latents: float = 0.0
    retain_dropout: float = 0.0
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=250, lr=1e-5, batch_size=16)
    )


def edit(task: Task, config: EraseDiffConfig) -> Edit:
    """Minimise L_r subject to L_f(theta) - L_f(phi_K(theta)) <= 0, phi_K being theta after K steps
    down L_f, with L_r = |eps(x_t, c_r) - noise|^2, L_f = |eps(x_t, c) - sg eps(x_t, a)|^2.

    To first order phi_K is a constant, and the constraint has the gradient of L_f alone. A step
    goes down grad L_r + lambda grad L_f, lambda = max(0, barrier - <grad L_r, grad L_f> /
    |grad L_f|^2): `combine: barrier`.
    """
    return trained(task, config)


METHODS = {"erasediff": Method("erasediff", PAPER, EraseDiffConfig(), edit)}
