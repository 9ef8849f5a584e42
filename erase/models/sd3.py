"""Stable Diffusion 3 and 3.5: a transformer with joint attention over image and text, trained by
rectified flow.

Esser et al., 2024, https://arxiv.org/abs/2403.03206: x_t = (1 - sigma) x_0 + sigma noise, and the
prediction is noise - x_0.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from erase.models.base import Cond
from erase.models.pipeline_model import PipelineModel
from erase.models.pipelines import POOLED, Pipeline
from erase.models.schedules import check_flow


class StableDiffusion3(PipelineModel):
    """A `DiffusionModel` over a stock `StableDiffusion3Pipeline`.

    Timesteps 0 .. timesteps - 1 are those of the checkpoint's own, shifted schedule: sigma rises
    with t, to 1 at the last.
    """

    components: ClassVar[tuple[str, ...]] = (
        "transformer",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
    )

    def __init__(self, pipeline: Pipeline, name: str = "in memory") -> None:
        schedule = pipeline.scheduler
        check_flow(schedule, name)
        super().__init__(pipeline, name)
        self._shift: float = schedule.config.shift

    def _sigma(self, t: Tensor) -> Tensor:
        """Noise level of each row, shape (n, 1, 1, 1): the linear schedule, shifted (eq. 23 of the
        paper)."""
        linear = (t.float() + 1) / self.timesteps
        return (self._shift * linear / (1 + (self._shift - 1) * linear)).view(-1, 1, 1, 1)

    def signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self._sigma(t)
        return 1 - sigma, sigma

    def timestep(self, sampled: Tensor) -> Tensor:
        # the sampler's are sigmas times `timesteps`: the inverse of `_sigma`, rounded
        sigma = sampled / self.timesteps
        linear = sigma / (self._shift - (self._shift - 1) * sigma)
        return (linear * self.timesteps).round().long().clamp(1, self.timesteps) - 1

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - x0

    def predict(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        prediction: Tensor = self._pipeline.transformer(
            xt,
            timestep=self._sigma(t).flatten() * self.timesteps,
            encoder_hidden_states=cond.embeddings,
            pooled_projections=cond.extras[POOLED],
        ).sample
        return prediction
