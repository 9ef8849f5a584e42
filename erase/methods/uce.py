"""UCE: unified concept editing (Gandikota et al., WACV 2024, https://arxiv.org/abs/2308.14761).

In closed form, in seconds, without images; a free pseudo-token undoes it, so train where it may."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from erase.methods import Method
from erase.objectives.closed_form import StatesConfig, condensed, projections, ridge_edit
from erase.prompts.errors import check_ranges
from erase.task import Edit, Task
from erase.tensors import exact


@dataclass
class UCEConfig(StatesConfig):
    """Settings of UCE."""

    erase_scale: float = 1.0
    """weight of the concept's states"""
    retain_scale: float = 1.0
    """weight of the retained prompts' states"""
    ridge: float = 0.5
    """weight of staying near the base (the paper's lambda)"""

    def __post_init__(self) -> None:
        check_ranges(self, dict.fromkeys(("erase_scale", "retain_scale"), (0, inf)))
        check_ranges(self, {"ridge": (1e-12, inf)})


def edit(task: Task, config: UCEConfig) -> Edit:
    """Solve for each projection (eq. 7)."""
    scale, values = config.erase_scale**0.5, {}
    for group in projections(task, config):
        keep = config.retain_scale**0.5 * condensed(group.retained)
        for name, weight in group.weights.items():
            outputs = scale * group.anchors @ exact(weight).T
            values[name] = ridge_edit(weight, scale * group.concepts, outputs, keep, config.ridge)
    return Edit(values)


METHODS = {"uce": Method("uce", "https://arxiv.org/abs/2308.14761", UCEConfig(), edit)}
