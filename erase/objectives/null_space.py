"""Edits inside the null space of what must stay (`erase.training.confine`)."""

from __future__ import annotations

import torch
from torch import Tensor

from erase.objectives.closed_form import ridge_edit
from erase.tensors import exact


def held_still(projector: Tensor, states: Tensor) -> Tensor:
    """The projector onto the part of a null space in which these states have nothing at all.

    Args:
        projector: P, shape (dim, dim).
        states: K, as rows, shape (k, dim).
    """
    inside = exact(states) @ projector
    _, lengths, directions = torch.linalg.svd(inside, full_matrices=False)
    # what lies outside the null space asks for nothing
    taken = directions[lengths > 1e-6 * states.norm(dim=1).max()]
    return projector - taken.T @ taken


def confined_edit(
    weight: Tensor, inputs: Tensor, outputs: Tensor, keep: Tensor, ridge: float, projector: Tensor
) -> Tensor:
    """The weight that maps inputs to outputs, changed inside a null space alone.

    argmin_D sum |(W + D P) t_i - v_i|^2 + sum |D P p_j|^2 + ridge |D P|^2, which is
    W + sum (v_i - W t_i) (P t_i)^T (sum P t_i (P t_i)^T + sum P p_j (P p_j)^T + ridge I)^-1

    Args:
        weight: W, shape (out, in).
        inputs: t, shape (n, in).
        outputs: v, shape (n, out).
        keep: p, shape (m, in), each weighted by its length.
        ridge: above 0.
        projector: P, shape (in, in).

    Returns:
        Shape (out, in), in the weight's dtype.
    """
    given, old = exact(inputs), exact(weight).T
    inside = given @ projector
    wanted = exact(outputs) - (given - inside) @ old
    return ridge_edit(weight, inside, wanted, exact(keep) @ projector, ridge)
