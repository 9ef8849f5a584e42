"""What the matrices that read the text are given (`erase.models.scopes.text_input`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from erase.models.base import Cond, DiffusionModel
from erase.models.chat import LENGTH
from erase.models.pipelines import denoiser
from erase.models.prefix import encode_live
from erase.models.scopes import TextInput
from erase.models.stock import POOLED


@torch.no_grad()
def encoded_together(model: DiffusionModel, prompts: Sequence[str]) -> Cond:
    """Text states of prompts of which only the sum counts: in one pass, so that the last bits of
    each depend on the others (`DiffusionModel.encode` takes each by itself)."""
    return encode_live(model.pipeline(), list(prompts), model.device)


def given(model: DiffusionModel, cond: Cond, of: TextInput) -> Tensor:
    """The text states of n prompts as such a matrix meets them, shape (n, places, dim), where the
    denoiser's weights lie; of pooled states there is one place."""
    cond = cond.to(next(denoiser(model.pipeline()).parameters()).device)
    if of.pooled:
        return cond.extras[POOLED][:, None]
    if not of.norm:
        return cond.embeddings
    component, _, module = of.norm.partition(".")
    with torch.no_grad():
        return model.component(component).get_submodule(module)(cond.embeddings)


def given_tokens(model: DiffusionModel, cond: Cond, of: TextInput) -> Tensor:
    """The same, of all places that the model looks at, shape (rows, dim)."""
    rows, lengths = given(model, cond, of), cond.extras.get(LENGTH)
    if of.pooled or lengths is None:
        return rows.flatten(0, 1)
    return torch.cat([row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)])
