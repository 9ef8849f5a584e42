"""Stable Diffusion 3 and 3.5: a transformer with joint attention over image and text, trained by
rectified flow.

Esser et al., 2024, https://arxiv.org/abs/2403.03206.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from erase.models.base import Cond
from erase.models.flow import RectifiedFlow
from erase.models.pipelines import Pipeline
from erase.models.schedules import check_flow
from erase.models.stock import POOLED, Stock


class Stock3(Stock):
    """A stock `StableDiffusion3Pipeline` as it is called."""

    family = "sd3"
    tokens = 256

    def encoded(self, prompts: list[str], device: torch.device) -> Cond:
        found = self.pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            device=device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            max_sequence_length=self.tokens,
        )
        return Cond(found[0], {POOLED: found[2]})


class StableDiffusion3(RectifiedFlow):
    """A `DiffusionModel` over a stock `StableDiffusion3Pipeline`."""

    components: ClassVar[tuple[str, ...]] = (
        "transformer",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
    )
    stock: ClassVar[type[Stock]] = Stock3

    def __init__(self, pipeline: Pipeline, name: str = "in memory") -> None:
        check_flow(pipeline.scheduler, name)
        super().__init__(pipeline, name)

    def predict(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        prediction: Tensor = self._pipeline.transformer(
            xt,
            timestep=self.sigma(t) * self.timesteps,
            encoder_hidden_states=cond.embeddings,
            pooled_projections=cond.extras[POOLED],
        ).sample
        return prediction
