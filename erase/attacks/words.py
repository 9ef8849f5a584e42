"""Words of one token: the alphabet of the attacks that must end in a prompt that can be typed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from erase.models import DiffusionModel
from erase.models.pipelines import text_encoders
from erase.prompts.errors import ErasureError


@dataclass(frozen=True)
class Words:
    """The words that every tokenizer of a model takes as one token, and their embeddings."""

    texts: Sequence[str]
    tables: Mapping[str, Tensor]
    """text encoder -> embeddings of the words, shape (words, dim), without gradient"""

    def __len__(self) -> int:
        return len(self.texts)

    def text(self, chosen: Tensor) -> str:
        """The words at these places, shape (k,), as a prompt."""
        return " ".join(self.texts[place] for place in chosen.tolist())

    def embedded(self, chosen: Tensor) -> dict[str, Tensor]:
        """Text encoder -> embeddings of the words at these places, shape (*chosen, dim)."""
        return {name: table[chosen.to(table.device)] for name, table in self.tables.items()}


def words_of(model: DiffusionModel) -> Words:
    """The words of a model, in the order of its (first) vocabulary.

    Raises:
        ErasureError: fewer than two.
    """
    pipeline: Any = model.pipeline()
    tokenizer = pipeline.tokenizer
    special = set(tokenizer.all_special_ids)
    ids = [id for id in sorted(tokenizer.get_vocab().values()) if id not in special]
    candidates = dict.fromkeys(tokenizer.decode([id]).strip() for id in ids)
    texts = [text for text in candidates if text.isprintable() and len(text.split()) == 1]
    by_encoder = model.tokens(texts)
    single = list(range(len(texts)))
    for tokens in by_encoder.values():
        single = [place for place in single if len(tokens[place].ids) == 1]
    if len(single) < 2:
        raise ErasureError(
            f"{model.name} has no words of one token that all of its tokenizers share, so that no "
            "attack can choose among them; use one that finds embeddings (pseudo_token)"
        )

    tables = {}
    for name, encoder in text_encoders(pipeline).items():
        weight = encoder.get_input_embeddings().weight.detach()
        rows = torch.tensor([by_encoder[name][place].ids[0] for place in single])
        tables[name] = weight[rows.to(weight.device)]
    return Words([texts[place] for place in single], tables)


def onto_simplex(values: Tensor) -> Tensor:
    """The nearest point of the probability simplex to each row, in the Euclidean norm.

    It is max(v - tau, 0), where tau makes the row sum to 1 (Duchi et al. 2008); tau is found by
    bisection, between the largest value less one and the largest value.

    Args:
        values: shape (..., n).
    """
    high = values.amax(-1, keepdim=True)
    low = high - 1
    for _ in range(50):
        tau = (low + high) / 2
        above = (values - tau).clamp(min=0).sum(-1, keepdim=True) > 1
        low, high = torch.where(above, tau, low), torch.where(above, high, tau)
    kept = (values - low).clamp(min=0)
    return kept / kept.sum(-1, keepdim=True)


def nearest(vectors: Tensor, table: Tensor) -> Tensor:
    """The place of the row of `table` with the greatest cosine to each vector.

    Args:
        vectors: shape (..., dim).
        table: shape (words, dim).

    Returns:
        Shape (...), int64.
    """
    unit = torch.nn.functional.normalize(table, dim=-1)
    return (vectors @ unit.T).argmax(-1)
