"""The parts of a pipeline, each loaded with every one of its weights, finite and our own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from erase.models.config import LoadConfig
from erase.models.part_files import weight_variant
from erase.prompts.errors import ErasureError, reason
from erase.tensors import all_finite

PROBLEMS = {
    "missing_keys": ("lacks", ""),
    "mismatched_keys": ("holds with another shape", ""),
    "unexpected_keys": (
        "holds in surplus",
        "; if they do no harm, leave them out (--load.ignore, a regular expression of how their "
        "names begin)",
    ),
}
"""what diffusers and transformers call it -> what it is, and the way out"""
TOO_LARGE = (
    " in float16; use float32 or bfloat16 (load.dtype), and if they are not finite there either, "
    "the checkpoint is damaged"
)


def load_part(kind: Any, where: Path, options: LoadConfig) -> nn.Module:
    """One part of a pipeline, with every one of its weights from the file and none left over.

    Raises:
        ErasureError: see `weight_variant`; or weights that do not fit the part's configuration.
    """
    variant = weight_variant(where, options.variant)
    try:
        module, info = kind.from_pretrained(
            where,
            dtype=options.torch_dtype,
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
            **({"variant": variant} if variant else {}),
        )
    except Exception as error:
        raise ErasureError(f"cannot load {where}: {reason(error)}") from error
    for problem, (words, advice) in PROBLEMS.items():
        keys = [str(key) for key in info.get(problem, ()) if "position_ids" not in str(key)]
        if problem == "unexpected_keys":
            keys = [key for key in keys if not options.ignores(key)]
        if keys:
            raise ErasureError(
                f"{where} {words} {keys[0]} ({len(keys)} such keys); it does not fit its "
                f"config.json{advice}"
            )
    return module  # type: ignore[no-any-return]


def check_finite(parts: Mapping[str, nn.Module], name: str) -> None:
    """Refuse NaN and infinite weights and statistics.

    Raises:
        ErasureError: names the first one.
    """
    for part, module in parts.items():
        for key, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point() and not all_finite(tensor):
                bad = int((~torch.isfinite(tensor)).sum())
                narrow = tensor.dtype == torch.float16 and not tensor.isnan().any()
                raise ErasureError(
                    f"{name}: {part}.{key} holds {bad:,} values that are not finite"
                    f"{TOO_LARGE if narrow else '; the checkpoint is damaged'}"
                )


def own_weights(parts: Mapping[str, nn.Module]) -> None:
    """Copy weights out of the files they are mapped from: those may change under us, and their
    addresses, which follow from the length of a file's header, change the last bits of sums. So one
    checkpoint gives one delta, whatever format it is read from."""
    for module in parts.values():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.clone()
