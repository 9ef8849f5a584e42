"""The weights of a foreign file beside the base's: which of them differ, by more than rounding.

A value is compared in the file's own dtype: one that equals the base rounded to that dtype is not
changed, and keeps the base's full precision. So a float16 copy of a float32 base is no change at
all. The values that do differ are taken as the file has them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from erase.delta import difference
from erase.foreign.names import Places
from erase.models.single_file import ldm
from erase.models.single_file.filling import converted
from erase.models.single_file.tensor_file import TensorFile
from erase.prompts.errors import ErasureError, near_name

HALVES = (torch.float16, torch.bfloat16)


@dataclass
class Changes:
    """What a source changes, as far as it has been read."""

    values: dict[str, Tensor] = field(default_factory=dict)
    """parameter -> its new values where they differ, flat"""
    bits: dict[str, Tensor] = field(default_factory=dict)
    """parameter -> packed bits of where"""
    given: dict[str, str] = field(default_factory=dict)
    """parameter that the source gives -> the key that it stands under"""
    dtypes: Counter[str] = field(default_factory=Counter)
    """dtype in the file -> tensors of it"""
    rounded: int = 0
    """values that differ from the base by its rounding alone, which are not counted as changed"""
    left_out: list[str] = field(default_factory=list)
    """what of the source does not come into the delta, in words"""

    def add(self, name: str, base: Tensor, new: Tensor) -> None:
        """Compare one weight with the base's."""
        self.dtypes[_short(new.dtype)] += 1
        change = compared(base, new)
        self.rounded += int((base.to(torch.float64) != new.to(torch.float64)).sum())
        if change:
            self.values[name], self.bits[name] = change
            self.rounded -= change[0].numel()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compared(base: Tensor, new: Tensor) -> tuple[Tensor, Tensor] | None:
    """The values of `new` that differ from `base` by more than rounding, in the base's dtype where
    that holds them, and packed bits of where they are; None if there are none.

    A tensor of a wider dtype than a half that is, as a whole, the base rounded to a half is what a
    half-precision copy becomes when it is written in float32, and no change either.
    """
    change = difference(base.to(new.dtype), new)
    if change is None:
        return None
    if new.dtype not in HALVES and any(
        torch.equal(base.to(half).to(new.dtype), new) for half in HALVES
    ):
        return None
    values, bits = change
    exact = values.to(base.dtype)
    return (exact if torch.equal(exact.to(values.dtype), values) else values), bits


def read_weights(
    file: TensorFile,
    known: Places,
    base: Mapping[str, Tensor],
    fixed: Mapping[str, Tensor],
    changes: Changes,
    prefix: str = "",
) -> list[str]:
    """Compare all weights of a file, into `changes`.

    Args:
        file: an open checkpoint.
        known: the names that it may use.
        base: the weights that may change.
        fixed: weights of the base that no delta changes, its VAE's; where a file has others, they
            are left out.
        changes: what earlier files of the same source gave.
        prefix: to put before each name, of a file that lies in its component's folder.

    Returns:
        The keys that are no weight of the base.

    Raises:
        ErasureError: a weight of another shape, one that is not finite or quantised, one that is
            given twice with different values, or names that two text encoders could mean.
    """
    weights = {**base, **fixed}
    entries, strange = _entries(file, known, weights, prefix)
    others = []
    for key, entry in entries.items():
        tensor = file.read(key)
        # every loader makes float32 of float64
        own = torch.float32 if tensor.dtype == torch.float64 else tensor.dtype
        tensor = converted(tensor, own, f"{file.path}: {key}")
        for name, new in zip(entry.names, entry.unpack(tensor), strict=True):
            new = new.reshape(weights[name].shape)
            if name in fixed:
                others += [name] if compared(fixed[name], new) else []
            elif name in changes.given:
                _check_same(file, name, changes, base[name], new, key)
            else:
                changes.given[name] = key
                changes.add(name, base[name], new)
    for component, count in Counter(name.split(".")[0] for name in others).items():
        changes.left_out.append(
            f"its {component}, which differs from the base's in {count} tensors; the base's is used"
        )
    return strange


def _entries(
    file: TensorFile, known: Places, weights: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, ldm.Entry], list[str]]:
    """The weight of each key, all of them in the base's shapes; and the keys that are none."""
    options = {key: known.get(prefix + key) or known.get(key, []) for key in file.shapes}
    component = _component(file, options, weights)
    entries: dict[str, ldm.Entry] = {}
    unfit = []
    for key, meant in options.items():
        if not meant:
            continue
        mine = [one for one in meant if one.names[0].split(".")[0] == component]
        entries[key] = (mine or meant)[0]
        if not _fits(entries[key], file.shapes[key], weights):
            unfit.append(key)
    if unfit:
        raise _of_another_size(file, unfit, entries, weights)
    return entries, [key for key, meant in options.items() if not meant]


def _component(
    file: TensorFile, options: Mapping[str, Iterable[ldm.Entry]], weights: Mapping[str, Tensor]
) -> str | None:
    """The one component that the names of several can only mean, by their shapes."""
    left: set[str] | None = None
    asked: set[str] = set()
    for key, meant in options.items():
        named = {entry.names[0].split(".")[0]: entry for entry in meant}
        if len(named) < 2:
            continue
        asked |= named.keys()
        fitting = {part for part, one in named.items() if _fits(one, file.shapes[key], weights)}
        left = fitting if left is None else left & fitting
    if left is None:
        return None
    if len(left) > 1:
        names = " or ".join(sorted(left))
        raise ErasureError(
            f"{file.path} names its weights so that they may be of {names}; put the component's "
            f"name before each, or the file into a folder of that name"
        )
    return left.pop() if left else min(asked)


def _fits(entry: ldm.Entry, shape: tuple[int, ...], weights: Mapping[str, Tensor]) -> bool:
    wanted = entry.shape(tuple(weights[entry.names[0]].shape))
    # some programs write 1x1 convolutions as linear layers, and the other way round
    return shape == wanted or (
        len({len(shape), len(wanted)}) == 2 and _matrix(shape) == _matrix(wanted)
    )


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    if len(shape) == 2:
        return shape
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else None


def _of_another_size(
    file: TensorFile,
    unfit: list[str],
    entries: Mapping[str, ldm.Entry],
    weights: Mapping[str, Tensor],
) -> ErasureError:
    key = unfit[0]
    wanted = entries[key].shape(tuple(weights[entries[key].names[0]].shape))
    return ErasureError(
        f"{file.path} is not of this base: {len(unfit)} of its {len(file.shapes)} tensors have "
        f"another shape, the first is {key}, {list(file.shapes[key])} there and {list(wanted)} in "
        "the base; name the checkpoint that it was made from with --model"
    )


def _check_same(
    file: TensorFile, name: str, changes: Changes, base: Tensor, new: Tensor, key: str
) -> None:
    """Refuse a weight that stands twice with different values; the same one under two names, as a
    module that is held twice has it, is one."""
    again = compared(base, new)
    values, bits = changes.values.get(name), changes.bits.get(name)
    if again is None and values is None:
        return
    if again and values is not None and bits is not None and torch.equal(again[1], bits):
        if torch.equal(again[0], values):
            return
    raise ErasureError(
        f"{file.path} gives {name} twice with different values, as {changes.given[name]} and as "
        f"{key}; take one of them out"
    )


def nowhere(file: TensorFile, known: Iterable[str], what: str | None) -> ErasureError:
    """The refusal of a file of whose tensors none is a weight of the base."""
    if not file.shapes:
        return ErasureError(f"{file.path} holds no tensors at all; fetch it again")
    key = next(iter(file.shapes))
    near = near_name(key, known)
    hint = f" (the nearest name of the base is {near})" if near else ""
    of = f": it is {what}" if what else ""
    return ErasureError(
        f"{file.path} fits this base in none of its {len(file.shapes)} tensors{of}; the first is "
        f"{key} {list(file.shapes[key])}{hint}; name the checkpoint that it was made from with "
        "--model"
    )
