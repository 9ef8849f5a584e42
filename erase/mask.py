"""Saliency and masks: which weights matter to the concept, one bit per weight (SalUn, Fan et al., ICLR 2024, eq. 3-4).

`SaliencyAccumulator` (mutable) sums signed gradients over batches; `Saliency` (frozen) is the absolute value of that sum and
can be cut at any density; `SaliencyMask` (frozen) is the result, packed, and knows the model it belongs to.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor, nn

from erase.files import errors_named, load_tensors, save_tensors
from erase.parallel.layout import Layout
from erase.prompts.errors import ErasureError
from erase.tensors import all_finite, pack, sha256_of, top_k, unpack


class SaliencyAccumulator:
    """Sums the gradients of parameters, signed and in float32; batches may cancel."""

    def __init__(self, params: Mapping[str, nn.Parameter], layout: Layout | None = None) -> None:
        self._params, self._layout = dict(params), layout or Layout()
        self._sums = {
            name: torch.zeros_like(self._layout.local(param), dtype=torch.float32, memory_format=torch.contiguous_format)
            for name, param in self._params.items()
        }

    def add_gradients(self) -> None:
        """Add each parameter's `.grad` to its sum and clear it. A parameter without gradient counts as zero."""
        for name in self._params:
            self._add(name)

    def _add(self, name: str) -> None:
        param = self._params[name]
        if param.grad is not None:
            self._sums[name] += self._layout.local(param.grad)
            param.grad = None

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Within the block, each backward pass adds its gradients as they come, so that never more than one stands beside the sums."""
        hooks = [
            param.register_post_accumulate_grad_hook(lambda _, name=name: self._add(name))  # type: ignore[misc]
            for name, param in self._params.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def sums(self) -> dict[str, Tensor]:
        """The signed sums (of this process's rows), which several processes add up before `finish`."""
        return self._sums

    def saliency(self, metadata: Mapping[str, str] | None = None) -> Saliency:
        """Freeze the absolute value of the sums, whole in every process; the accumulator has given them away and is spent.

        Raises:
            ErasureError: a sum is not finite.
        """
        values = {}
        for name in list(self._sums):  # in place: no second copy of the model's size
            total = self._layout.gather(self._sums.pop(name))
            if not all_finite(total):
                raise ErasureError(f"the saliency of {name} is not finite; use float32 and check the forget latents")
            values[name] = total.abs_().cpu()
        return Saliency(values, dict(metadata or {}))

    def finish(self, density: float, metadata: Mapping[str, str] | None = None) -> SaliencyMask:
        """The mask of the `density` most salient weights."""
        return self.saliency(metadata).cut(density)


@dataclass(frozen=True)
class Saliency:
    """|sum of gradients| of each weight, kept so that any density can be cut without computing it again."""

    values: dict[str, Tensor]
    """parameter name -> float32, the parameter's shape, non-negative"""
    metadata: dict[str, str] = field(default_factory=dict)

    def cut(self, density: float) -> SaliencyMask:
        """The `floor(density * N)` most salient weights over all parameters; ties go to the earlier parameter, then the lower index.

        Raises:
            ErasureError: density outside (0, 1], or so small that no weight is left.
        """
        count = kept_count(density, sum(value.numel() for value in self.values.values()))
        bits = {name: pack(chosen) for name, chosen in top_k(self.values, count)}
        shapes = {name: tuple(value.shape) for name, value in self.values.items()}
        return SaliencyMask(bits, shapes, {**self.metadata, "density": repr(density)})

    def save(self, path: str | Path) -> None:
        """Write safetensors, with the order of the parameters in the metadata: the file sorts them by name, and ties go by order."""
        metadata = {**self.metadata, "order": json.dumps(list(self.values))}
        checksum = sha256_of({"values": self.values, "metadata": metadata})
        save_tensors(path, self.values, {**_sorted(metadata), "format": "saliency", "sha256": checksum})

    @classmethod
    def load(cls, path: str | Path) -> Saliency:
        """Read a saliency.

        Raises:
            ErasureError: a missing, damaged or foreign file, or values that are no saliency.
        """
        values, metadata = load_tensors(path, "saliency")
        checksum, _ = metadata.pop("sha256", None), metadata.pop("format")
        if checksum and checksum != sha256_of({"values": values, "metadata": metadata}):
            raise ErasureError(f"{path} is damaged: it holds other values than were written; compute it again")
        with errors_named(path, "compute it again"):
            order = json.loads(metadata.pop("order"))
            if sorted(order) != sorted(values):
                raise ErasureError(f"{path}: its order names other parameters than it holds; compute it again")
        values = {name: values[name] for name in order}
        for name, value in values.items():
            if value.dtype != torch.float32 or not (value >= 0).all() or not all_finite(value):
                raise ErasureError(f"{path}: {name} is no saliency (float32, not negative, finite); compute it again")
        return cls(values, metadata)


@dataclass(frozen=True)
class SaliencyMask:
    """One bit per weight: 1 where training may change it."""

    bits: dict[str, Tensor]
    """parameter name -> uint8, ceil(n / 8) bytes, little bit order, rows of the parameter flattened"""
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
    def random(
        cls, params: Mapping[str, Tensor], density: float, seed: int, metadata: Mapping[str, str] | None = None
    ) -> SaliencyMask:
        """A uniformly random mask of exactly `floor(density * N)` ones: the control for saliency."""
        generator = torch.Generator().manual_seed(seed)
        noise = {name: torch.rand(param.shape, generator=generator) for name, param in params.items()}
        return Saliency(noise, {**(metadata or {}), "control": "random", "seed": str(seed)}).cut(density)

    def check(self, params: Mapping[str, Tensor], base_fingerprint: str) -> None:
        """Refuse a model that the mask was not made for.

        Raises:
            ErasureError: another base, or parameters that the mask does not know.
        """
        own = self.metadata.get("base_fingerprint")
        if own != base_fingerprint:
            raise ErasureError(
                f"this mask belongs to another base model (fingerprint {str(own)[:12]}, not {base_fingerprint[:12]}); compute one for this base"
            )
        for name, param in params.items():
            if name not in self or self.shapes[name] != tuple(param.shape):
                raise ErasureError(
                    f"the mask does not cover {name} {tuple(param.shape)}; compute it over the same scope as the training"
                )

    def save(self, path: str | Path) -> None:
        """Write safetensors: one uint8 tensor per parameter, shapes and provenance in the metadata."""
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
            found = json.loads(metadata.pop("shapes")).items()
            shapes: dict[str, tuple[int, ...]] = {name: torch.Size(shape) for name, shape in found}
            for name in bits.keys() | shapes.keys():
                fits = bits[name].dtype == torch.uint8 and bits[name].shape == (-(-math.prod(shapes[name]) // 8),)
                if not fits or min(shapes[name], default=0) < 0:
                    raise ErasureError(
                        f"{path}: the bits of {name} do not fit its shape {tuple(shapes[name])}; "
                        "the file is damaged, compute the mask again"
                    )
        mask = cls(bits, shapes, metadata)
        if checksum and checksum != mask.sha256:
            raise ErasureError(f"{path} is damaged: it holds other bits than were written; compute the mask again")
        return mask


def _sorted(metadata: Mapping[str, str]) -> dict[str, str]:
    """The same metadata in the order of its keys: a file that was read gives them in any, and equal content is to be equal bytes."""
    return dict(sorted(metadata.items()))


def check_density(density: float) -> None:
    """Refuse what is no fraction of the weights.

    Raises:
        ErasureError: density outside (0, 1].
    """
    if not isinstance(density, Real) or not 0 < density <= 1:
        raise ErasureError(f"density must be in (0, 1], not {density}")


def kept_count(density: float, total: int) -> int:
    """floor(density * total), as the reference's int(N * rho).

    Raises:
        ErasureError: density outside (0, 1], or a count of zero.
    """
    check_density(density)
    count = math.floor(density * total)
    if not count:
        raise ErasureError(f"density {density} of {total} weights leaves none to train; use a higher density or a wider scope")
    return count
