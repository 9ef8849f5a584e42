"""Closed forms: new values of the projections of text states, without a gradient step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from erase.models import DiffusionModel
from erase.models.scopes import reads_text
from erase.prompts.concepts import ConceptSpec, retained_prompts
from erase.prompts.errors import ErasureError
from erase.task import Task


@dataclass
class StatesConfig:
    """Which states of a concept's prompts a closed form edits, and where."""

    scope: str = "xattn_kv"
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
        W, shape (out, in), float64 rounded to the weight's dtype.
    """
    old, c, v, p = (tensor.detach().double() for tensor in (weight, inputs, outputs, keep))
    gram = c.T @ c + p.T @ p + ridge * torch.eye(c.shape[1], dtype=c.dtype, device=c.device)
    error = (v - c @ old.T).T @ c
    return (old + torch.linalg.solve(gram, error, left=False)).to(weight.dtype)


def text_projections(task: Task, scope: str) -> dict[str, nn.Parameter]:
    """The matrices of a scope that are applied to text states themselves.

    Raises:
        ErasureError: the scope has others: a closed form over text states cannot answer for them.
    """
    projections = task.weights(scope)
    if others := [name for name in projections if not reads_text(name)]:
        raise ErasureError(
            f"{others[0]} is not applied to text states, so that no closed form over them can edit "
            "it; use scope xattn_kv of a UNet"
        )
    return projections


def subject_states(task: Task, concept: ConceptSpec) -> tuple[Tensor, Tensor]:
    """Text states at the last token of each name of a concept, and at that of its anchor, in each
    of its templates.

    Returns:
        Both of shape (names * templates, dim), in the same order.
    """
    filled = [(template, name) for template in concept.templates for name in concept.names]
    anchors = [(template, concept.anchor) for template, _ in filled]
    return _at_name(task, filled), _at_name(task, anchors)


def following_states(task: Task, concept: ConceptSpec) -> tuple[Tensor, Tensor]:
    """Text states behind each name of a concept (other words, the end, padding), and behind its
    anchor in the same prompt: to them the name has told what it means (MACE, Lu et al. 2024).

    Returns:
        Both of shape (states, dim), in the same order.
    """
    behind, anchors = zip(*_behind_names(task, concept), strict=True)
    return torch.cat(behind), torch.cat(anchors)


def erasure_states(task: Task, following: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """States of an erasure: of all names of its concepts and of their anchors (`subject_states`),
    and `retained_states`.

    Args:
        task: its concepts and the model.
        following: also the states behind each name (`following_states`), which weigh together as
            much as the name's own: without, a style that is named in the middle of a prompt stays.

    Returns:
        Of names and anchors, in float64, as few rows as say the same to a closed form
        (`condensed`), in the same order.
    """
    pairs = []
    for concept in task.concepts:
        found = [torch.cat(subject_states(task, concept), dim=1)]
        if following:
            for behind in _behind_names(task, concept):
                found.append(torch.cat(behind, dim=1) * max(len(behind[0]), 1) ** -0.5)
        pairs.append(condensed(torch.cat(found)))
    concepts, anchors = condensed(torch.cat(pairs)).chunk(2, dim=1)
    return concepts, anchors, retained_states(task)


def retained_states(task: Task) -> Tensor:
    """States of the retained prompts and of those of earlier concepts (`seen_states`)."""
    return seen_states(task, retained_prompts(task.concepts, task.earlier))


def condensed(states: Tensor) -> Tensor:
    """Rows with the same products R^T R as these have, as many as there are columns at most: all
    that a least-squares problem asks of them.

    Args:
        states: shape (n, dim); with a row's wanted inputs behind it, if it has any.

    Returns:
        Shape (min(n, dim), dim), float64; the states themselves where they are no more.
    """
    rows = states.double()
    return torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows


def seen_states(task: Task, prompts: Sequence[str]) -> Tensor:
    """Text states at every token of these prompts that the encoder sees, from begin to end, shape
    (tokens, dim).

    Raises:
        ErasureError: no prompts.
    """
    distinct = list(dict.fromkeys(prompts))
    if not distinct:
        raise ErasureError(
            "a closed form keeps the answers to retained prompts, and there are none; give the "
            "concept some retain prompts"
        )
    states, lengths = task.cond(distinct).embeddings, _lengths(task.model, distinct)
    return torch.cat([row[: length + 2] for row, length in zip(states, lengths, strict=True)])


def _behind_names(task: Task, concept: ConceptSpec) -> list[tuple[Tensor, Tensor]]:
    """Of each template and name, the states behind the name and behind the anchor in its place."""
    pairs = []
    for template in concept.templates:
        for name in concept.names:
            texts = [template.replace("{}", word) for word in (name, concept.anchor)]
            ends = [template.split("{}")[0] + word for word in (name, concept.anchor)]
            starts = [length + 1 for length in _lengths(task.model, ends)]
            rows = task.cond(texts).embeddings
            count = rows.shape[1] - max(starts)
            named, anchor = (
                row[start : start + count] for row, start in zip(rows, starts, strict=True)
            )
            pairs.append((named, anchor))
    return pairs


def _at_name(task: Task, filled: Sequence[tuple[str, str]]) -> Tensor:
    states = task.cond([template.replace("{}", name) for template, name in filled]).embeddings
    # as many tokens as there are up to the name's end; the begin token before them makes this the
    # last one's place
    places = _lengths(task.model, [template.split("{}")[0] + name for template, name in filled])
    return states[torch.arange(len(states)), torch.tensor(places)]


def _lengths(model: DiffusionModel, prompts: Sequence[str]) -> list[int]:
    """Tokens of each prompt that the (first) text encoder sees."""
    by_encoder: Mapping[str, list] = model.tokens(list(prompts))
    return [len(tokens.seen) for tokens in next(iter(by_encoder.values()))]
