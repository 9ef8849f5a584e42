"""Work on single tensors: bits and gaps of what changed, the exact top k, digests, whether all is
finite.

Bits cost n / 8 bytes at any density; gaps about one byte per changed weight, which is less below a
density of 1/8. Indices are for work: selecting by them takes a fraction of the time that a boolean
mask takes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erase.prompts.errors import ErasureError

# values handled at a time: extra memory stays constant, and what a pass makes stays in a
# processor's cache
CHUNK = 1 << 20
RUN = 1 << 16  # gaps that are unfolded at a time, into 16 MB at most
WORKERS = 8
"""tensors digested at a time: each is on the CPU meanwhile"""


def all_finite(tensor: Tensor) -> bool:
    """Whether a floating point tensor holds neither NaN nor infinity.

    Its extremes tell (NaN is passed on to both): one pass without temporary tensors, a fraction of
    the time of `isfinite().all()`.
    """
    return not tensor.numel() or all(end.isfinite() for end in tensor.aminmax())


def exact(tensor: Tensor) -> Tensor:
    """Its values in float64, without history; on the CPU where the device has no such numbers
    (Apple's GPUs)."""
    plain = tensor.detach()
    return (plain.cpu() if plain.device.type == "mps" else plain).double()


def pack(mask: Tensor) -> Tensor:
    """A boolean tensor as bits: uint8, ceil(n / 8) bytes."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1), bitorder="little"))


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The boolean tensor of `shape` that was packed."""
    flat = np.unpackbits(bits.cpu().numpy(), count=math.prod(shape), bitorder="little")
    return torch.from_numpy(flat.view(np.bool_).reshape(shape))


def top_k(values: Mapping[str, Tensor], count: int) -> Iterator[tuple[str, Tensor]]:
    """Exactly the `count` largest of all values (0: none), as one boolean tensor per name; ties in
    the order of names, then index.

    Non-negative float32 numbers order as their bit patterns do, so the threshold is found by
    counting: one histogram of the high 16 bits, one of the low 16 bits within the threshold's bin.
    Two passes, no sort, constant extra memory.
    """
    if not count:
        yield from (
            (name, torch.zeros_like(value, dtype=torch.bool)) for name, value in values.items()
        )
        return
    threshold, above = _threshold(values, count)
    ties = count - above
    for name, value in values.items():
        mask = torch.empty(value.numel(), dtype=torch.bool, device=value.device)
        for part, bits in zip(_chunks([value]), mask.split(CHUNK), strict=True):
            pattern = _pattern(part)
            torch.gt(pattern, threshold, out=bits)
            equal = pattern == threshold
            if ties and (tied := int(equal.sum())):
                if tied > ties:
                    equal &= equal.cumsum(0) <= ties
                bits |= equal
                ties -= min(tied, ties)
        yield name, mask.view(value.shape)


def kth_largest(values: Mapping[str, Tensor], count: int) -> Tensor:
    """The count-th largest of all values, not negative, exactly; a float32 scalar."""
    threshold, _ = _threshold(values, count)
    return torch.tensor(threshold, dtype=torch.int32).view(torch.float32)


def _pattern(value: Tensor) -> Tensor:
    # adding 0.0 turns -0.0 into 0.0, whose pattern is not negative
    return (value + 0.0).view(torch.int32)


def _threshold(values: Mapping[str, Tensor], count: int) -> tuple[int, int]:
    """The bit pattern of the count-th largest value, and how many values lie strictly above it."""
    top, above = _bin_of(_counts(values, lambda pattern: pattern >> 16), count)
    low = _counts(values, lambda pattern: pattern[(pattern >> 16) == top] & 0xFFFF)
    bottom, within = _bin_of(low, count - above)
    return top << 16 | bottom, above + within


def _counts(values: Mapping[str, Tensor], digits: Callable[[Tensor], Tensor]) -> Tensor:
    """How often each 16-bit digit comes; on all threads, for counting is not threaded in itself,
    and small tensors together, for each histogram has all bins."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        counts = pool.map(
            lambda part: torch.bincount(digits(_pattern(part)), minlength=1 << 16).cpu(),
            _together(_chunks(values.values())),
        )
        return sum(counts, torch.zeros(1 << 16, dtype=torch.int64))


def _chunks(values: Iterable[Tensor]) -> Iterator[Tensor]:
    for value in values:
        yield from value.reshape(-1).split(CHUNK)


def _together(chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same values in as few chunks as their size and their devices allow."""
    held: list[Tensor] = []
    size = 0
    for chunk in chunks:
        if held and (size + len(chunk) > CHUNK or chunk.device != held[0].device):
            yield torch.cat(held)
            held, size = [], 0
        held.append(chunk)
        size += len(chunk)
    if held:
        yield torch.cat(held)


def _bin_of(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bin that holds the count-th largest value, and the number of values in the bins above
    it."""
    from_top = histogram.flip(0).cumsum(0)
    steps = int((from_top < count).sum())
    above = int(from_top[steps - 1]) if steps else 0
    return len(histogram) - 1 - steps, above


def indices(chosen: Tensor) -> Tensor:
    """Flat indices of what a boolean tensor chooses, ascending, int64, on its device."""
    if chosen.device.type == "cpu":  # numpy finds them several times as fast as torch
        return torch.from_numpy(np.flatnonzero(chosen.numpy()))
    return chosen.flatten().nonzero()[:, 0]


def to_gaps(bits: Tensor) -> Tensor:
    """Packed bits as gaps, shape (m,) uint8: each byte skips so many unchanged weights, then one
    changed weight follows.

    A byte of 255 skips 255 and none follows. The last one points behind the last bit, so that the
    length is known.
    """
    flat = np.unpackbits(bits.numpy(), bitorder="little")
    skipped = np.diff(np.append(np.flatnonzero(flat), flat.size), prepend=-1) - 1
    gaps = np.full(int((skipped // 255 + 1).sum()), 255, np.uint8)
    gaps[np.cumsum(skipped // 255 + 1) - 1] = skipped % 255
    return torch.from_numpy(gaps)


def span(gaps: Tensor) -> int:
    """Of how many weights, or bits, some gaps tell; counted, so that a few bytes which stand for
    many can be refused first.

    Raises:
        ErasureError: gaps that end in the middle.
    """
    size = int(gaps.sum(dtype=torch.int64)) + int((gaps < 255).sum()) - 1
    if not gaps.numel() or gaps[-1] == 255 or size % 8:
        raise ErasureError("the gaps end in the middle")
    return size


def from_gaps(gaps: Tensor) -> Tensor:
    """The packed bits that `to_gaps` was given; beyond them it takes little memory.

    Raises:
        ErasureError: gaps that end in the middle.
    """
    bits = np.zeros(span(gaps) // 8 + 1, np.uint8)  # the last gap points behind the last bit
    end = 0  # of the weights that the runs so far tell of
    for run in gaps.split(RUN):
        steps = run.numpy().astype(np.int64)
        follows = steps < 255
        ends = end + np.cumsum(steps + follows)
        start, end = end // 8, int(ends[-1])
        flat = np.zeros((end // 8 + 1 - start) * 8, np.uint8)
        flat[ends[follows] - 1 - start * 8] = 1
        bits[start : end // 8 + 1] |= np.packbits(flat, bitorder="little")
    return torch.from_numpy(bits[:-1])


def sha256_of(content: Any) -> str:
    """Digest of nested mappings and lists of tensors, numbers and texts: names, dtypes, shapes and
    every bit.

    Each tensor is digested on its own, so that several threads work (hashlib lets them): 1.5 GB/s a
    core. The order of a mapping's keys does not matter.
    """
    names, leaves = [], []
    for name, leaf in _leaves(content, ""):
        names.append(name)
        leaves.append(leaf)
    with ThreadPoolExecutor(WORKERS) as pool:
        digests = list(pool.map(_digest_of, leaves))
    whole = hashlib.sha256()
    for name, digest in sorted(zip(names, digests, strict=True)):
        whole.update(f"{name} {digest}\n".encode())
    return whole.hexdigest()


def _leaves(content: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping):
        items: Any = content.items()
    elif isinstance(content, list | tuple):
        items = enumerate(content)
    else:
        yield name, content
        return
    yield name, f"{len(content)} items"  # so that an empty one is seen
    for key, value in items:
        yield from _leaves(value, f"{name}/{key}")


def _digest_of(leaf: Any) -> str:
    if not torch.is_tensor(leaf):
        return hashlib.sha256(repr(leaf).encode()).hexdigest()
    tensor: Tensor = leaf.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
