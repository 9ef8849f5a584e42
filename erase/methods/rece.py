"""RECE: reliable and efficient concept erasure (Gong et al., ECCV 2024,
https://arxiv.org/abs/2407.12383).

UCE leaves text states that the new projections answer as the base answered the concept. They are
found in closed form and erased as well, round by round. For many concepts in seconds; where UA
counts more than the last percent of what is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from erase.methods import Method
from erase.objectives.closed_form import (
    Projections,
    StatesConfig,
    condensed,
    projections,
    ridge_edit,
)
from erase.prompts.errors import check_ranges
from erase.task import Edit, Task
from erase.tensors import exact

PAPER = "https://arxiv.org/abs/2407.12383"


@dataclass
class RECEConfig(StatesConfig):
    """Settings of RECE."""

    rounds: int = 3
    """of finding what still means the concept, and erasing it; 0 is UCE"""
    attack_ridge: float = 0.1
    """lambda of the search: how short the found states are; 0.001 for what is hard to erase"""
    erase_scale: float = 1.0
    """weight of the concept's states, and of those that are found"""
    retain_scale: float = 0.1
    """weight of the retained prompts' states"""
    ridge: float = 0.1
    """weight of staying near the weights of the round before"""

    def __post_init__(self) -> None:
        check_ranges(self, dict.fromkeys(("erase_scale", "retain_scale"), (0, inf)))
        check_ranges(self, dict.fromkeys(("ridge", "attack_ridge"), (1e-12, inf)))
        check_ranges(self, {"rounds": (0, 1000)})


def edit(task: Task, config: RECEConfig) -> Edit:
    """UCE of the concept's states, then of those that still mean it; what was erased
    in earlier rounds stays among what is erased."""
    values: dict[str, Tensor] = {}
    for group in projections(task, config):
        values |= _edited(group, config)
    return Edit(values)


def _edited(group: Projections, config: RECEConfig) -> dict[str, Tensor]:
    base = {name: exact(weight) for name, weight in group.weights.items()}
    scale, keep = config.erase_scale**0.5, config.retain_scale**0.5 * condensed(group.retained)
    values, erased = dict(base), group.concepts
    for round_ in range(config.rounds + 1):
        if round_:
            found = still_meaning(values, base, group.concepts, config.attack_ridge)
            erased = torch.cat([erased, found])
        repeated = group.anchors.repeat(round_ + 1, 1)
        inputs, wanted = torch.cat([scale * erased, keep]), torch.cat([scale * repeated, keep])
        for name, old in base.items():
            values[name] = ridge_edit(values[name], inputs, wanted @ old.T, keep[:0], config.ridge)
    return {name: value.to(group.weights[name]) for name, value in values.items()}


def still_meaning(
    values: Mapping[str, Tensor], base: Mapping[str, Tensor], states: Tensor, ridge: float
) -> Tensor:
    """States that the new projections answer as the old ones answered these.

    c' = argmin sum_i |W_i c' - V_i c|^2 + ridge |c'|^2
       = (ridge I + sum_i W_i^T W_i)^-1 (sum_i W_i^T V_i) c

    Args:
        values: W_i, the new projections by name, shape (out, in).
        base: V_i, the old ones.
        states: c, shape (n, in).
        ridge: above 0.
    """
    gram = ridge * torch.eye(states.shape[1], dtype=states.dtype, device=states.device)
    cross = torch.zeros_like(gram)
    for name, value in values.items():
        gram += value.T @ value
        cross += value.T @ base[name]
    return states @ torch.linalg.solve(gram, cross).T


METHODS = {"rece": Method("rece", PAPER, RECEConfig(), edit)}
