"""Saliency and masks: the weights that matter to the concept, one bit per weight (SalUn, Fan et
al., ICLR 2024, eq. 3-4).

`Saliency` is a score per weight, which a rule computes from gradients (`erase.training.rules`); cut
at a density it is a `SaliencyMask`, packed, which knows the model it belongs to.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor

from erase.files import errors_named
from erase.prompts.errors import ErasureError
from erase.tensor_files import load_tensors, save_tensors
from erase.tensors import pack, top_k, unpack


@dataclass(frozen=True)
class Saliency:
    """The score of each weight; cut at a density, it is a mask."""

    values: Mapping[str, Tensor]
    """parameter name -> float32, the parameter's shape, non-negative"""
    metadata: dict[str, str] = field(default_factory=dict)

    def cut(self, density: float, allocation: str = "global") -> SaliencyMask:
        """The `floor(density * N)` most salient weights; ties go to the earlier parameter, then the
        lower index.

        Args:
            density: in (0, 1].
            allocation: `global`: over all parameters together; `per-tensor`: the same fraction of
                each, to within one weight.

        Raises:
            ErasureError: density outside (0, 1], or so small that no weight is left.
        """
        count = kept_count(density, sum(self._sizes().values()))
        further = {"density": repr(density), "allocation": allocation}
        top = self._top(density, count, allocation)
        return self._mask({name: pack(one) for name, one in top}, further)

    def lowest(self, density: float, allocation: str = "global") -> SaliencyMask:
        """The `floor(density * N)` least salient weights, allocated as by `cut`: the control of the
        other polarity."""
        total = sum(self._sizes().values())
        count = total - kept_count(density, total)
        further = {"density": repr(density), "allocation": allocation, "control": "lowest"}
        top = self._top(1 - density, count, allocation)
        return self._mask({name: pack(~one) for name, one in top}, further)

    def _sizes(self) -> dict[str, int]:
        return {name: value.numel() for name, value in self.values.items()}

    def _top(self, density: float, count: int, allocation: str) -> Iterator[tuple[str, Tensor]]:
        """Where the `count` most salient weights are, by parameter."""
        if allocation != "per-tensor":
            yield from top_k(self.values, count)
            return
        for name, number in shares(self._sizes(), density, count).items():
            yield from top_k({name: self.values[name]}, number)

    def _mask(self, bits: dict[str, Tensor], further: Mapping[str, str]) -> SaliencyMask:
        shapes = {name: tuple(value.shape) for name, value in self.values.items()}
        return SaliencyMask(bits, shapes, {**self.metadata, **further})


def shares(sizes: Mapping[str, int], density: float, count: int) -> dict[str, int]:
    """How many of `count` weights each tensor gets in proportion to its size: largest remainders,
    ties by order."""
    counts = {name: math.floor(density * size) for name, size in sizes.items()}
    left = count - sum(counts.values())
    remainders = sorted(sizes, key=lambda name: counts[name] - density * sizes[name])  # stable
    for name in remainders[:left]:
        counts[name] += 1
    return counts


@dataclass(frozen=True)
class SaliencyMask:
    """One bit per weight: 1 where training may change it."""

    bits: dict[str, Tensor]
    """parameter name -> uint8, ceil(n / 8) bytes, little bit order, rows of the parameter
    flattened"""
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str] = field(default_factory=dict)
    """base_fingerprint, concepts, forget, loss, density, scope, seed, ..."""

    def __getitem__(self, name: str) -> Tensor:
        """The boolean mask of one parameter, in the parameter's shape."""
        return unpack(self.bits[name], self.shapes[name])

    def __contains__(self, name: str) -> bool:
        return name in self.bits

    @property
    def size(self) -> int:
        """Number of weights the mask speaks of."""
        return sum(self.sizes().values())

    @property
    def sha256(self) -> str:
        """Digest of names and bits: the same for the same mask, whatever file it lies in."""
        digest = hashlib.sha256()
        for name, bits in sorted(self.bits.items()):
            digest.update(name.encode())
            digest.update(bits.numpy().data)
        return digest.hexdigest()

    def sizes(self) -> dict[str, int]:
        """Parameter name -> number of its weights."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    def count(self) -> int:
        """Number of ones."""
        return sum(int(self[name].sum()) for name in self.bits)

    def layer_density(self) -> dict[str, float]:
        """Parameter name -> fraction of its weights that may change."""
        return {name: self[name].float().mean().item() for name in self.bits}

    def inverted(self) -> SaliencyMask:
        """The complement: a control that must do worse."""
        bits = {name: pack(~self[name]) for name in self.bits}
        return SaliencyMask(bits, self.shapes, {**self.metadata, "control": "inverted"})

    @classmethod
    def whole(
        cls, params: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> SaliencyMask:
        """All weights."""
        shapes = {name: tuple(param.shape) for name, param in params.items()}
        bits = {name: pack(torch.ones(shape, dtype=torch.bool)) for name, shape in shapes.items()}
        return cls(bits, shapes, dict(metadata or {}))

    @classmethod
    def random(
        cls,
        params: Mapping[str, Tensor],
        density: float,
        seed: int,
        metadata: Mapping[str, str] | None = None,
        allocation: str = "global",
    ) -> SaliencyMask:
        """A uniformly random mask of exactly `floor(density * N)` ones, allocated as by
        `Saliency.cut`: the control for saliency."""
        generator = torch.Generator().manual_seed(seed)
        noise = {
            name: torch.rand(param.shape, generator=generator) for name, param in params.items()
        }
        about = {**(metadata or {}), "control": "random", "seed": str(seed)}
        return Saliency(noise, about).cut(density, allocation)

    def matched_random(self, seed: int) -> SaliencyMask:
        """Random weights, as many in every tensor as here: the control for the choice of weights,
        not of layers."""
        generator = torch.Generator().manual_seed(seed)
        bits = {}
        for name, shape in self.shapes.items():
            noise = torch.rand(shape, generator=generator)
            ((_, ones),) = top_k({name: noise}, int(self[name].sum()))
            bits[name] = pack(ones)
        return SaliencyMask(
            bits, self.shapes, {**self.metadata, "control": "matched-random", "seed": str(seed)}
        )

    def within(self, names: Container[str]) -> SaliencyMask:
        """What it holds of these parameters, and nothing of the others."""
        bits = {
            name: bits if name in names else torch.zeros_like(bits)
            for name, bits in self.bits.items()
        }
        return replace(self, bits=bits)

    def check(self, params: Mapping[str, Tensor], base_fingerprint: str) -> None:
        """Refuse a model that the mask was not made for.

        Raises:
            ErasureError: another base, or parameters that the mask does not know.
        """
        own = self.metadata.get("base_fingerprint")
        if own != base_fingerprint:
            raise ErasureError(
                f"this mask belongs to another base model (fingerprint {str(own)[:12]}, not "
                f"{base_fingerprint[:12]}); compute one for this base"
            )
        for name, param in params.items():
            if name not in self or self.shapes[name] != tuple(param.shape):
                raise ErasureError(
                    f"the mask does not cover {name} {tuple(param.shape)}; compute it over the "
                    "same scope as the training"
                )

    def save(self, path: str | Path) -> None:
        """Write safetensors: one uint8 tensor per parameter, shapes and provenance in the
        metadata."""
        further = {"format": "mask", "shapes": json.dumps(self.shapes), "sha256": self.sha256}
        save_tensors(path, self.bits, {**_sorted(self.metadata), **further})

    @classmethod
    def load(cls, path: str | Path) -> SaliencyMask:
        """Read a mask.

        Raises:
            ErasureError: a missing, damaged or foreign file, or bits that do not fit their shapes.
        """
        bits, metadata = load_tensors(path, "mask")
        checksum, _ = metadata.pop("sha256", None), metadata.pop("format")
        with errors_named(path, "compute the mask again"):
            pairs = json.loads(metadata.pop("shapes")).items()
            shapes: dict[str, tuple[int, ...]] = {name: torch.Size(shape) for name, shape in pairs}
            for name in bits.keys() | shapes.keys():
                fits = bits[name].dtype == torch.uint8 and bits[name].shape == (
                    -(-math.prod(shapes[name]) // 8),
                )
                if not fits or min(shapes[name], default=0) < 0:
                    raise ErasureError(
                        f"{path}: the bits of {name} do not fit its shape {tuple(shapes[name])}; "
                        "the file is damaged, compute the mask again"
                    )
        mask = cls(bits, shapes, metadata)
        if checksum and checksum != mask.sha256:
            raise ErasureError(
                f"{path} is damaged: it holds other bits than were written; compute the mask again"
            )
        return mask


def _sorted(metadata: Mapping[str, str]) -> dict[str, str]:
    """The same metadata in the order of its keys: a file that was read gives them in any, and equal
    content is to be equal bytes."""
    return dict(sorted(metadata.items()))


def check_density(density: float, name: str = "density") -> None:
    """Refuse a density that is no fraction of the weights; `name` is its option's.

    Raises:
        ErasureError: density outside (0, 1].
    """
    if not isinstance(density, Real) or not 0 < density <= 1:
        percent = isinstance(density, Real) and 1 < density <= 100
        hint = f"; {density:g} % is {density / 100:g}" if percent else ""
        raise ErasureError(
            f"{name} is {density}; it must be a fraction of the weights, above 0 and at most 1"
            f"{hint}"
        )


def kept_count(density: float, total: int) -> int:
    """floor(density * total), as the reference's int(N * rho).

    Raises:
        ErasureError: density outside (0, 1], or a count of zero.
    """
    check_density(density)
    count = math.floor(density * total)
    if not count:
        raise ErasureError(
            f"density {density} of {total} weights leaves none to train; use a higher density or a "
            "wider scope"
        )
    return count
