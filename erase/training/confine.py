"""Where a weight may change without some prompts noticing: the null space of their text states
(SPEED, Li et al., ICLR 2026; AlphaEdit, Fang et al., ICLR 2025)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from erase.models.scopes import reads_text
from erase.prompts.errors import ErasureError
from erase.prompts.several import earlier_prompts, retained_prompts
from erase.task import Task
from erase.tensors import exact
from erase.training.config import TunedConfig


def null_spaces(
    task: Task, params: Mapping[str, nn.Parameter], config: TunedConfig
) -> dict[str, Tensor]:
    """For each matrix that is applied to text states: where it may change without the retained
    prompts being answered otherwise, or, on top of an earlier erasure, the prompts of its concepts,
    at any of their tokens; each concept counts the same, however many prompts it has.

    Raises:
        ErasureError: no such prompt, or no such matrix.
    """
    prompts = [retained_prompts(task.concepts)]
    if task.earlier:
        prompts = earlier_prompts(task.earlier, task.concepts)
    names = [name for name in params if reads_text(name)]
    if not any(prompts) or not names:
        lacks = "no such prompt" if not any(prompts) else f"no such matrix in scope {config.scope}"
        raise ErasureError(
            "confine holds still what the keys and values of a UNet's cross-attention answer to "
            "retained prompts, or to those of earlier concepts (--after), and there is "
            f"{lacks}; leave it out"
        )
    states = [task.cond(own).embeddings.flatten(0, 1) for own in prompts]
    alike = torch.cat([own / len(own) ** 0.5 for own in states])
    return dict.fromkeys(names, null_space(alike, config.confine))


def null_space(states: Tensor, threshold: float) -> Tensor:
    """The projector P = U_0 U_0^T onto the directions that these states hardly have.

    (W + D P) s is near W s for each of them, whatever D is: |D P s|^2 <= threshold * (the states'
    mean square per direction) * |D|^2 on average. So it confines any change of a projection of text
    states: W_0 + (W - W_0) P.

    Args:
        states: of the prompts that must stay, shape (n, dim).
        threshold: a direction is free where the states' mean square along it is below this share of
            the average over all directions; 0.1 in SPEED, whose states have an average near 1.

    Returns:
        Shape (dim, dim), float64, symmetric, idempotent.

    Raises:
        ErasureError: no direction is free.
    """
    states = exact(states)
    covariance = states.T @ states / len(states)
    squares, directions = torch.linalg.eigh(covariance)
    free = directions[:, squares < threshold * squares.clamp_min(0).mean()]
    if not free.shape[1]:
        raise ErasureError(
            f"the {len(states)} retained text states leave none of {len(covariance)} directions "
            f"free at threshold {threshold:g}; raise it, or retain fewer prompts"
        )
    return free @ free.T
