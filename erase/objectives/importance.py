"""How much the weights matter to the concept, and to what is retained."""

from __future__ import annotations

from erase.task import Task
from erase.training.batches import denoising_loss, row_batches
from erase.training.config import MaskConfig, TrainConfig, TunedConfig
from erase.training.saliency import Objective, compute_statistics
from erase.training.statistics import Statistics


def importance(
    task: Task, scope: str, names: tuple[str, ...], batches: int, size: int
) -> Statistics:
    """Statistics of the gradients of the denoising error, at the base.

    Those of the forget latents are called `objective.*`, those of the retain latents `retain.*`.
    The b-th batch of both has the same timesteps and noise.

    Args:
        task: the erasure.
        scope: whose weights.
        names: of `erase.training.statistics`.
        batches: of latents, of each set.
        size: latents in a batch; 1: squares are those of single latents.
    """
    config = TunedConfig(
        scope=scope,
        mask=MaskConfig(batches=batches),
        train=TrainConfig(steps=1, batch_size=size),
    )
    objective = Objective(denoising_loss(task), row_batches(task, task.forget(), size))
    return compute_statistics(task, config, names, objective)
