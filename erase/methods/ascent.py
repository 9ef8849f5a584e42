"""Gradient ascent on the denoising error of the concept (Thudi et al., EuroS&P 2022,
https://arxiv.org/abs/2109.13398).

No anchor is needed, and what comes in the concept's place is anything. The error has no upper
bound: NPO slows down by itself, here a ceiling is set. As a control, or where seconds count."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from erase.losses import denoising_rows
from erase.methods import Method
from erase.prompts.errors import POSITIVE, check_ranges
from erase.task import Edit, Task
from erase.training.batches import PromptedRows, retain_terms, weighed_batches
from erase.training.config import TrainConfig, TunedConfig
from erase.training.fine_tune import fine_tune
from erase.training.trainable import Base

PAPER, FEW_SHOT = "https://arxiv.org/abs/2109.13398", "https://arxiv.org/abs/2405.07288"


@dataclass
class AscentConfig(TunedConfig):
    """Settings of gradient ascent."""

    alpha: float = 1.0
    """weight of the retain loss; 0 is plain ascent, which needs no retain prompts"""
    ceiling: float = 2.0
    """denoising error of a latent (mean square of its elements; noise has 1) above which it is
    pushed no further"""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=100, lr=1e-5, batch_size=8)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"alpha": (0, 1e6), "ceiling": POSITIVE})


@dataclass
class FewShotConfig(AscentConfig):
    """The few-shot text encoder (Fuchi and Takagi, BMVC 2024): ascent of the encoder's MLPs on a
    few images.

    The paper adds the self-attention of the last layer."""

    draws = ("n_forget",)
    scope: str = r"^text_encoder(_\d)?\..*\.mlp\."
    alpha: float = 0.0
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=8,
            lr=1e-5,
            batch_size=2,
            optimizer_args={"betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 1e-8},
        )
    )


def edit(task: Task, config: AscentConfig) -> Edit:
    """Minimise -|eps(x_t, c) - noise|^2 + alpha |eps(x_t, c_r) - noise|^2, the first no
    further than the ceiling (over the encoder of c: Fuchi and Takagi, eq. 3)."""

    def loss(batch: tuple[PromptedRows, ...], base: Base) -> dict[str, Tensor]:
        (rows, prompts), *retained = batch
        errors = denoising_rows(task.predict(rows, prompts), rows.target)
        forgotten = -errors.clamp_max(config.ceiling).mean()
        return {"forget": forgotten, **retain_terms(task, config.alpha, retained)}

    batches = weighed_batches(task, config.train.batch_size, config.alpha)
    return fine_tune(task, loss, batches, config)


METHODS: dict[str, Method[Any]] = {
    "ascent": Method("ascent", PAPER, AscentConfig(), edit),
    "few-shot": Method("few-shot", FEW_SHOT, FewShotConfig(), edit),
}
