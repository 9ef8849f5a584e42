"""Closed forms: new values of the projections of text states, without a gradient step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from erase.models.scopes import TextInput, text_input
from erase.objectives.text_inputs import TOKENS, behind_names, retained_states, subject_states
from erase.prompts.errors import ErasureError
from erase.task import Task
from erase.tensors import exact


@dataclass
class StatesConfig:
    """Which states of a concept's prompts a closed form edits, and where."""

    scope: str = "text_in"
    """the projections of text states that are edited"""
    following: bool = True
    """edit the states behind a name as well (other words, the end, padding): it has told them what
    it means; False: the state at its last token alone"""


def ridge_edit(
    weight: Tensor, inputs: Tensor, outputs: Tensor, keep: Tensor, ridge: float
) -> Tensor:
    """The weight that maps inputs to outputs, keeps what it makes of others, and stays near itself.

    argmin_W sum |W c_i - v_i|^2 + sum |W p_j - W_0 p_j|^2 + ridge |W - W_0|^2
           = W_0 + sum (v_i - W_0 c_i) c_i^T (sum c_i c_i^T + sum p_j p_j^T + ridge I)^-1
    (UCE, Gandikota et al. 2024, eq. 7)

    Args:
        weight: W_0, shape (out, in).
        inputs: c, shape (n, in).
        outputs: v, shape (n, out).
        keep: p, shape (m, in), each weighted by its length.
        ridge: above 0, so that there is one answer.

    Returns:
        W, shape (out, in), float64 rounded to the weight's dtype, where the weight is.
    """
    old, c, v, p = map(exact, (weight, inputs, outputs, keep))
    gram = c.T @ c + p.T @ p + ridge * torch.eye(c.shape[1], dtype=c.dtype, device=c.device)
    error = (v - c @ old.T).T @ c
    return (old + torch.linalg.solve(gram, error, left=False)).to(weight)


@dataclass(frozen=True)
class Projections:
    """Matrices that are given the same of the text, and what an erasure says of it."""

    of: TextInput
    weights: Mapping[str, nn.Parameter]
    concepts: Tensor
    anchors: Tensor
    retained: Tensor


def projections(task: Task, config: StatesConfig) -> list[Projections]:
    """The matrices of a scope that read the text, by what they are given of it, each with
    `erasure_states`.

    Raises:
        ErasureError: the scope has others (`text_projections`).
    """
    return [
        Projections(of, weights, *erasure_states(task, config.following, of))
        for of, weights in text_projections(task, config.scope).items()
    ]


def text_projections(task: Task, scope: str) -> dict[TextInput, dict[str, nn.Parameter]]:
    """The matrices of a scope that are applied to text states themselves, or to their norm; by what
    they are given.

    Raises:
        ErasureError: the scope has others: a closed form over text states cannot answer for them.
    """
    groups: dict[TextInput, dict[str, nn.Parameter]] = {}
    for name, weight in task.weights(scope).items():
        of = text_input(name)
        if of is None:
            raise ErasureError(
                f"{name} is not applied to text states, so that no closed form over them can edit "
                "it; use scope text_in"
            )
        groups.setdefault(of, {})[name] = weight
    return groups


def erasure_states(
    task: Task, following: bool = False, of: TextInput = TOKENS
) -> tuple[Tensor, Tensor, Tensor]:
    """States of an erasure: of all names of its concepts and of their anchors (`subject_states`),
    and `retained_states`.

    Args:
        task: its concepts and the model.
        following: also the states behind each name (`following_states`), which weigh together as
            much as the name's own: without, a style that is named in the middle of a prompt stays.
        of: what the matrices are given.

    Returns:
        Of names and anchors, in float64, as few rows as say the same to a closed form
        (`condensed`), in the same order.
    """
    pairs = []
    for concept in task.concepts:
        found = [torch.cat(subject_states(task, concept, of), dim=1)]
        if following:
            for behind in behind_names(task, concept, of):
                found.append(torch.cat(behind, dim=1) * max(len(behind[0]), 1) ** -0.5)
        pairs.append(condensed(torch.cat(found)))
    concepts, anchors = condensed(torch.cat(pairs)).chunk(2, dim=1)
    return concepts, anchors, retained_states(task, of)


def condensed(states: Tensor) -> Tensor:
    """Rows with the same products R^T R as these have, as many as there are columns at most: all
    that a least-squares problem asks of them.

    Args:
        states: shape (n, dim); with a row's wanted inputs behind it, if it has any.

    Returns:
        Shape (min(n, dim), dim), float64; the states themselves where they are no more.
    """
    rows = exact(states)
    return torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows
