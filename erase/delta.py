"""What an erasure changed, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from erase.files import load_tensors, save_tensors
from erase.mask import pack, unpack
from erase.models import DiffusionModel
from prompts.errors import ErasureError


@dataclass(frozen=True)
class ErasedDelta:
    """Replacement values of the weights that changed, exact to the bit."""

    values: dict[str, Tensor]
    """parameter name -> its changed values, flat, in the base's dtype"""
    bits: dict[str, Tensor]
    """parameter name -> packed bits, 1 where a weight changed"""
    metadata: dict[str, str] = field(default_factory=dict)
    """base_fingerprint, base_id, method, config (JSON), concepts (JSON), created_with"""

    @classmethod
    def between(cls, base: Mapping[str, Tensor], erased: Mapping[str, Tensor], metadata: Mapping[str, str]) -> ErasedDelta:
        """The difference of two states: `erased` values wherever they differ from `base`."""
        values, bits = {}, {}
        for name, new in erased.items():
            changed = _pattern(new.detach()) != _pattern(base[name])
            if changed.any():
                values[name], bits[name] = new.detach()[changed].cpu(), pack(changed)
        return cls(values, bits, dict(metadata))

    @property
    def count(self) -> int:
        """Number of weights that changed."""
        return sum(value.numel() for value in self.values.values())

    def check(self, model: DiffusionModel) -> None:
        """Refuse a model that is not the base that this delta was made from.

        Raises:
            ErasureError: its fingerprint is another.
        """
        own = self.metadata.get("base_fingerprint", "")
        if model.fingerprint != own:
            raise ErasureError(
                f"this delta belongs to base {self.metadata.get('base_id', '?')} (fingerprint {own[:12]}), but {model.name} has "
                f"{model.fingerprint[:12]}; load that base, or erase from this one"
            )

    @torch.no_grad()
    def apply(self, model: DiffusionModel) -> DiffusionModel:
        """Put the changed values into a base model, in place, and return it; `check` must pass."""
        self.check(model)
        params = model.parameters()
        for name, value in self.values.items():
            where = unpack(self.bits[name], tuple(params[name].shape)).to(params[name].device)
            params[name][where] = value.to(params[name])
        model.refresh_fingerprint()
        return model

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {f"values.{name}": value for name, value in self.values.items()}
        tensors |= {f"bits.{name}": value for name, value in self.bits.items()}
        save_tensors(path, tensors, {**self.metadata, "format": "delta"})

    @classmethod
    def load(cls, path: str | Path) -> ErasedDelta:
        """Read a delta.

        Raises:
            ErasureError: a missing, damaged or foreign file, or values that do not fit their bits.
        """
        tensors, metadata = load_tensors(path, "delta")
        split: dict[str, dict[str, Tensor]] = {"values": {}, "bits": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            split.setdefault(part, {})[name] = tensor
        for name, value in split["values"].items():
            bits = split["bits"].get(name)
            if bits is None or int(unpack(bits, (bits.numel() * 8,)).sum()) != value.numel():
                raise ErasureError(f"{path}: the values of {name} do not fit their places; the file is damaged, erase again")
        return cls(split["values"], split["bits"], metadata)

    @property
    def concepts(self) -> list[dict[str, object]]:
        """The concepts that were erased, as plain data."""
        concepts: list[dict[str, object]] = json.loads(self.metadata.get("concepts", "[]"))
        return concepts


def _pattern(tensor: Tensor) -> Tensor:
    """The bits of floating point values, so that 0.0 and -0.0 differ."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
