"""The judges of the embedded world: a classifier with one head per kind of concept, and a small
CLIP in open_clip's format.

Both were trained on renders only, never on generated images (`scripts/canvas/train_judges.py`);
their card is `weights/README.md`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from erase.prompts.canvas import KINDS, vocabulary
from erase.prompts.errors import ErasureError

WEIGHTS = Path(__file__).parent / "weights"
SIDE = 64  # pixels; other sizes are resampled to it


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class CanvasClassifier(nn.Module):
    """Seven convolutions, a spatial mean, and a linear head for each of object, style and
    colour."""

    def __init__(self) -> None:
        super().__init__()
        widths = [
            (3, 32, 1),
            (32, 32, 2),
            (32, 64, 1),
            (64, 64, 2),
            (64, 96, 1),
            (96, 96, 2),
            (96, 128, 1),
        ]
        self.features = nn.Sequential(*(_stage(*width) for width in widths))
        self.heads = nn.ModuleDict(
            {kind: nn.Linear(128, len(vocabulary().names(kind))) for kind in KINDS}
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits per kind.

        Args:
            images: shape (n, 3, H, W), float in [0, 1]; resampled to 64 px where H or W differs.

        Returns:
            kind -> logits of shape (n, concepts of that kind), in the vocabulary's order.
        """
        pooled = self.pooled(images)
        return {kind: head(pooled) for kind, head in self.heads.items()}

    def pooled(self, images: Tensor) -> Tensor:
        """What the heads see: features of shape (n, 128), of the same images."""
        if images.shape[-2:] != (SIDE, SIDE):
            images = F.interpolate(
                images, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False
            )
        features: Tensor = self.features(images * 2 - 1).mean((-2, -1))
        return features


@cache
def load_classifier() -> CanvasClassifier:
    """The shipped classifier, in float32 and eval mode; loaded once.

    Raises:
        ErasureError: the weights are missing.
    """
    path = WEIGHTS / "classifier.safetensors"
    if not path.is_file():
        raise ErasureError(
            f"the canvas classifier is missing: {path}; train it with `python "
            "scripts/canvas/train_judges.py`"
        )
    classifier = CanvasClassifier()
    classifier.load_state_dict(load_file(path))
    return classifier.eval().requires_grad_(False)


def clip_folder() -> Path:
    """The folder of the shipped CLIP:
    `open_clip.create_model_and_transforms(f"local-dir:{clip_folder()}")` loads it.

    Raises:
        ErasureError: the folder has no weights.
    """
    folder = WEIGHTS / "clip"
    if not (folder / "open_clip_model.safetensors").is_file():
        raise ErasureError(
            f"the canvas CLIP is missing: {folder}; train it with `python "
            "scripts/canvas/train_judges.py`"
        )
    return folder
