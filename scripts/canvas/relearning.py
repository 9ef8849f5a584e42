"""Relearning: fine-tune an erased model on a few images of what it forgot, and see how soon it
comes back.

An erased concept may be hidden rather than gone; the fewer steps bring it back, the more is left of
it. The control is a model that never forgot: its images show the concept at every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erase.eval.evaluators.classifier import load_judge, predict
from erase.eval.generate import GenerateConfig, generate
from erase.latents.latent_set import LatentSet
from erase.latents.prepare import Given
from erase.losses import denoising
from erase.models import DiffusionModel
from erase.models.scopes import select
from erase.prompts.concepts import ConceptSpec
from erase.prompts.prompt_sets import PromptSet
from erase.task import Task
from erase.training.batches import PromptedRows, row_batches
from erase.training.config import TrainConfig, TunedConfig
from erase.training.fine_tune import fine_tune
from erase.training.trainable import Base


def curve(
    model: DiffusionModel,
    concept: ConceptSpec,
    latents: LatentSet,
    prompts: PromptSet,
    steps: list[int],
    train: TrainConfig,
    out: Path,
    config: GenerateConfig,
) -> dict[int, float]:
    """Steps of fine-tuning -> share, in percent, of the concept's own images in which the
    classifier does not see it (UA).

    The model is left as it was found. Each point starts from it anew, so that none depends on the
    others.
    """
    asked = replace(
        prompts,
        rows=tuple(row for row in prompts.rows if row.labels.get(concept.kind) == concept.target),
    )
    params = select(model.parameters(), "full")
    erased = {name: param.detach().clone() for name, param in params.items()}
    judge, accuracies = load_judge("canvas"), {}
    for count in steps:
        values = relearn(model, concept, latents, replace(train, steps=count))
        _put(params, values)
        images = generate(
            model.pipeline(), asked, out / f"relearned-{count}", config, {"relearned": str(count)}
        )
        seen = predict(judge, images)[concept.kind]
        accuracies[count] = 100 * sum(name != concept.target for name in seen) / len(seen)
        _put(params, erased)
    return accuracies


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


@torch.no_grad()
def _put(params: Any, values: Any) -> None:
    for name, param in params.items():
        param.copy_(values[name])
