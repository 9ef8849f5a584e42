"""Sampling as images for evaluation are drawn: by diffusers' own pipeline under our scheduler,
each row from the noise of its own seed."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from inspect import signature

import torch
from torch import Tensor

from erase.eval.generate_config import GenerateConfig, scheduler_of
from erase.models import Cond
from erase.models.pipelines import Pipeline, check_side, denoised, image_size, stock
from erase.prompts.errors import ErasureError, check_ranges


def prepared(pipeline: Pipeline, config: GenerateConfig) -> Pipeline:
    """The same parts behind another scheduler: a shallow copy, so that the caller's pipeline stays
    as it is."""
    # no more than there are noise levels
    check_ranges(config, {"steps": (1, pipeline.scheduler.config.num_train_timesteps)})
    check_side(pipeline, config.resolution or image_size(pipeline))
    pipe, way = copy(pipeline), stock(pipeline)
    pipe.scheduler = scheduler_of(pipeline.scheduler, config.scheduler, way.tells_shift)
    if way.tells_levels and "sigmas" not in signature(pipe.scheduler.set_timesteps).parameters:
        raise ErasureError(
            f"scheduler {config.scheduler} cannot be told the noise levels, which a "
            f"{type(pipeline).__name__} tells it; use euler"
        )
    pipe.safety_checker = None
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled(
    pipe: Pipeline,
    cond: Cond,
    null: Cond,
    seeds: Sequence[int],
    guidance: float,
    steps: int,
    side: int,
    start: Tensor | None = None,
) -> Tensor:
    """Latents of a batch, one row per seed.

    Args:
        pipe: as `prepared` gives it.
        cond: states of the prompts.
        null: of the empty prompt, as many rows.
        seeds: of the noise.
        guidance: scale.
        steps: of the sampler.
        side: pixels of the square image.
        start: noise to start from, before the sampler scales it; None: drawn from the seeds.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return denoised(pipe, cond, null, generators, guidance, steps, side, start)
