"""Relearning: fine-tune an erased model on a few images of what it forgot, and see how soon it
comes back.

An erased concept may be hidden rather than gone; the fewer steps bring it back, the more is left of
it. The control is a model that never forgot: its images show the concept at every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from erase.latents.latent_set import LatentSet
from erase.latents.prepare import Given
from erase.losses import denoising
from erase.models import DiffusionModel
from erase.prompts.concepts import ConceptSpec
from erase.task import Task
from erase.training.batches import PromptedRows, row_batches
from erase.training.config import TrainConfig, TunedConfig
from erase.training.fine_tune import fine_tune
from erase.training.trainable import Base


def relearn(
    model: DiffusionModel,
    concept: ConceptSpec,
    latents: LatentSet,
    train: TrainConfig,
    seed: int = 0,
) -> Mapping[str, Tensor]:
    """Values of all of the denoiser's weights after plain fine-tuning (noise prediction) on these
    latents and their prompts."""
    task = Task(model, [concept], Given(latents, latents), seed)

    def loss(batch: PromptedRows, base: Base) -> dict[str, Tensor]:
        rows, prompts = batch
        return {"forget": denoising(task.predict(rows, prompts), rows.target)}

    batches = row_batches(task, task.forget(), train.batch_size)
    return fine_tune(task, loss, batches, TunedConfig(train=train)).values


@contextmanager
def changed_to(model: DiffusionModel, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block the model has these values; afterwards its own, bit for bit."""
    params = model.parameters()
    own = {name: params[name].detach().clone() for name in values}
    try:
        _put(params, values)
        yield
    finally:
        _put(params, own)


@torch.no_grad()
def _put(params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        params[name].copy_(value)
