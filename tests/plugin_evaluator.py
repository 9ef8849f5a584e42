"""An evaluator of another package; tests/test_plugins.py copies the file into such a one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch

from erase.eval.case import Case
from erase.eval.evaluators import Evaluator
from erase.eval.scores import Score, mean_score, proportion
from erase.parallel.processes import in_shares
from erase.prompts.errors import FRACTION, ErasureError, check_ranges


@dataclass
class BrightnessConfig:
    """brightness: how bright the images are, and how far the weights moved."""

    threshold: float = 0.5
    """mean value from which on an image is bright"""
    batch_size: int = 16
    """images looked at together; no score depends on it"""

    def __post_init__(self) -> None:
        check_ranges(self, {"threshold": FRACTION})


def check(case: Case, config: BrightnessConfig) -> None:
    """Refuse prompts that ask for the dark."""
    for row in case.images.rows:
        if "dark" in row.prompt:
            raise ErasureError(f"brightness cannot judge {row.prompt!r}; leave it out")


def evaluate(case: Case, config: BrightnessConfig) -> list[Score]:
    """The share of bright images, and their mean brightness beside the base's, in [-100, 100]."""
    images, base_images = case.images, case.base_images

    def look(rows: range) -> list[tuple[float, float]]:
        own, base = (
            one.tensor(one.rows[row] for row in rows).mean((1, 2, 3))
            for one in (images, base_images)
        )
        return list(zip(own.tolist(), base.tolist(), strict=True))

    check(case, config)
    seen = list(
        chain.from_iterable(
            in_shares(len(images.rows), config.batch_size, look, "brightness", "image")
        )
    )
    bright = sum(own > config.threshold for own, _ in seen)
    case.add_extra("brightness", {"darkest": min(own for own, _ in seen), "moved": moved(case)})
    return [
        proportion("bright images", bright, len(seen)),
        mean_score(
            "brightness gained",
            [100 * (own - base) for own, base in seen],
            evaluator="a light meter",
        ),
    ]


def moved(case: Case) -> float:
    """Length of the way that the weights went; 0 for the base. Images alone have none."""
    if case.delta is None:
        return 0.0
    with case.base_model() as base:
        before = {name: param.detach().clone() for name, param in base.parameters().items()}
    with case.model() as erased:
        after = erased.parameters()
        return float(
            torch.stack([(after[name] - old).pow(2).sum() for name, old in before.items()])
            .sum()
            .sqrt()
        )


BRIGHTNESS = Evaluator("brightness", BrightnessConfig(), evaluate, check)
