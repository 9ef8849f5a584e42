"""Functions shared by evaluators that look at what was kept: the images of prompts that ask for no
forgotten concept, beside the base's of the same prompts and seeds, or beside a folder of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from erase.eval.case import Case
from erase.eval.images import ImageRow, ImageSet, read
from erase.eval.report.figures import matched
from erase.latents.image_files import suffixes
from erase.parallel.processes import in_shares
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_rows import asks_for

LEAST = 3
"""images that any of the intervals needs"""
Pair = tuple[Image.Image, Image.Image]
Features = Callable[[Sequence[Image.Image]], Tensor]
"""n images -> their features, (n, d)"""


@dataclass(frozen=True)
class Pairs:
    """Images of the retained prompts: the base's, and that of the model under evaluation."""

    base: ImageSet
    own: ImageSet
    rows: list[tuple[ImageRow, ImageRow]]
    """in both, by case"""

    @property
    def cases(self) -> list[int]:
        """Number of each pair's case."""
        return [row.case for row, _ in self.rows]

    def images(self, places: Iterable[int]) -> list[Pair]:
        """The base's image and the other's of each pair.

        Raises:
            ErasureError: one is no image, or the two differ in size.
        """
        pairs = []
        for place in places:
            first, second = self.rows[place]
            pair = self.base.image(first), self.own.image(second)
            if pair[0].size != pair[1].size:
                raise ErasureError(
                    f"{self.own.path(second)} is {pair[1].width} x {pair[1].height} pixels, the "
                    f"base's {pair[0].width} x {pair[0].height}; generate both at one size"
                )
            pairs.append(pair)
        return pairs

    def features(self, places: Sequence[int], features: Features) -> tuple[np.ndarray, np.ndarray]:
        """Features of the base's images and of the others, each (places, d), float64; looked at
        once where both are the same images."""
        pairs = self.images(places)
        first = np.asarray(features([base for base, _ in pairs]), np.float64)
        if self.own is self.base:
            return first, first
        return first, np.asarray(features([own for _, own in pairs]), np.float64)


def retained(case: Case) -> list[ImageRow]:
    """Rows of the base whose prompts and labels name no forgotten concept and no synonym of it."""
    names = [name for concept in case.concepts for name in concept.names]
    return [row for row in case.base_images.rows if not asks_for(row.prompt, row.labels, names)]


def retained_pairs(case: Case) -> Pairs:
    """The case's images of retained prompts, each beside the base's.

    Raises:
        ErasureError: there are too few, or the base has other prompts and seeds.
    """
    rows = retained(case)
    if len(rows) < LEAST:
        raise ErasureError(
            f"{len(rows)} of {len(case.base_images.rows)} prompts ask for no forgotten concept, "
            f"and at least {LEAST} are needed to see what was kept; use a prompt set with more of "
            "them"
        )
    return Pairs(case.base_images, case.images, matched(case.base_images, case.images, rows))


def reference_files(folder: str) -> list[Path]:
    """Image files of a folder and those below it, by name.

    Raises:
        ErasureError: there is no such folder, or it holds too few images.
    """
    known = suffixes()
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in known)
    if len(files) < LEAST:
        raise ErasureError(
            f"the reference folder {folder} holds {len(files)} images, and at least {LEAST} are "
            "needed; name a folder of image files"
        )
    return files


def reference_features(folder: str, features: Features, batch_size: int) -> np.ndarray:
    """Features of a folder's images, (images, d), float64.

    Raises:
        ErasureError: it holds too few images, or one cannot be read.
    """
    files = reference_files(folder)

    def look(rows: range) -> np.ndarray:
        images = [read(files[row]) for row in rows]
        return np.asarray(features(images), np.float64)

    return np.concatenate(in_shares(len(files), batch_size, look, "reference", "image"))


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """Images of one size as bytes, shape (n, 3, H, W), uint8."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def in_sizes(features: Callable[..., Tensor], *columns: Sequence[Image.Image]) -> Tensor:
    """Features of images of any sizes: those of one size are looked at together, in their order.

    Args:
        features: takes as many batches as there are columns, and gives a row for each of their
            rows.
        columns: as long as each other; the images of a row are of one size.
    """
    sizes = [image.size for image in columns[0]]
    found: dict[int, Tensor] = {}
    for size in dict.fromkeys(sizes):
        places = [place for place, own in enumerate(sizes) if own == size]
        batches = []
        for column in columns:
            batches.append(pixels([column[place] for place in places]))
        found |= zip(places, features(*batches), strict=True)
    return torch.stack([found[place] for place in range(len(sizes))])
