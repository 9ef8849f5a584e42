"""Freezes: which tensors of an erased model a trainer leaves as they are, by name, as a JSON file.

A freeze is a conditional defence. It holds where whoever trains honours it, a fine-tuning service
say; whoever has the weights trains all of them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erase.files import atomic_write, errors_named
from erase.mask import SaliencyMask
from erase.models import DiffusionModel
from erase.prompts.errors import ErasureError, is_number, unknown
from erase.prompts.reading import read_text
from erase.tensors import pack

FORMAT = "freeze 1"
AGAIN = "make it again with erase-freeze"


@dataclass(frozen=True)
class Freeze:
    """Tensors of one erased model that training must not change."""

    shapes: dict[str, tuple[int, ...]]
    """parameter name -> its shape, of each frozen tensor"""
    fingerprint: str
    """of the erased model"""
    made: dict[str, Any] = field(default_factory=dict)
    """how: rule, ratio, seed, concepts, ..., JSON-ready"""
    source: str = field(default="this freeze", compare=False)
    """what errors call it: the file that it was read from"""

    @property
    def count(self) -> int:
        """Number of frozen weights."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def sha256(self) -> str:
        """Digest of the model and the names: the same for the same freeze, however it was made."""
        text = json.dumps([self.fingerprint, sorted(self.shapes)])
        return hashlib.sha256(text.encode()).hexdigest()

    def check(self, model: DiffusionModel) -> None:
        """Refuse a model that the freeze was not made for.

        Raises:
            ErasureError: another fingerprint, or what `check_names` refuses.
        """
        if self.fingerprint != model.fingerprint:
            raise ErasureError(
                f"{self.source} is for another model (fingerprint {self.fingerprint[:12]}, not "
                f"{model.fingerprint[:12]}): it names tensors of one erased model; make one for "
                "this model with erase-freeze"
            )
        self.check_names(model.parameters())

    def check_names(self, params: Mapping[str, Tensor]) -> None:
        """Refuse parameters that the frozen tensors are not among.

        Raises:
            ErasureError: a name that is unknown (the near one is suggested), or another shape.
        """
        for name, shape in self.shapes.items():
            if name not in params:
                raise unknown(f"tensor in {self.source}:", name, params)
            if shape != tuple(params[name].shape):
                raise ErasureError(
                    f"{self.source} says that {name} has the shape {shape}, but it has "
                    f"{tuple(params[name].shape)}; {AGAIN}"
                )

    def mask(
        self, params: Mapping[str, Tensor], fingerprint: str, *, matrices: bool = False
    ) -> SaliencyMask:
        """The same as a mask over these parameters, as the training loop takes it: no weight of a
        frozen tensor may change, every other may.

        Args:
            params: those that are trained.
            fingerprint: of the model that is.
            matrices: whether training changes matrices alone, as low-rank training does.

        Raises:
            ErasureError: all of them are frozen.
        """
        trained = {name for name, param in params.items() if param.dim() > 1 or not matrices}
        if trained <= self.shapes.keys():
            raise ErasureError(
                f"{self.source} freezes all of the {len(trained)} tensors that would be trained; "
                "widen the scope, or make a freeze of a smaller ratio"
            )
        shapes = {name: tuple(param.shape) for name, param in params.items()}
        bits = {name: pack(torch.full(s, name not in self.shapes)) for name, s in shapes.items()}
        return SaliencyMask(bits, shapes, {"base_fingerprint": fingerprint, "freeze": self.sha256})

    def save(self, path: str | Path) -> None:
        """Write the manifest: JSON, whole or not at all."""
        facts = {"fingerprint": self.fingerprint, "made": self.made, "frozen": self.shapes}
        with atomic_write(path) as aside:
            text = json.dumps({"format": FORMAT, **facts}, indent=1)
            aside.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Freeze:
        """Read a manifest.

        Raises:
            ErasureError: a missing, damaged or foreign file.
        """
        try:
            said = json.loads(read_text(path))
        except (ValueError, RecursionError) as error:
            if isinstance(error, ErasureError):
                raise
            raise ErasureError(f"{path} is not JSON ({error}); {AGAIN}") from error
        if not isinstance(said, dict) or said.get("format") != FORMAT:
            raise ErasureError(f"{path} is not a freeze, what erase-freeze writes; {AGAIN}")
        with errors_named(path, AGAIN):
            shapes = {name: _shape(shape) for name, shape in said["frozen"].items()}
            made = dict(said["made"])
            if not isinstance(said["fingerprint"], str) or not shapes:
                raise ValueError("it names no model or no tensors")
        return cls(shapes, said["fingerprint"], made, str(path))


def _shape(sizes: Any) -> tuple[int, ...]:
    if not all(isinstance(size, int) and is_number(size) and size > 0 for size in sizes):
        raise ValueError(f"{sizes!r} is no shape")
    return tuple(sizes)
