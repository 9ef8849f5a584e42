"""Relearning: fine-tune an erased model on a few images, and see how soon the concept comes back.

An erased concept may be hidden rather than gone; the fewer steps bring it back, the more is left of
it. On images of other things the same is benign fine-tuning, after which some erased concepts
resurge too (Suriyakumar et al. 2024, https://arxiv.org/abs/2410.08074). The control is a model that
never forgot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from erase.latents.latent_set import Given, LatentSet
from erase.models import DiffusionModel
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.task import Task
from erase.training.batches import denoising_loss, row_batches
from erase.training.config import TunedConfig
from erase.training.fine_tune import fine_tune
from erase.training.freeze import Freeze


def relearn(
    model: DiffusionModel,
    concepts: Sequence[ConceptSpec],
    latents: LatentSet,
    config: TunedConfig,
    counts: Sequence[int],
    *,
    seed: int = 0,
    folder: Path | None = None,
    freeze: Freeze | None = None,
) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
    """Values after so many steps of plain fine-tuning (noise prediction) on these latents and their
    prompts; the model is left as it was found.

    Args:
        model: the erased one.
        concepts: what was erased from it.
        latents: the attacker's, with prompts.
        config: scope, rate, rank; its steps are not looked at.
        counts: steps after which to stop and look; they are taken in rising order.
        seed: of batches and noise.
        folder: where the training state is kept: each count goes on from the one before, and a
            stopped run from the last count. None: each starts anew, to the same bits.
        freeze: tensors that the trainer leaves as they are; None: none. Its names must be the
            model's (`Freeze.check_names`), its fingerprint need not: a control trains another.

    Raises:
        ErasureError: a rate that falls, so that each count were another run; or a freeze that
            leaves nothing to train.
    """
    if config.train.schedule != "constant":
        raise ErasureError(
            f"relearning stops at several counts of one run, and the schedule "
            f"{config.train.schedule} depends on the last; use constant"
        )
    task = Task(model, concepts, Given(latents, latents), seed, folder)
    loss = denoising_loss(task)
    batches = row_batches(task, task.forget(), config.train.batch_size)
    mask = None
    if freeze:
        matrices, params = config.lora_rank > 0, task.weights(config.scope)
        mask = freeze.mask(params, model.fingerprint, matrices=matrices)
    for count in sorted(counts):
        train = replace(config.train, steps=count, checkpoint_every=count)
        settings = replace(config, train=train)
        yield count, fine_tune(task, loss, batches, settings, mask=mask, part="relearning").values


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
