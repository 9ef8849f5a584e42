"""Rectified flow (Liu et al., ICLR 2023, https://arxiv.org/abs/2209.03003), which Stable Diffusion
3 and the flow transformers after it are trained by: x_t = (1 - sigma) x_0 + sigma noise, and the
prediction is the velocity, noise - x_0."""

from __future__ import annotations

from math import exp
from typing import Any, ClassVar

from torch import Tensor

from erase.models.pipeline_model import PipelineModel
from erase.models.pipelines import Pipeline
from erase.models.schedules import check_flow
from erase.models.stock import Patched, Stock
from erase.prompts.errors import ErasureError


class RectifiedFlow(PipelineModel):
    """A family's forward process and target.

    Timesteps 0 .. timesteps - 1 are those of the checkpoint's own, shifted schedule: sigma rises
    with t, to 1 at the last.
    """

    def __init__(self, pipeline: Pipeline, name: str = "in memory") -> None:
        super().__init__(pipeline, name)
        self._shift = self.shift()

    def shift(self) -> float:
        """s in sigma = s l / (1 + (s - 1) l), of the linear level l (Esser et al. 2024, eq. 23)."""
        shift: float = self._pipeline.scheduler.config.shift
        return shift

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level of each row, shape (n,)."""
        linear = (t.float() + 1) / self.timesteps
        return self._shift * linear / (1 + (self._shift - 1) * linear)

    def signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.sigma(t).view(-1, 1, 1, 1)
        return 1 - sigma, sigma

    def timestep(self, sampled: Tensor) -> Tensor:
        # the sampler's are sigmas times `timesteps`: the inverse of `sigma`, rounded
        sigma = sampled / self.timesteps
        linear = sigma / (self._shift - (self._shift - 1) * sigma)
        return (linear * self.timesteps).round().long().clamp(1, self.timesteps) - 1

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - x0


class PatchedFlow(RectifiedFlow):
    """A family whose denoiser takes patches, of which its shift may depend on their number."""

    stock: ClassVar[type[Stock]] = Patched
    stretched: ClassVar[bool] = False
    """whether the sampler's levels may be stretched to end above 0; those of training are not"""

    def __init__(self, pipeline: Pipeline, name: str = "in memory") -> None:
        check_flow(pipeline.scheduler, name, by_size=True, stretched=self.stretched)
        super().__init__(pipeline, name)
        if self.latent_shape[1] % self.stock.patch:
            raise ErasureError(
                f"{name}: its VAE's configuration has the sample_size {self.image_size}, which "
                "patches of 2 x 2 latents do not fill; write 1024 there"
            )

    def shift(self) -> float:
        """At the model's own resolution."""
        config: Any = self._pipeline.scheduler.config
        if not config.use_dynamic_shifting:
            return super().shift()
        mu = self.log_shift(config, (self.latent_shape[1] // self.stock.patch) ** 2)
        return mu if config.time_shift_type == "linear" else exp(mu)

    def log_shift(self, config: Any, patches: int) -> float:
        """mu, which grows with the number of patches, linearly."""
        slope = (config.max_shift - config.base_shift) / (
            config.max_image_seq_len - config.base_image_seq_len
        )
        mu: float = config.base_shift + slope * (patches - config.base_image_seq_len)
        return mu
