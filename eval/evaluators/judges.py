"""Judges: classifiers that give each image one name of each kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from erase.eval.canvas.judges import load_classifier
from erase.eval.images import ImageRow, ImageSet
from erase.prompts.canvas import KINDS, vocabulary


@dataclass(frozen=True)
class Judge:
    """A classifier and the names of its classes."""

    name: str
    logits: Callable[[Tensor], Mapping[str, Tensor]]
    """(n, 3, H, W) -> kind -> (n, classes of that kind); behind them, the outputs that no class
    names, of which none is chosen and each has its share of probability"""
    classes: Mapping[str, Sequence[str]]
    """kind -> class names, in the order of the logits"""
    prepare: Callable[[Image.Image], Tensor] | None = None
    """an RGB image -> (3, H, W) as `logits` takes it; None: its values in [0, 1], all images of one
    size"""

    def batch(self, images: ImageSet, rows: Sequence[ImageRow]) -> Tensor:
        """The images of these rows, as `logits` takes them."""
        if self.prepare is None:
            return images.tensor(rows)
        return torch.stack([self.prepare(images.image(row)) for row in rows])


def canvas_judge() -> Judge:
    """The shipped classifier of the embedded world."""
    return Judge("canvas", load_classifier(), {kind: vocabulary().names(kind) for kind in KINDS})
