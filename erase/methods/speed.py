"""SPEED: scalable, precise and efficient concept erasure (Li et al., ICLR 2026,
https://arxiv.org/abs/2503.07392).

A closed form inside the null space of the retained prompts' states: what must stay is not weighed
against what must go, it cannot change. For many concepts beside few retained prompts; where these
fill the space of text states, little room is left, and UCE or training forgets more."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from erase.methods import Method
from erase.models.scopes import TextInput
from erase.objectives.closed_form import Projections, StatesConfig, projections, ridge_edit
from erase.objectives.null_space import confined_edit, held_still
from erase.objectives.text_inputs import prompt_states
from erase.prompts.errors import FRACTION, check_ranges
from erase.task import Edit, Task
from erase.tensors import exact
from erase.training.confine import null_space, second_moment

CENTRES = 3


@dataclass
class SPEEDConfig(StatesConfig):
    """Settings of SPEED."""

    scope: str = r"^unet\..*\battn2\.to_v\b"
    """the projections of text states that are edited: the values"""
    threshold: float = 0.1
    """directions of the retained states are free below this share of their mean square"""
    filter: bool = True
    """retain only the states that an edit without retention would move more than the mean"""
    copies: int = 10
    """perturbed copies of each retained state, along what the projection sees least"""
    ridge: float = 1.0
    """rho: weight of a small change"""

    def __post_init__(self) -> None:
        check_ranges(self, {"threshold": FRACTION, "copies": (0, 1000), "ridge": (1e-12, inf)})


def edit(task: Task, config: SPEEDConfig) -> Edit:
    """For each projection the change D P that is nearest to giving the concept's states t the
    anchor's answers:

    D P = W (sum a t^T - sum t t^T) P [I - M K (K^T P M K)^-1 K^T P] M, M = (sum t t^T P + rho I)^-1

    P: null space of what is retained there; K: states of the empty prompt, which stay exactly. The
    bracket is written as a smaller null space (`held_still`), which is the same and solves well.
    """
    values: dict[str, Tensor] = {}
    for group in projections(task, config):
        still = _empty_prompt(task, group.of)
        for i, (name, weight) in enumerate(group.weights.items()):
            values[name] = _edited(group, weight, still, config, task.generator(i))
    return Edit(values)


def _edited(
    group: Projections, weight: Tensor, still: Tensor, config: SPEEDConfig, random: torch.Generator
) -> Tensor:
    old, kept = exact(weight), exact(group.retained)
    outputs = group.anchors @ old.T
    if config.filter:
        free = ridge_edit(old, group.concepts, outputs, kept[:0], config.ridge)
        influence = (kept @ (free - old).T).norm(dim=1)
        kept = kept[influence >= influence.mean()]
    kept = _augmented(kept, old, config.copies, random)
    projector = held_still(null_space(second_moment(kept), config.threshold), still)
    return confined_edit(weight, group.concepts, outputs, kept[:0], config.ridge, projector)


def _augmented(states: Tensor, weight: Tensor, copies: int, generator: torch.Generator) -> Tensor:
    """The states, and copies moved at random along the right singular vector of the smallest
    singular value."""
    weakest = torch.linalg.svd(weight).Vh[-1]
    far = torch.randn(copies * len(states), 1, generator=generator).to(states)
    return torch.cat([states, states.repeat(copies, 1) + far * weakest])


def _empty_prompt(task: Task, of: TextInput) -> Tensor:
    """The start token's state, and the centres of the others of the empty prompt, shape
    (at most 1 + CENTRES, dim)."""
    (states,), count = prompt_states(task, [""], of)
    start, others = exact(states[:1]), torch.unique(exact(states[1:count]), dim=0)
    if len(others) > CENTRES:
        first = others[torch.linspace(0, len(others) - 1, CENTRES).long()]
        centres, _ = kmeans2(others.cpu().numpy(), first.cpu().numpy(), minit="matrix")
        others = torch.from_numpy(centres).to(others)
    return torch.cat([start, others])


METHODS = {"speed": Method("speed", "https://arxiv.org/abs/2503.07392", SPEEDConfig(), edit)}
