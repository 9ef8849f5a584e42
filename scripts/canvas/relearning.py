"""Relearning: fine-tune an erased model on a few images of what it forgot, and see how soon it comes back.

An erased concept may be hidden rather than gone; the fewer steps bring it back, the more is left of it. The control is a model that never
forgot: its images show the concept at every step.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from erase.eval.evaluators.classifier import load_judge, predict
from erase.eval.generate import GenerateConfig, generate
from erase.latents.prepare import LatentSet, PromptCache, epoch_rows
from erase.losses import denoising
from erase.models import Cond, DiffusionModel
from erase.models.scopes import select
from erase.objectives.remap import share
from erase.parallel.processes import processes
from erase.prompts.concepts import ConceptSpec
from erase.prompts.prompt_sets import PromptSet
from erase.training.config import TrainConfig
from erase.training.loop import fit
from erase.training.trainable import Frozen


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
    """Steps of fine-tuning -> share, in percent, of the concept's own images in which the classifier does not see it (UA).

    The model is left as it was found. Each point starts from it anew, so that none depends on the others.
    """
    asked = replace(prompts, rows=tuple(row for row in prompts.rows if row.labels.get(concept.kind) == concept.target))
    params = select(model.parameters(), "full")
    erased = {name: param.detach().clone() for name, param in params.items()}
    judge, found = load_judge("canvas"), {}
    for count in steps:
        values = relearn(model, latents, replace(train, steps=count))
        _put(params, values)
        images = generate(model.pipeline(), asked, out / f"relearned-{count}", config, {"relearned": str(count)})
        seen = predict(judge, images)[concept.kind]
        found[count] = 100 * sum(name != concept.target for name in seen) / len(seen)
        _put(params, erased)
    return found


def relearn(model: DiffusionModel, latents: LatentSet, train: TrainConfig, seed: int = 0) -> Any:
    """Values of all of the denoiser's weights after plain fine-tuning (noise prediction) on these latents and their prompts."""
    embed = PromptCache(model, latents.prompts)

    def batches(step: int, part: int) -> Any:
        return relearning_batch(model, latents, embed, train, seed, step, part)

    def loss(batch: Any, frozen: Frozen) -> torch.Tensor:
        xt, t, cond, target = batch
        return denoising(model.predict(xt, t, cond), target)

    return fit(model, select(model.parameters(), "full"), batches, loss, train).values


def relearning_batch(
    model: DiffusionModel, latents: LatentSet, embed: PromptCache, train: TrainConfig, seed: int, step: int, part: int
) -> tuple[torch.Tensor, torch.Tensor, Cond, torch.Tensor]:
    """Noisy latents, timesteps, text states and targets of one part: drawn for the whole step, then cut to process and part."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    rows = epoch_rows(len(latents), step * train.batch_size, train.batch_size, seed)
    x0 = latents.draw(rows, generator)
    t, noise = latents.draw_noise(rows, model.timesteps, generator)

    mine = share(train.batch_size, part, train.accumulation, processes())
    x0, t, noise = (tensor[mine].to(model.device) for tensor in (x0, t, noise))
    cond = embed([latents.prompts[row] for row in rows[mine]])
    return model.add_noise(x0, noise, t), t, cond, model.target(x0, noise, t)


@torch.no_grad()
def _put(params: Any, values: Any) -> None:
    for name, param in params.items():
        param.copy_(values[name])
