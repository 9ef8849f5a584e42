"""What the matrices that read the text are given, of a concept's names, of its anchor, and of
prompts that are retained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from erase.models.chat import LENGTH
from erase.models.scopes import TextInput
from erase.models.text_states import given
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.prompts.several import retained_prompts
from erase.task import Task

TOKENS = TextInput()
Filled = tuple[str, str]
"""a template, and the word in it"""
MOST = 77
"""states behind a name that are looked at: as many as a CLIP has; a T5 or a language model fills up
to 512, whose last ones tell little that is new"""


def subject_states(
    task: Task, concept: ConceptSpec, of: TextInput = TOKENS
) -> tuple[Tensor, Tensor]:
    """States at the last token of each name of a concept, and at that of its anchor, in each
    of its templates; of each text encoder whose states lie in a place of their own. Of pooled
    states, those of the prompts.

    Returns:
        Both of shape (names * templates * encoders, dim), in the same order.
    """
    filled, anchors = zip(*_filled(task, concept), strict=True)
    return _at_name(task, filled, of), _at_name(task, anchors, of)


def following_states(
    task: Task, concept: ConceptSpec, of: TextInput = TOKENS
) -> tuple[Tensor, Tensor]:
    """States behind each name of a concept (other words, the end, padding), and behind its
    anchor in the same prompt: to them the name has told what it means (MACE, Lu et al. 2024).

    Returns:
        Both of shape (states, dim), in the same order.
    """
    behind, anchors = zip(*behind_names(task, concept, of), strict=True)
    return torch.cat(behind), torch.cat(anchors)


def behind_names(
    task: Task, concept: ConceptSpec, of: TextInput = TOKENS
) -> list[tuple[Tensor, Tensor]]:
    """Of each template, name and text encoder, the states behind the name and those behind the
    anchor in its place, `MOST` at most, evenly apart; of pooled states none."""
    if of.pooled:
        return []
    pairs = []
    for filled in _filled(task, concept):
        texts = [template.replace("{}", word) for template, word in filled]
        ends = [template.split("{}")[0] + word for template, word in filled]
        (named, anchor), stop = prompt_states(task, texts, of)
        for places, (start, instead) in _lengths(task, ends):
            start, instead = places.start + start, places.start + instead
            count = max(0, min(stop, places.stop) - max(start, instead))
            behind = torch.linspace(0, count - 1, min(count, MOST)).long()
            pairs.append((named[start + behind], anchor[instead + behind]))
    return pairs


def _filled(task: Task, concept: ConceptSpec) -> list[tuple[Filled, Filled]]:
    """Each template with each name, and the one for the anchor with it."""
    templates = zip(concept.templates, task.together.anchor_templates(concept), strict=True)
    return [
        ((template, name), (instead, concept.anchor))
        for template, instead in templates
        for name in concept.names
    ]


def prompt_states(task: Task, texts: Sequence[str], of: TextInput) -> tuple[Tensor, int]:
    """What a matrix is given of each prompt, shape (n, places, dim), where the denoiser's weights
    lie; and how many of the places hold states in all of them."""
    cond = task.cond(texts)
    rows, lengths = given(task.model, cond, of), cond.extras.get(LENGTH)
    if of.pooled or lengths is None:
        return rows, rows.shape[1]
    return rows, int(lengths.min())


def retained_states(task: Task, of: TextInput = TOKENS) -> Tensor:
    """States of the retained prompts and of those of earlier concepts (`seen_states`)."""
    return seen_states(task, retained_prompts(task.concepts, task.earlier), of)


def seen_states(task: Task, prompts: Sequence[str], of: TextInput = TOKENS) -> Tensor:
    """States at every token of these prompts that an encoder sees, from begin to end, shape
    (tokens, dim); of pooled states, one for each prompt.

    Raises:
        ErasureError: no prompts.
    """
    if not prompts:
        raise ErasureError(
            "a closed form keeps the answers to retained prompts, and there are none; give the "
            "concept some retain prompts"
        )
    rows, _ = prompt_states(task, prompts, of)
    if of.pooled:
        return rows[:, 0]
    seen = []
    for i, (places, lengths) in enumerate(_lengths(task, prompts)):
        begin = places.start if i else 0  # of the first encoder also what stands before each prompt
        seen += [row[begin : places.start + n + 1] for row, n in zip(rows, lengths, strict=True)]
    return torch.cat(seen)


def _at_name(task: Task, filled: Sequence[Filled], of: TextInput) -> Tensor:
    rows, _ = prompt_states(task, [template.replace("{}", name) for template, name in filled], of)
    if of.pooled:
        return rows[:, 0]
    ends = [template.split("{}")[0] + name for template, name in filled]
    found = []
    for places, lengths in _lengths(task, ends):
        found.append(rows[torch.arange(len(rows)), torch.tensor(lengths) + places.start - 1])
    return torch.cat(found)


def _lengths(task: Task, prompts: Sequence[str]) -> list[tuple[range, list[int]]]:
    """Of each text encoder whose states lie in a place of their own: the place, and the tokens of
    each prompt that it sees."""
    found: dict[int, tuple[range, list[int]]] = {}
    for tokens in task.model.tokens(list(prompts)).values():
        places = tokens[0].states
        if places is not None and places.start not in found:
            found[places.start] = places, [len(one.seen) for one in tokens]
    return [found[start] for start in sorted(found)]
