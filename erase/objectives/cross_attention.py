"""How much each word of a prompt is looked at: the cross-attention of a UNet, and the places of a
concept's names in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from erase.latents.batches import Rows
from erase.models import DiffusionModel
from erase.models.pipelines import modules
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.prompts.names import Names
from erase.task import Task
from erase.training.batches import PromptedRows
from erase.training.trainable import Base


@dataclass
class Layer:
    """What one layer computed in a forward pass."""

    heads: int
    scale: float
    seen: dict[str, Tensor] = field(default_factory=dict)
    """`to_q` and `to_k`: queries of all positions, keys of all tokens, shape (n, ..., width)"""

    def probabilities(self) -> Tensor:
        """softmax(q k^T scale), shape (n, heads, positions, tokens), float32."""
        if not self.seen:
            raise ErasureError(
                "a method that looks at cross-attention saw none of it; train without compile"
            )
        query, key = (
            self.seen[name].unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("to_q", "to_k")
        )
        return (query @ key.transpose(-1, -2) * self.scale).float().softmax(dim=-1)


def find_layers(model: DiffusionModel) -> list[Any]:
    """The attention modules of a UNet that look at the text.

    Raises:
        ErasureError: a transformer, where text and image look at each other in one attention.
    """
    unet = modules(model.pipeline()).get("unet")
    if unet is None:
        raise ErasureError(
            f"{model.name} has no UNet, so no attention that looks at the text alone; take a "
            "method that looks at predictions, such as esd or salun"
        )
    return [module for name, module in unet.named_modules() if name.endswith("attn2")]


@contextmanager
def recorded(model: DiffusionModel) -> Iterator[list[Layer]]:
    """The cross-attention layers of a UNet, which fill with what is predicted within the block."""
    layers, hooks = [], []
    for module in find_layers(model):
        layers.append(layer := Layer(module.heads, module.scale))
        for part in ("to_q", "to_k"):
            hook = partial(_keep, layer.seen, part)
            hooks.append(getattr(module, part).register_forward_hook(hook))
    try:
        yield layers
    finally:
        for hook in hooks:
            hook.remove()


def _keep(
    seen: dict[str, Tensor], part: str, module: nn.Module, inputs: object, output: Tensor
) -> None:
    seen[part] = output


def name_places(
    task: Task, concepts: Sequence[ConceptSpec], prompts: Sequence[str], tokens: int
) -> Tensor:
    """Which tokens of these prompts belong to a name of the concepts, as it is or as `Names` finds
    it (plurals, hyphens), shape (prompts, tokens), bool.

    Args:
        task: whose first text encoder splits the prompts.
        concepts: whose names are looked for.
        prompts: the texts.
        tokens: as many as there are text states.

    Raises:
        ErasureError: a prompt that names none of them.
    """
    names = [name for concept in concepts for name in concept.names]
    named, known = Names(names), _ids(task, names)
    places = torch.zeros(len(prompts), tokens, dtype=torch.bool)
    for row, (prompt, ids) in enumerate(zip(prompts, _ids(task, prompts), strict=True)):
        for name in {*known, *_ids(task, named.written(prompt))}:
            for start in range(len(ids) - len(name) + 1):
                if name and ids[start : start + len(name)] == name:
                    # the begin token stands before them
                    places[row, start + 1 : start + 1 + len(name)] = True
        if not places[row].any():
            raise ErasureError(
                f"the prompt {prompt!r} names none of {', '.join(map(repr, names))}, so there is "
                "no attention to it; add what it is called there to the synonyms"
            )
    return places.to(task.model.device)


def _ids(task: Task, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Tokens of each text that the first text encoder sees."""
    by_encoder = task.model.tokens(list(texts)) if texts else {"": []}
    return [tokens.seen for tokens in next(iter(by_encoder.values()))]


def attended(
    task: Task, concepts: Sequence[ConceptSpec], rows: Rows, prompts: Sequence[str]
) -> tuple[list[Layer], Tensor]:
    """The layers, filled by a prediction of these rows under these prompts, and the places of these
    concepts' names in them."""
    cond = task.cond(prompts)
    places = name_places(task, concepts, prompts, cond.embeddings.shape[1])
    with recorded(task.model) as layers:
        task.model.predict(rows.noisy, rows.t, cond)
    return layers, places


def attention_to(
    layers: Sequence[Layer], places: Tensor, regions: Sequence[Tensor] | None = None
) -> Tensor:
    """sum over layers, positions and the tokens at these places of the squared probability; mean
    over heads and rows.

    Args:
        layers: recorded, of n rows.
        places: shape (n, tokens), bool.
        regions: of each layer the positions that count, shape (n, positions), bool; None: all.
    """
    total = torch.zeros((), device=places.device)
    for i, layer in enumerate(layers):
        squares = (layer.probabilities().square() * places[:, None, None]).sum(dim=3)
        if regions is not None:
            squares = squares * regions[i][:, None]
        total = total + squares.sum(dim=2).mean()
    return total


def looking_at(layer: Layer, places: Tensor) -> Tensor:
    """The positions that look at these tokens more than the mean position does, shape
    (n, positions), bool."""
    shares = (layer.probabilities() * places[:, None, None]).sum(dim=3).mean(dim=1)
    return shares > shares.mean(dim=1, keepdim=True)


def attention_where_seen(
    task: Task, concepts: Sequence[ConceptSpec], batch: PromptedRows, base: Base
) -> dict[str, Tensor]:
    """The loss of attention to these concepts' names, where the base looks at them: the objects
    themselves, without a segmentation from outside (MACE, Lu et al. 2024)."""
    with base():
        before, places = attended(task, concepts, *batch)
        regions = [looking_at(layer, places) for layer in before]
    layers, places = attended(task, concepts, *batch)
    return {"forget": attention_to(layers, places, regions)}
