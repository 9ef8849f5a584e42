"""NPO: negative preference optimisation (Zhang et al., COLM 2024,
https://arxiv.org/abs/2404.05868).

Gradient ascent that slows down by itself: the weight of a latent falls as its error rises above the
base's, so that the model does not collapse. Where there is no anchor, and ascent goes too far."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from erase.losses import denoising_rows
from erase.methods import Method
from erase.prompts.errors import POSITIVE, check_ranges
from erase.task import Edit, Task
from erase.training.batches import PromptedRows, retain_terms, weighed_batches
from erase.training.config import TrainConfig, TunedConfig
from erase.training.fine_tune import fine_tune
from erase.training.trainable import Base

PAPER = "https://arxiv.org/abs/2404.05868"


@dataclass
class NPOConfig(TunedConfig):
    """Settings of NPO."""

    beta: float = 20.0
    """how soon a latent is let go, in units of mean squared error (the paper's 0.1 counts nats of a
    sentence): its weight has fallen to a quarter where the error has risen by 2 / beta"""
    alpha: float = 1.0
    """weight of the retain loss"""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=200, lr=1e-5, batch_size=8)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"beta": POSITIVE, "alpha": (0, 1e6)})


def preference(error: Tensor, reference: Tensor, beta: float) -> Tensor:
    """-(2 / beta) log sigmoid(beta (error - reference)), mean over rows: the log likelihood of a
    latent is minus its denoising error.

    Its gradient is that of -error, times 2 sigmoid(-beta (error - reference)): 1 at the base, 0 far
    above. With beta -> 0 it is gradient ascent.

    Args:
        error: of each row by the model, shape (n,).
        reference: by the base, same rows, noise and timesteps.
        beta: above 0.
    """
    return -2 / beta * F.logsigmoid(beta * (error - reference)).mean()


def edit(task: Task, config: NPOConfig) -> Edit:
    """Minimise `preference` on forget latents + alpha |eps(x_t, c_r) - noise|^2."""

    def loss(batch: tuple[PromptedRows, ...], base: Base) -> dict[str, Tensor]:
        (rows, prompts), *retained = batch
        with base():
            reference = denoising_rows(task.predict(rows, prompts), rows.target)
        error = denoising_rows(task.predict(rows, prompts), rows.target)
        forgotten = preference(error, reference, config.beta)
        return {"forget": forgotten, **retain_terms(task, config.alpha, retained)}

    batches = weighed_batches(task, config.train.batch_size, config.alpha)
    return fine_tune(task, loss, batches, config)


METHODS = {"npo": Method("npo", PAPER, NPOConfig(), edit)}
