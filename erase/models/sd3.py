"""Stable Diffusion 3 and 3.5: a transformer with joint attention over image and text, trained by
rectified flow.

Esser et al., 2024, https://arxiv.org/abs/2403.03206.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from erase.models.base import Cond
from erase.models.flow import RectifiedFlow
from erase.models.pipelines import POOLED, Pipeline
from erase.models.schedules import check_flow


class StableDiffusion3(RectifiedFlow):
    """A `DiffusionModel` over a stock `StableDiffusion3Pipeline`."""

    components: ClassVar[tuple[str, ...]] = (
        "transformer",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
    )

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
