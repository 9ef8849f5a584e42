"""The names that diffusers gives to the layers of a LoRA, and what its loader needs beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from erase.models import DiffusionModel
from erase.models.naming import NESTED

OUTPUT = ".self_attn.out_proj"
IN_FILES = f"{NESTED}."
"""before the names of a text encoder's layers"""


def diffusers_tensors(
    down: Mapping[str, Tensor], up: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a file."""
    tensors = {f"{_key(name)}.lora_A.weight": factor.to(dtype) for name, factor in down.items()}
    return tensors | {
        f"{_key(name)}.lora_B.weight": factor.to(dtype) for name, factor in up.items()
    }


def _key(layer: str) -> str:
    """A layer's name in a file: a CLIP's with `text_model.`, which diffusers takes off where the
    installed transformers has none, and does not add."""
    component, _, name = layer.partition(".")
    if not component.startswith("text_encoder"):
        return layer
    return f"{component}.{IN_FILES}{name.removeprefix(IN_FILES)}"


def silent_factors(
    base: DiffusionModel, down: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Down and up factors of zero for one `out_proj` of each text encoder that has layers in
    `down`, and no `out_proj` among them.

    By these diffusers 0.42 tells the layout of a text encoder's part: without one it refuses the
    part or drops its attention.
    """
    found = {}
    for component in dict.fromkeys(name.split(".")[0] for name in down):
        mine = [name for name in down if name.startswith(f"{component}.")]
        if not component.startswith("text_encoder") or any(name.endswith(OUTPUT) for name in mine):
            continue
        weights = base.parameters(component)
        name = next(name for name in weights if name.endswith(f"{OUTPUT}.weight"))
        (outputs, inputs), rank = weights[name].shape, len(down[mine[0]])
        pair = torch.zeros(rank, inputs), torch.zeros(outputs, rank)
        found[name.removesuffix(".weight")] = pair
    return found


def adapter_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The settings that PEFT needs for each component's layers: without them, loaders guess the
    scale of layers of unequal rank."""
    config: dict[str, Any] = {}
    for component in dict.fromkeys(name.split(".")[0] for name in ranks):
        own = {
            name.removeprefix(f"{component}.").removeprefix(IN_FILES): rank
            for name, rank in ranks.items()
            if name.startswith(f"{component}.")
        }
        # a text encoder's layers may lie in text_model
        start = "" if component.startswith("text_encoder") else "^"
        usual = Counter(own.values()).most_common(1)[0][0]
        unusual = {f"{start}{name}": rank for name, rank in own.items() if rank != usual}
        config |= {
            f"{component}.r": usual,
            f"{component}.lora_alpha": usual,
            f"{component}.target_modules": list(own),
        }
        config |= {f"{component}.rank_pattern": unusual, f"{component}.alpha_pattern": unusual}
    return config
