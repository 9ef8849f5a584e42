"""What some prompts notice of a change of the matrices that are given text states: by these states
it is confined to where they notice nothing (`confine`), or drawn back as far as they notice
(`prox_text`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from erase.models.scopes import TextInput, text_input
from erase.models.text_states import encoded_together, given_tokens
from erase.parallel.processes import progress
from erase.prompts.errors import ErasureError
from erase.prompts.several import earlier_prompts, retained_prompts
from erase.task import Task
from erase.tensors import exact
from erase.training.config import TunedConfig

Restraint = Callable[[Tensor, float], Tensor]
"""(change of a matrix, shape (out, in); learning rate) -> what a step leaves of it"""
AT_ONCE = 8
"""prompts that are encoded together: a T5 of 512 places wants 0.5 GB for their attention"""


def restraints(
    task: Task, params: Mapping[str, nn.Parameter], config: TunedConfig
) -> dict[str, Restraint]:
    """For each matrix that is applied to text states what `confine` or `prox_text` does to its
    change after each step; nothing where both are off.

    Raises:
        ErasureError: no prompt to hold, or no such matrix.
    """
    if config.confine:
        spaces = null_spaces(task, params, config)
        return {name: partial(confined, space) for name, space in spaces.items()}
    if not config.prox_text:
        return {}
    earlier = earlier_prompts(task.earlier, task.concepts)
    prompts = [own for own in (retained_prompts(task.concepts), *earlier) if own]
    matrices = held_matrices(params, config)
    moments = _moments(task, prompts, config, matrices)
    spectra = {of: spectrum(moment) for of, moment in moments.items()}
    return {
        name: partial(drawn_back, *spectra[of], config.prox_text) for name, of in matrices.items()
    }


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
    matrices = held_matrices(params, config)
    moments = _moments(task, prompts, config, matrices)
    spaces = {of: null_space(moment, config.confine) for of, moment in moments.items()}
    return {name: spaces[of] for name, of in matrices.items()}


def held_matrices(params: Mapping[str, nn.Parameter], config: TunedConfig) -> dict[str, TextInput]:
    """The matrices that `confine` or `prox_text` holds, by name, and what they are given.

    Raises:
        ErasureError: there are none.
    """
    inputs = ((name, text_input(name)) for name in params)
    found = {name: of for name, of in inputs if of}
    if not found:
        raise ErasureError(
            f"{config.holding} holds what matrices answer that are given the text states "
            "themselves (the keys and values of a UNet's cross-attention, the first matrices of a "
            f"flow transformer), and there are none in scope {config.scope}; take text_in or full, "
            f"or {config.holding} 0"
        )
    return found


def check_held_prompts(prompts: Sequence[object], config: TunedConfig) -> None:
    """Refuse `confine` or `prox_text`, one of which is on, where there is no prompt to hold.

    Args:
        prompts: texts, or lists of them.
        config: says which of the two.

    Raises:
        ErasureError: there is none.
    """
    if not any(prompts):
        raise ErasureError(
            f"{config.holding} holds what retained prompts are answered, or those of earlier "
            "concepts (--after), and there are none; give the concept some, or leave "
            f"{config.holding} out"
        )


def _moments(
    task: Task,
    prompts: Sequence[tuple[str, ...]],
    config: TunedConfig,
    matrices: Mapping[str, TextInput],
) -> dict[TextInput, Tensor]:
    """Second moments of what the matrices are given of all tokens, up to a factor; each list counts
    the same. Prompts are encoded many at a time, and no state of theirs is kept."""
    check_held_prompts(prompts, config)
    found: dict[TextInput, Tensor] = {}
    with progress("text that stays", "prompt", sum(map(len, prompts))) as progress_bar:
        for own in prompts:
            for start in range(0, len(own), AT_ONCE):
                part = own[start : start + AT_ONCE]
                cond = encoded_together(task.model, part)
                for of in dict.fromkeys(matrices.values()):
                    rows = given_tokens(task.model, cond, of)
                    found[of] = found.get(of, 0) + second_moment(rows) * (len(rows) / len(own))
                progress_bar.update(len(part))
    return found


def second_moment(states: Tensor) -> Tensor:
    """The mean outer product of text states, shape (n, dim): shape (dim, dim), float64."""
    states = exact(states)
    return states.T @ states / len(states)


def spectrum(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The directions of text states, and their mean squares along each, as shares of the average
    over all directions.

    Args:
        moment: the states' second moment, or a multiple of it, shape (dim, dim).

    Returns:
        Shapes (dim,), ascending, and (dim, dim), a direction in each column; float64.
    """
    squares, directions = torch.linalg.eigh(moment)
    squares = squares.clamp_min(0)
    return squares / squares.mean(), directions


def drawn_back(
    squares: Tensor, directions: Tensor, weight: float, change: Tensor, lr: float
) -> Tensor:
    """A proximal step on the mean square of what the change makes of text states.

    argmin_X |X - D|^2 / 2 + lr weight tr(X C X^T) / 2 = D (I + lr weight C)^-1, where C is the
    states' second moment, of average eigenvalue 1: UCE's term of what is retained (Gandikota et
    al. 2024, eq. 7), under any optimizer.

    Args:
        squares: eigenvalues of C.
        directions: its eigenvectors.
        weight: of the mean square.
        change: D, shape (out, in).
        lr: the step's learning rate.
    """
    along = change @ directions.to(change)
    return along / (1 + lr * weight * squares.to(change)) @ directions.to(change).T


def confined(projector: Tensor, change: Tensor, lr: float) -> Tensor:
    """The part of a change that lies in a null space, D P.

    Args:
        projector: P, shape (in, in).
        change: D, shape (out, in).
        lr: the step's learning rate, whatever it is.
    """
    return change @ projector.to(change)


def null_space(moment: Tensor, threshold: float) -> Tensor:
    """The projector P = U_0 U_0^T onto the directions that these states hardly have (SPEED, Li et
    al., ICLR 2026; AlphaEdit, Fang et al., ICLR 2025).

    (W + D P) s is near W s for each of them, whatever D is: |D P s|^2 <= threshold * (the states'
    mean square per direction) * |D|^2 on average. So it confines any change of a projection of text
    states: W_0 + (W - W_0) P.

    Args:
        moment: the second moment of the states of the prompts that must stay, or a multiple of it,
            shape (dim, dim).
        threshold: a direction is free where the states' mean square along it is below this share of
            the average over all directions; 0.1 in SPEED, whose states have an average near 1.

    Returns:
        Shape (dim, dim), float64, symmetric, idempotent.

    Raises:
        ErasureError: no direction is free.
    """
    squares, directions = spectrum(moment)
    free = directions[:, squares < threshold]
    if not free.shape[1]:
        raise ErasureError(
            f"the retained text states leave none of {len(squares)} directions "
            f"free at threshold {threshold:g}; raise it, or retain fewer prompts"
        )
    return free @ free.T
