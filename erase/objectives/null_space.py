"""The null space of what must stay: directions of text states in which a weight may change without
retained prompts noticing (SPEED, Li et al., ICLR 2026; AlphaEdit, Fang et al., ICLR 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

from erase.objectives.closed_form import ridge_edit
from erase.prompts.errors import ErasureError


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
    states = states.detach().double()
    covariance = states.T @ states / len(states)
    squares, directions = torch.linalg.eigh(covariance)
    free = directions[:, squares < threshold * squares.clamp_min(0).mean()]
    if not free.shape[1]:
        raise ErasureError(
            f"the {len(states)} retained text states leave none of {len(covariance)} directions "
            f"free at threshold {threshold:g}; raise it, or retain fewer prompts"
        )
    return free @ free.T


def held_still(projector: Tensor, states: Tensor) -> Tensor:
    """The projector onto the part of a null space in which these states have nothing at all.

    Args:
        projector: P, shape (dim, dim).
        states: K, as rows, shape (k, dim).
    """
    inside = states.detach().double() @ projector
    _, lengths, directions = torch.linalg.svd(inside, full_matrices=False)
    # what lies outside the null space asks for nothing
    taken = directions[lengths > 1e-6 * states.norm(dim=1).max()]
    return projector - taken.T @ taken


def confined_edit(
    weight: Tensor, inputs: Tensor, outputs: Tensor, projector: Tensor, ridge: float
) -> Tensor:
    """The weight that maps inputs to outputs, changed inside a null space alone.

    argmin_D sum |(W + D P) t_i - v_i|^2 + ridge |D P|^2, which is
    W + sum (v_i - W t_i) (P t_i)^T (sum P t_i (P t_i)^T + ridge I)^-1

    Args:
        weight: W, shape (out, in).
        inputs: t, shape (n, in).
        outputs: v, shape (n, out).
        projector: P, shape (in, in).
        ridge: above 0.

    Returns:
        Shape (out, in), in the weight's dtype.
    """
    inside = inputs.double() @ projector
    old = weight.detach().double().T
    wanted = outputs.double() - (inputs.double() - inside) @ old
    return ridge_edit(weight, inside, wanted, inside[:0], ridge)
