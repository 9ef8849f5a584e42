"""Latents of an erasure's images, with their prompts: a value, kept in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from erase.files import errors_named
from erase.prompts.errors import ErasureError
from erase.tensor_files import load_tensors, save_tensors

T = TypeVar("T")
TENSORS, TEXTS = ("latents", "std", "shows_anchor", "image", "noise", "t"), ("prompts", "anchors")
"""columns of a set's file: as tensors, and as texts in its metadata"""


@dataclass(frozen=True)
class LatentSet:
    """Latents with one prompt each, and for forget latents the anchor prompt beside it."""

    latents: Tensor
    """posterior means, scaled as the denoiser sees them, shape (n, c, h, w)"""
    std: Tensor | None
    """posterior standard deviations, same shape: the latent is drawn anew at each use; None for
    sampled latents"""
    prompts: tuple[str, ...]
    """one prompt per latent"""
    anchors: tuple[str, ...] | None = None
    """one anchor prompt per forget latent; None for retain latents"""
    shows_anchor: Tensor | None = None
    """whether a latent shows its anchor instead of its prompt, shape (n,), bool; None: none does"""
    image: Tensor | None = None
    """number of the image that a latent is a point of, shape (n,), int64, ascending; None: each is
    an image of its own"""
    noise: Tensor | None = None
    """the noise that each latent is to be seen under, shape of the latents; None: drawn anew at
    each use"""
    t: Tensor | None = None
    """training timesteps that go with it, shape (n,), int64"""

    def __len__(self) -> int:
        return len(self.latents)

    def concept_rows(self) -> Tensor:
        """One row of each image that shows its prompt; of points, one of every stretch of the
        trajectories in turn."""
        rows = torch.arange(len(self))
        if self.shows_anchor is not None:
            rows = rows[~self.shows_anchor]
        if self.image is None:
            return rows

        first, count = 0, 0
        indices = []
        for points in torch.unique_consecutive(self.image[rows], return_counts=True)[1].tolist():
            indices.append(first + count % points)
            first, count = first + points, count + 1
        return rows[torch.tensor(indices, dtype=torch.long)]

    def at(self, rows: Tensor) -> LatentSet:
        """The set of these rows alone, in this order."""
        columns = {name: getattr(self, name) for name in TENSORS}
        part = {name: value[rows] for name, value in columns.items() if value is not None}
        anchors = self.anchors and tuple(texts_of(self.anchors, rows))
        return replace(self, prompts=tuple(texts_of(self.prompts, rows)), anchors=anchors, **part)

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Latents of these rows: a posterior sample each, where they come from images."""
        mean = self.latents[rows]
        if self.std is None:
            return mean
        return mean + self.std[rows] * torch.randn(mean.shape, generator=generator)

    def draw_noise(
        self, rows: Tensor, timesteps: int, generator: torch.Generator, power: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Timestep and noise for these rows: their own, or drawn from `timesteps` and the normal
        distribution.

        Args:
            rows: places in the set, shape (n,).
            timesteps: T, how many there are; the last is pure noise.
            generator: of the draws.
            power: p; the share of timesteps below t is (t / T)^p, so 1 is uniform.
        """
        if self.t is not None and self.noise is not None:
            return self.t[rows], self.noise[rows]
        if power == 1:
            t = torch.randint(timesteps, (len(rows),), generator=generator)
        else:
            places = torch.rand(len(rows), generator=generator, dtype=torch.float64)
            t = (timesteps * places ** (1 / power)).long().clamp_max(timesteps - 1)
        return t, torch.randn((len(rows), *self.latents.shape[1:]), generator=generator)

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the set."""
        columns = {name: getattr(self, name) for name in TENSORS}
        tensors = {name: value for name, value in columns.items() if value is not None}
        texts = {name: json.dumps(getattr(self, name)) for name in TEXTS}
        save_tensors(
            path, tensors, {**metadata, **texts, "format": "latents", "sha256": _digest(tensors)}
        )

    @classmethod
    def load(cls, path: Path, made_from: str | None = None) -> LatentSet:
        """Read a set.

        Args:
            path: of the file.
            made_from: digest of what it must have been made from; None: whatever it was.

        Raises:
            ErasureError: a missing, damaged or foreign file, texts that do not fit the latents, or
                a set that was made from something else.
        """
        tensors, metadata = load_tensors(path, "latents")
        if metadata.get("sha256") != _digest(tensors):
            raise ErasureError(
                f"{path} is damaged (its checksum differs); delete it to make it again"
            )
        if made_from is not None and metadata.get("made_from") != made_from:
            raise ErasureError(
                f"{path} holds latents that were made from something else; delete it to make them "
                "again"
            )

        with errors_named(path, "delete it to make it again"):
            prompts, anchors = (json.loads(metadata[name]) for name in TEXTS)
            columns = {name: tensors.get(name) for name in TENSORS}
            _check(path, columns, prompts, anchors)
        texts = tuple(prompts), None if anchors is None else tuple(anchors)
        further = (columns[name] for name in ("shows_anchor", "image", "noise", "t"))
        return cls(tensors["latents"], columns["std"], *texts, *further)


def _check(
    path: Path, tensors: Mapping[str, Tensor | None], prompts: list[str], anchors: list[str] | None
) -> None:
    """Refuse columns that do not fit each other."""
    latents = tensors["latents"]
    assert latents is not None
    texts = [prompts] if anchors is None else [prompts, anchors]
    if any(not isinstance(column, list) or len(column) != len(latents) for column in texts):
        raise ErasureError(
            f"{path}: {len(prompts)} prompts for {len(latents)} latents; delete it to make it again"
        )

    words = all(isinstance(text, str) for column in texts for text in column)
    present = {name: value for name, value in tensors.items() if value is not None}
    images = [value for name, value in present.items() if name in ("latents", "std", "noise")]
    floats = all(value.is_floating_point() and value.isfinite().all() for value in images)
    shaped = latents.dim() == 4 and all(value.shape == latents.shape for value in images)
    kinds = {"shows_anchor": torch.bool, "image": torch.int64, "t": torch.int64}
    listed = all(
        value.dtype == kinds[name] and value.shape == latents.shape[:1]
        for name, value in present.items()
        if name in kinds
    )
    timed = (tensors["noise"] is None) == (tensors["t"] is None)
    image = tensors["image"]
    ascending = image is None or bool((image.diff() >= 0).all())
    if not (words and floats and shaped and listed and timed and ascending):
        raise ErasureError(
            f"{path} does not hold prompts and latents of shape (n, c, h, w); delete it to make it "
            "again"
        )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Checksum of a set's values: flipped bits may well leave them finite."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def texts_of(texts: Sequence[str], rows: Tensor) -> list[str]:
    """The texts of these rows, for example their prompts."""
    return [texts[row] for row in rows.tolist()]


def epoch_rows(n: int, start: int, count: int, seed: int, shuffle: bool = True) -> Tensor:
    """Rows `start .. start + count` of an endless stream in which every epoch holds each of `n`
    rows exactly once.

    A function of its arguments alone, so that a resumed run goes on in the same order.
    """
    rows = []
    for epoch in range(start // n, (start + count - 1) // n + 1):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)
        rows.append(order[max(start - epoch * n, 0) : start + count - epoch * n])
    return torch.cat(rows)


def in_turn(groups: Sequence[Sequence[T]], start: int, count: int, seed: int) -> list[T]:
    """Items `start .. start + count` of an endless stream that takes one of each group in turn, a
    group's own in the order of `epoch_rows`: each group comes equally often, whatever its
    length."""
    items = []
    for i in range(start, start + count):
        group = groups[i % len(groups)]
        items.append(group[int(epoch_rows(len(group), i // len(groups), 1, seed))])
    return items


class Source(Protocol):
    """Where an erasure's latents come from."""

    def forget(self, anchor_share: float = 0.0, power: float = 1.0) -> LatentSet:
        """Latents of the concepts; so large a fraction of them shows the anchor. `power` as in
        `LatentSet.draw_noise`, of points whose noise is fixed."""

    def retain(self, power: float = 1.0) -> LatentSet:
        """Latents of what must stay."""


@dataclass(frozen=True)
class Given:
    """Latents that are at hand already."""

    forget_set: LatentSet
    retain_set: LatentSet

    def forget(self, anchor_share: float = 0.0, power: float = 1.0) -> LatentSet:
        return _drawn(self.forget_set, power)

    def retain(self, power: float = 1.0) -> LatentSet:
        return _drawn(self.retain_set, power)


def _drawn(latents: LatentSet, power: float) -> LatentSet:
    """The set, whose timesteps are not fixed where a law is asked for."""
    if power != 1 and latents.t is not None:
        raise ErasureError(
            f"noise_power {power:g} says how timesteps are drawn, and the latents that are given "
            "fix theirs; set noise_power 1"
        )
    return latents
