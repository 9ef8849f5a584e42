"""SSD: selective synaptic dampening (Foster et al., AAAI 2024, https://arxiv.org/abs/2308.07707).

Weights that matter much more to the concept than to what is retained shrink. No step is taken: for
a quick look, or as a start for others; a concept that is spread over the weights survives it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from erase.methods import Method
from erase.objectives.importance import importance
from erase.prompts.errors import COUNT, check_ranges
from erase.task import Edit, Task

PAPER = "https://arxiv.org/abs/2308.07707"
FORGET, RETAIN = "objective.square", "retain.square"


@dataclass
class SSDConfig:
    """Settings of SSD."""

    scope: str = "full"
    """where weights may shrink"""
    alpha: float = 10.0
    """a weight shrinks where it matters so many times more to the concept"""
    dampening: float = 1.0
    """lambda: it shrinks to this times the ratio of what it matters to the others"""
    samples: int = 96
    """latents of each kind, each with a gradient of its own"""

    def __post_init__(self) -> None:
        check_ranges(self, {"alpha": (0, 1e6), "dampening": (0, 1e6), "samples": COUNT})


def dampened(
    weight: Tensor, forget: Tensor, retain: Tensor, alpha: float, dampening: float
) -> Tensor:
    """w min(1, lambda I_r / I_f) where I_f > alpha I_r, else w.

    Args:
        weight: w.
        forget: I_f, the mean squared gradient on the concept, or its sum.
        retain: I_r, likewise, over as many latents.
        alpha: of the selection.
        dampening: lambda.
    """
    factor = (dampening * retain / forget).clamp_max(1)
    return torch.where(forget > alpha * retain, weight * factor, weight)


def edit(task: Task, config: SSDConfig) -> Edit:
    """Dampen each weight by its two importances, diagonals of the Fisher information."""
    weights = task.weights(config.scope)
    found = importance(task, config.scope, (FORGET, RETAIN), config.samples, 1).values
    values = {}
    for name, weight in weights.items():
        forget, retain = (found[kind][name].to(weight.device) for kind in (FORGET, RETAIN))
        values[name] = dampened(weight.detach(), forget, retain, config.alpha, config.dampening)
    return Edit(values)


METHODS = {"ssd": Method("ssd", PAPER, SSDConfig(), edit)}
