"""Digests of tensors: whether a file still holds what was written, and whether two runs work on the same data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

WORKERS = 8
"""tensors digested at a time: each is on the CPU meanwhile"""


def sha256_of(content: Any) -> str:
    """Digest of nested mappings and lists of tensors, numbers and texts: names, dtypes, shapes and every bit.

    Each tensor is digested on its own, so that several threads work (hashlib lets them): 1.5 GB/s a core.
    The order of a mapping's keys does not matter.
    """
    names, leaves = [], []
    for name, leaf in _leaves(content, ""):
        names.append(name)
        leaves.append(leaf)
    with ThreadPoolExecutor(WORKERS) as pool:
        digests = list(pool.map(_digest, leaves))
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


def _digest(leaf: Any) -> str:
    if not torch.is_tensor(leaf):
        return hashlib.sha256(repr(leaf).encode()).hexdigest()
    found: Tensor = leaf.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{found.dtype} {tuple(found.shape)}".encode())
    digest.update(found.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
