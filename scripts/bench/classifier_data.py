"""The world of the classifier bench: images, what is to be forgotten of them, and a small network.

scikit-learn ships one set of images, 1,797 digits of 8 x 8 pixels; its other bundled sets are
tables of two or three classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from erase.prompts.errors import unknown

SCENARIOS = ("class", "random")
"""class: all training images of the digit `seed % 10`, which the test set then lacks too; random:
a tenth of the training images"""
CLASSES = 10
TRAIN_SHARE, FORGET_SHARE = 0.6, 0.1


@dataclass(frozen=True)
class Samples:
    """Labelled images."""

    images: Tensor
    """float32, (n, 1, 8, 8), 0 to 1"""
    labels: Tensor
    """int64, (n,)"""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> Samples:
        """Rows, by a boolean mask or by indices."""
        return Samples(self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class Split:
    """Training images in two parts, and the images that no network has seen."""

    forget: Samples
    retain: Samples
    test: Samples

    @property
    def train(self) -> Samples:
        """What the base was trained on."""
        both = (self.forget, self.retain)
        images = torch.cat([part.images for part in both])
        return Samples(images, torch.cat([part.labels for part in both]))


@cache
def digits() -> Samples:
    """All images, in the order of the file."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / bunch.images.max()
    return Samples(images, torch.tensor(bunch.target, dtype=torch.int64))


def split(scenario: str, seed: int) -> Split:
    """Draw training, test and forgotten images.

    Raises:
        ErasureError: an unknown scenario.
    """
    if scenario not in SCENARIOS:
        raise unknown("scenario", scenario, SCENARIOS)
    everything, generator = digits(), torch.Generator().manual_seed(seed)
    order = torch.randperm(len(everything), generator=generator)
    count = int(TRAIN_SHARE * len(order))
    train, test = everything[order[:count]], everything[order[count:]]
    if scenario == "class":
        own = train.labels == seed % CLASSES
        test = test[test.labels != seed % CLASSES]
    else:
        own = torch.arange(count) < int(FORGET_SHARE * count)
    return Split(train[own], train[~own], test)


class Network(nn.Module):
    """Three convolutions and two linear layers, 22,954 weights. No batch norm: its running
    statistics would change outside of every mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Linear(64, CLASSES),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (n, 10)."""
        return self.layers(images)


def network(seed: int) -> Network:
    """An untrained network; the global random stream stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network()
