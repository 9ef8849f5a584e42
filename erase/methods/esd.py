"""ESD: erased Stable Diffusion (Gandikota et al., ICCV 2023, https://arxiv.org/abs/2303.07345).

Away from the concept, as negative guidance of the frozen base would lead. For a concept without a
substitute.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from erase.latents.batches import Rows, draw_rows
from erase.latents.latent_set import epoch_rows
from erase.losses import denoising
from erase.methods import Method
from erase.prompts.errors import FINITE, check_ranges
from erase.task import Edit, Task
from erase.training.config import TrainConfig, TunedConfig
from erase.training.fine_tune import fine_tune
from erase.training.trainable import Base


@dataclass
class ESDConfig(TunedConfig):
    """Settings of ESD; scope xattn is ESD-x, noxattn ESD-u, full ESD-full."""

    scope: str = "xattn"
    guidance: float = 1.0
    """eta: how far beyond the unconditional prediction"""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=200, lr=5e-5, batch_size=1)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"guidance": FINITE})


def edit(task: Task, config: ESDConfig) -> Edit:
    """Minimise |eps(x_t, c) - [eps_0(x_t) - eta (eps_0(x_t, c) - eps_0(x_t))]|^2 (eq. 5) on the
    concept's own latents."""
    forget, size = task.forget(), config.train.batch_size

    def batches(step: int) -> tuple[Rows, list[str]]:
        rows = epoch_rows(len(forget), step * size, size, task.seed)
        seen = draw_rows(task.model, forget, rows, task.generator(step))
        return seen, [forget.prompts[row] for row in rows]

    def loss(batch: tuple[Rows, list[str]], base: Base) -> dict[str, Tensor]:
        rows, prompts = batch
        with base():
            null, concept = task.predict(rows.cat(rows), [""] * len(rows) + prompts).chunk(2)
        target = null - config.guidance * (concept - null)
        return {"forget": denoising(task.predict(rows, prompts), target)}

    return fine_tune(task, loss, batches, config)


METHODS = {"esd": Method("esd", "https://arxiv.org/abs/2303.07345", ESDConfig(), edit)}
