"""Score forgetting distillation without data (Chen et al., ICLR 2025,
https://arxiv.org/abs/2409.11219).

The model trains on what it makes itself, in one step from noise, as it trains: no image and no
latent is drawn beforehand. Where sampling these would cost more than the training does."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from erase.latents.batches import Rows, clean, noised
from erase.latents.latent_set import epoch_rows, in_turn, texts_of
from erase.losses import denoising
from erase.methods import Method
from erase.prompts.errors import FRACTION, ErasureError, check_ranges
from erase.prompts.several import anchored_pairs, retained_prompts
from erase.task import Edit, Task
from erase.training.config import TrainConfig, TunedConfig
from erase.training.fine_tune import fine_tune
from erase.training.trainable import Base

PAPER = "https://arxiv.org/abs/2409.11219"


@dataclass
class SFDConfig(TunedConfig):
    """Settings of SFD."""

    draws = ()
    alpha: float = 1.0
    """weight of the retain loss"""
    init: float = 0.625
    """share of the timesteps at which pure noise stands when an image is made of it in one step"""
    lowest: float = 0.02
    """share of the timesteps below which nothing is learnt, as above 1 - this"""
    retain_dropout: float = 0.1
    """fraction of retained rows whose prompt is the empty one, so that guidance keeps its null
    branch"""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(1000, lr=1e-6, batch_size=8))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"alpha": (0, 1e6), "init": FRACTION, "retain_dropout": FRACTION})
        check_ranges(self, {"lowest": (0, 0.49)})


Half = tuple[Rows, Tensor, Tensor, list[str], list[str]]
"""noise (`_noise`), prompts, and those that the base answers in their place"""


def edit(task: Task, config: SFDConfig) -> Edit:
    """Minimise |eps(x_t, c) - eps_0(x_t, a)|^2 + alpha |eps(x_t, r) - eps_0(x_t, r)|^2, x_t noised
    from the image that the model as it is now makes of c, and of r, in one step."""
    pairs, size = anchored_pairs(task.concepts), config.train.batch_size
    kept = retained_prompts(task.concepts, task.earlier)
    if not kept:
        raise ErasureError("sfd holds the model to retained prompts, and there are none; give some")
    task.cond(["", *kept, *chain(*chain(*pairs))])  # while the text encoders are at hand

    def batches(step: int) -> tuple[Half, Half]:
        generator = task.generator(step)
        named, anchors = map(list, zip(*in_turn(pairs, step * size, size, task.seed), strict=True))
        texts = texts_of(kept, epoch_rows(len(kept), step * size, size, task.seed + 1))
        dropped = torch.rand(size, generator=generator) < config.retain_dropout
        texts = ["" if drop else text for text, drop in zip(texts, dropped, strict=True)]
        forget, retain = (_noise(task, config, size, generator) for _ in range(2))
        return (*forget, named, anchors), (*retain, texts, texts)

    def loss(batch: tuple[Half, Half], base: Base) -> dict[str, Tensor]:
        (pure, noise, t, named, anchors), (pure_r, noise_r, t_r, texts, _) = batch
        pure, prompts, n = pure.cat(pure_r), named + texts, len(named)
        with torch.no_grad():
            made = clean(task.model, pure, task.predict(pure, prompts))
        seen = noised(task.model, made, torch.cat([noise, noise_r]), torch.cat([t, t_r]))
        with base():
            wanted = task.predict(seen, anchors + texts)
        found = task.predict(seen, prompts)
        forgot, retained = denoising(found[:n], wanted[:n]), denoising(found[n:], wanted[n:])
        return {"forget": forgot, "retain": config.alpha * retained}

    return fine_tune(task, loss, batches, config)


def _noise(
    task: Task, config: SFDConfig, n: int, generator: torch.Generator
) -> tuple[Rows, Tensor, Tensor]:
    """Pure noise at `init`; noise and timesteps for what is made of it."""
    model, steps = task.model, task.model.timesteps
    shape, lowest = (n, *model.latent_shape), int(config.lowest * steps)
    pure, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    init = torch.full((n,), min(int(config.init * steps), steps - 1))
    t = torch.randint(lowest, steps - lowest, (n,), generator=generator)
    return noised(model, torch.zeros(shape), pure, init), noise, t


METHODS = {"sfd": Method("sfd", PAPER, SFDConfig(), edit)}
