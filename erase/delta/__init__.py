"""The weights that an erasure changed, and nothing else."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erase.delta.mismatch import way_out
from erase.delta.notebook import facts_table
from erase.delta.origin import NOTHING, Origin, concepts_of, gone, read_origin, requests_of
from erase.delta.stored import check_values, delta_file, read_delta, stored_tensors
from erase.models import DiffusionModel
from erase.models.naming import former_fingerprint
from erase.prompts.errors import ErasureError
from erase.tensor_files import save_tensors
from erase.tensors import all_finite, indices, pack, unpack


@dataclass(frozen=True)
class ErasedDelta:
    """Replacement values of the weights that changed, exact to the bit.

    `delta.apply(base)` puts them in, `delta.inverse(base)` is the delta that takes them out again,
    and `erase.compose` adds, scales and subtracts several.
    """

    values: dict[str, Tensor]
    """parameter name -> its changed values, flat, in the base's dtype"""
    bits: dict[str, Tensor]
    """parameter name -> packed bits, 1 where a weight changed"""
    metadata: dict[str, str] = field(default_factory=dict)
    """base_fingerprint, base_id, method, config (JSON), concepts (JSON), created_with; parts
    (JSON), if it was composed; after and requests (JSON), if it was made after an earlier one"""
    source: str = field(default="this delta", compare=False)
    """what errors call it: the file that it was read from"""

    @classmethod
    def between(
        cls, base: Mapping[str, Tensor], erased: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> ErasedDelta:
        """The difference of two states: `erased` values wherever they differ from `base`."""
        values, bits = {}, {}
        for name, new in erased.items():
            if change := difference(base[name], new.detach()):
                values[name], bits[name] = change
        return cls(values, bits, dict(metadata))

    def __repr__(self) -> str:
        base = self.metadata.get("base_id", "?")
        return (
            f"ErasedDelta({self.title!r} from {base}: {self.count:,} weights in {len(self.values)} "
            "tensors)"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        facts = {
            "base": self.metadata.get("base_id", "?"),
            "method": self.metadata.get("method", "?"),
        }
        facts |= {"weights changed": f"{self.count:,} in {len(self.values)} tensors"}
        return facts_table(f"{self.title} erased", facts | {"sha256": self.sha256[:12]})

    @property
    def count(self) -> int:
        """Number of weights that changed."""
        return sum(value.numel() for value in self.values.values())

    @property
    def origin(self) -> Origin:
        """The metadata, read and checked; ask for them before long work.

        Raises:
            ErasureError: they lack something or say what cannot be.
        """
        return read_origin(self.metadata, self.source)

    @property
    def concepts(self) -> list[dict[str, Any]]:
        """The concepts that were erased, as plain data."""
        return concepts_of(self.metadata, self.source)

    @property
    def requests(self) -> list[dict[str, Any]]:
        """Requests that came one after another, `erase.compose.sequence`; of one, none."""
        return requests_of(self.metadata, self.source)

    @property
    def title(self) -> str:
        """The erased concepts, e.g. `heart, star`."""
        return ", ".join(concept["target"] for concept in self.concepts) or NOTHING

    @property
    def name(self) -> str:
        """The name of the erased weights, e.g. `canvas without heart`, without the base's path on
        somebody's disk."""
        base = re.split(r"[\\/]", self.metadata.get("base_id", "?").rstrip("\\/"))[-1]
        if "undoes" in self.metadata:
            return f"{base}, undone"
        return (
            f"{base} without {', '.join(gone(self.metadata))}"
            if self.concepts
            else f"{base}, changed"
        )

    @property
    def components(self) -> list[str]:
        """Names of the components that it changes, e.g. `unet`."""
        return list(dict.fromkeys(name.split(".")[0] for name in self.values))

    @property
    def sha256(self) -> str:
        """Digest of base, places and values: the same for the same change, whatever file it lies
        in."""
        digest = hashlib.sha256(self.metadata.get("base_fingerprint", "").encode())
        for name, value in sorted(self.values.items()):
            digest.update(f"{name} {value.dtype}".encode())
            digest.update(self.bits[name].numpy().data)
            digest.update(_pattern(value).numpy().data)
        return digest.hexdigest()

    def where(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The boolean mask of the weights of one parameter that changed."""
        return unpack(self.bits[name], shape)

    def places(self, name: str) -> Tensor:
        """The flat indices of the weights of one parameter that changed, in the order of
        `values`."""
        return indices(unpack(self.bits[name], (self.bits[name].numel() * 8,)))

    def change(self, name: str, base: Tensor) -> Tensor:
        """By how much it changes one parameter, whose base value is given: float64 on the CPU,
        `base`'s shape, 0 where it does not."""
        places, old = self.places(name), base.detach().cpu().flatten()
        moved = self.values[name].double() - old.index_select(0, places).double()
        return (
            torch.zeros(old.shape, dtype=torch.float64).scatter_(0, places, moved).view(base.shape)
        )

    def check(self, model: DiffusionModel) -> None:
        """Refuse a model that is not the base that this delta was made from, or that cannot hold it
        exactly.

        Raises:
            ErasureError: another fingerprint, a parameter or a size that the model does not have,
                values that are not finite, or ones that the model's dtype would round.
        """
        own = self.metadata.get("base_fingerprint", "")
        if model.fingerprint != own and own == former_fingerprint(model):
            raise ErasureError(
                f"{self.source} was made from {model.name} by a version of this toolkit that named "
                "the text encoder's weights as transformers before 5.6 does; erase again"
            )
        if model.fingerprint != own:
            raise ErasureError(
                f"{self.source} belongs to base {self.metadata.get('base_id', '?')} (fingerprint "
                f"{own[:12]}), but {model.name} has {model.fingerprint[:12]}; "
                f"{way_out(self, model)}"
            )
        params = model.parameters()
        for name in self.values.keys() | self.bits.keys():
            if name not in self.values or name not in self.bits:
                raise ErasureError(
                    f"{self.source}: {name} lacks its values or its places; erase again"
                )
        for name in self.values:
            self._check_fit(name, params.get(name))

    def _check_fit(self, name: str, param: nn.Parameter | None) -> None:
        value, bits = self.values[name], self.bits[name]
        if param is None:
            raise ErasureError(
                f"{self.source} changes {name}, which the model does not have; the file is "
                "damaged, erase again"
            )
        used = param.numel() % 8  # bits of the last byte that mean a weight; 0: all
        if bits.numel() != -(-param.numel() // 8) or (used and (bits[-1] >> used).item()):
            raise ErasureError(
                f"{self.source}: the places of {name} do not fit its shape {tuple(param.shape)}; "
                "the file is damaged, erase again"
            )
        check_values(self.source, name, value, bits)
        if not torch.equal(_pattern(value.to(param.dtype).to(value.dtype)), _pattern(value)):
            kinds = [str(tensor.dtype).removeprefix("torch.") for tensor in (value, param)]
            raise ErasureError(
                f"{self.source} holds {kinds[0]} values of {name} that {kinds[1]} weights would "
                f"round; load the base in {kinds[0]}, or round on purpose with "
                f"delta.rounded(torch.{kinds[1]})"
            )

    def apply(self, model: DiffusionModel) -> DiffusionModel:
        """Put the changed values into a base model, in place, and return it; all is checked before
        any weight is changed."""
        self.check(model)
        self._put(model, self.values)
        return model

    @contextmanager
    def applied(self, model: DiffusionModel) -> Iterator[DiffusionModel]:
        """The erased model within the block; after it, whatever happened there, the base again, bit
        for bit."""
        self.check(model)
        old = self._held(model)
        try:
            self._put(model, self.values)
            yield model
        finally:
            self._put(model, old)

    def _held(self, model: DiffusionModel) -> dict[str, Tensor]:
        """The model's own values of the weights that the delta changes."""
        params = model.parameters()
        return {
            name: params[name].detach().cpu().flatten().index_select(0, self.places(name))
            for name in self.values
        }

    @torch.no_grad()
    def _put(self, model: DiffusionModel, values: Mapping[str, Tensor]) -> None:
        params = model.parameters()
        for name, value in values.items():
            param = params[name]
            param.copy_(
                param.flatten()
                .scatter(0, self.places(name).to(param.device), value.to(param))
                .view(param.shape)
            )
        model.refresh_fingerprint()

    def inverse(self, base: DiffusionModel) -> ErasedDelta:
        """The delta that undoes this one: it turns base + delta into the base again, bit for bit,
        and refuses any other model.

        A delta holds new values only, so the old ones come from `base`, which is left as it was
        found.
        """
        self.check(base)
        old = self._held(base)
        with self.applied(base) as erased:
            fingerprint = erased.fingerprint
        named = {
            "base_fingerprint": fingerprint,
            "base_id": f"{base.name} without {self.title}",
            "concepts": "[]",
        }
        metadata = {**self.metadata, **named, "undoes": self.sha256}
        for key in ("after", "parts", "requests"):  # all that they tell of is undone at once
            metadata.pop(key, None)
        return ErasedDelta(old, self.bits, metadata)

    def rounded(self, dtype: torch.dtype) -> ErasedDelta:
        """The same change in a narrower dtype: half the size, exact for a model in that dtype, no
        longer exact for a wider one.

        Raises:
            ErasureError: a value is beyond the dtype's range.
        """
        values = {name: value.to(dtype) for name, value in self.values.items()}
        if beyond := [name for name, value in values.items() if not all_finite(value)]:
            raise ErasureError(
                f"{self.source}: {beyond[0]} has values beyond the range of {dtype}; use bfloat16 "
                "or float32"
            )
        return replace(self, values=values)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all.

        For each changed parameter it holds `values.NAME` and, whichever is smaller, `bits.NAME` or
        `gaps.NAME` (`erase.tensors`).
        """
        tensors = stored_tensors(self.values, self.bits)
        save_tensors(path, tensors, {**self.metadata, "format": "delta"})

    @classmethod
    def load(cls, path: str | Path) -> ErasedDelta:
        """Read a delta.

        Args:
            path: of the file, or of the folder of the run that wrote it.

        Raises:
            ErasureError: a missing, damaged or foreign file, metadata that lack something or say
                what cannot be, or values that do not fit their places; it names the file and the
                tensor.
        """
        path = delta_file(path)
        values, bits, metadata = read_delta(path)
        return cls(values, bits, metadata, str(path))


def difference(base: Tensor, new: Tensor) -> tuple[Tensor, Tensor] | None:
    """Values of `new` where it differs from `base`, and packed bits that say where; None if it is
    the same."""
    changed = _pattern(new) != _pattern(base)
    places = indices(changed)
    return (new.flatten().index_select(0, places).cpu(), pack(changed)) if len(places) else None


def _pattern(tensor: Tensor) -> Tensor:
    """The bits of floating point values, so that 0.0 and -0.0 differ."""
    return tensor.contiguous().view(
        {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    )
