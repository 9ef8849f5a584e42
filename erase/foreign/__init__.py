"""Anybody's erased checkpoint as a delta: what a foreign file changes of its base.

A foreign file says neither what it was made from nor what it forgot. Both are given: the base is
loaded, the concepts are named, and the difference of the two is an `ErasedDelta` like any other,
which is applied, evaluated, composed and exported as ours are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch

from erase.compose import compose
from erase.delta import ErasedDelta
from erase.foreign.files import find
from erase.foreign.names import places
from erase.foreign.reading import METHOD, read_source
from erase.models import DiffusionModel, LoadConfig
from erase.prompts.concepts import ConceptSpec, dump
from erase.prompts.errors import ErasureError
from erase.run import VERSION

__all__ = ["METHOD", "read_erased"]


def read_erased(
    model: DiffusionModel,
    paths: Sequence[str | Path],
    concepts: Sequence[ConceptSpec] = (),
    options: LoadConfig | None = None,
) -> ErasedDelta:
    """The difference of an erased checkpoint to its base, as a delta.

    Args:
        model: the base; it stays as it is.
        paths: what was erased: a diffusers folder or a part of one; a single file; a state dict of
            the denoiser or of a text encoder, whole or partial, in the names of diffusers or of the
            original programs; a LoRA; a delta. Several are put together: weights that two files
            give must not contradict each other, LoRAs and deltas are added to them.
        concepts: what was forgotten; by default those that deltas among `paths` name.
        options: how the base was read, for the delta's metadata; folders among `paths` are read
            with the same variant, where they have it.

    Raises:
        ErasureError: nothing there, a damaged file or one that asks for code, a file that is not of
            this base, or one that changes nothing of it.
    """
    if not paths:
        raise ErasureError("no erased checkpoint was given; name a file or a folder")
    options = options or LoadConfig()
    sources = [find(path, options.variant) for path in paths]
    known = places(model)
    read = [read_source(model, source, known) for source in sources]
    _check_agree([one.delta for one in read if not one.adds])
    deltas = [one.delta for one in read]
    whole = deltas[0] if len(deltas) == 1 else compose(model, [(one, 1.0) for one in deltas])
    told = {"concepts": dump(concepts) if concepts else _concepts(deltas)}
    if all(source.kind == "delta" for source in sources):
        return replace(whole, metadata=whole.metadata | told)
    told |= {
        "base_fingerprint": model.fingerprint,
        "base_id": model.name,
        "method": "+".join(dict.fromkeys(delta.metadata["method"] for delta in deltas)),
        "config": json.dumps({"erase": {"load": options.facts}}, sort_keys=True),
        "created_with": f"concept-erasure-toolkit {VERSION}, torch {torch.__version__}",
        METHOD: json.dumps([one.told for one in read], ensure_ascii=False),
    }
    return replace(whole, metadata=told, source=" and ".join(map(str, paths)))


def _concepts(deltas: Sequence[ErasedDelta]) -> str:
    """The concepts that the deltas name, each once."""
    named = [plain for delta in deltas for plain in delta.concepts]
    return json.dumps(list({json.dumps(plain, sort_keys=True): plain for plain in named}.values()))


def _check_agree(deltas: Sequence[ErasedDelta]) -> None:
    """Refuse two sources that change the same weight of the base, each to a value of its own."""
    for one, other in combinations(deltas, 2):
        for name in one.values.keys() & other.values.keys():
            if (one.bits[name] & other.bits[name]).any():
                raise ErasureError(
                    f"{one.source} and {other.source} both change {name} at the same places; name "
                    "the one that is meant"
                )
