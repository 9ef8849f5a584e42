"""Prompts as text encoders see them: concepts that they cannot see are refused, prompts whose ends
they cut are counted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from erase.models.base import DiffusionModel, Tokens
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError

NAMED = 100
"""prompts that are named at most; all are counted"""
log = logging.getLogger("erase")


def check_prompts(model: DiffusionModel, concepts: Sequence[ConceptSpec]) -> None:
    """Refuse concepts of which nothing would be forgotten, before latents are made.

    Raises:
        ErasureError: a concept or an anchor that stands behind the last token which a text encoder
            sees, or a forget prompt that is to all text encoders what its anchor prompt is.
    """
    for concept in concepts:
        _check_cut(model, concept)
        _check_distinct(model, concept)


def _check_cut(model: DiffusionModel, concept: ConceptSpec) -> None:
    """Each prompt up to the end of its name must be seen whole, by one text encoder at least."""
    named = [
        (template, name)
        for template in concept.templates
        for name in (*concept.names, concept.anchor)
    ]
    beginnings = model.tokens([template.partition("{}")[0] + name for template, name in named])
    for row, (template, name) in enumerate(named):
        seen = [rows[row] for rows in beginnings.values()]
        if all(tokens.cut for tokens in seen):
            most = max(seen, key=lambda tokens: tokens.room)
            raise ErasureError(
                f"{name!r} is cut away from the prompt {template.replace('{}', name)!r}: it ends "
                f"with token {len(most.ids)}, and the text encoder sees {most.room}; use a shorter "
                "name or template"
            )


def _check_distinct(model: DiffusionModel, concept: ConceptSpec) -> None:
    pairs = concept.pairs()
    forget = model.tokens([prompt for prompt, _ in pairs])
    anchor = model.tokens([instead for _, instead in pairs])
    for row, (prompt, instead) in enumerate(pairs):
        if all(forget[encoder][row].seen == anchor[encoder][row].seen for encoder in forget):
            raise ErasureError(
                f"the prompt {prompt!r} and its anchor {instead!r} are the same tokens to the text "
                f"encoder, so nothing would be forgotten; give {concept.target!r} another name or "
                "another anchor"
            )


def cut_prompts(
    prompts: Sequence[str],
    tokens: Callable[[list[str]], Mapping[str, list[Tokens]]],
    cases: Sequence[int] = (),
) -> dict[str, Any] | None:
    """The prompts that are longer than a text encoder reads, for a run's settings; None: it reads
    all of them whole.

    Args:
        prompts: those of a run.
        tokens: what each text encoder makes of them, see `DiffusionModel.tokens`.
        cases: the number of each prompt, where it has one.

    Returns:
        `count` of `of` prompts, the `room` of each encoder that cuts, in tokens, `cases`, and the
        first of the `prompts`.
    """
    by_encoder = tokens(list(prompts))
    cut_by: dict[str, list[int]] = {}
    for encoder, rows in by_encoder.items():
        cut_by[encoder] = [row for row, tokens_of in enumerate(rows) if tokens_of.cut]
    cut = sorted(set().union(*cut_by.values()))
    if not cut:
        return None
    room = {encoder: by_encoder[encoder][0].room for encoder, rows in cut_by.items() if rows}
    log.warning(
        "%d of %d prompts are longer than a text encoder reads, the first is %r",
        len(cut),
        len(prompts),
        prompts[cut[0]],
    )
    distinct = list(dict.fromkeys(prompts[row] for row in cut))[:NAMED]
    numbers = {"cases": [cases[row] for row in cut]} if cases else {}
    return {"count": len(cut), "of": len(prompts), "room": room, **numbers, "prompts": distinct}
