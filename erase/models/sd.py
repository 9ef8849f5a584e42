"""Stable Diffusion 1.x and 2.x: a UNet with one CLIP text encoder, epsilon or v prediction."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from erase.models.base import Cond
from erase.models.config import PREDICTIONS
from erase.models.pipeline_model import PipelineModel
from erase.models.pipelines import Pipeline
from erase.models.schedules import check_diffusion, sampler
from erase.prompts.errors import ErasureError


class StableDiffusion(PipelineModel):
    """A `DiffusionModel` over a stock `StableDiffusionPipeline`."""

    components: ClassVar[tuple[str, ...]] = ("unet", "text_encoder")
    addition: ClassVar[str | None] = None
    """the UNet's embedding beside that of the timestep (`addition_embed_type`)"""

    def __init__(self, pipeline: Pipeline, name: str = "in memory") -> None:
        schedule, channels = pipeline.scheduler, pipeline.unet.config.in_channels
        check_diffusion(schedule, name)
        if schedule.config.prediction_type not in PREDICTIONS:
            raise ErasureError(
                f"{name}: prediction type {schedule.config.prediction_type!r} is not supported; "
                "use epsilon or v_prediction"
            )
        if channels != pipeline.vae.config.latent_channels:
            raise ErasureError(
                f"{name}: its UNet takes {channels} channels where latents have "
                f"{pipeline.vae.config.latent_channels}, so it is an inpainting, "
                "depth or editing model; give its text-to-image sibling"
            )
        _check_unet(pipeline.unet.config, self.addition, name)
        super().__init__(pipeline, name)
        self.sampler()  # refuses a schedule that cannot be sampled, before hours are spent
        self._v = schedule.config.prediction_type == "v_prediction"
        self._alphas: Tensor = schedule.alphas_cumprod.float()

    def signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self._alphas.to(t.device)[t].view(-1, 1, 1, 1)
        return alpha.sqrt(), (1 - alpha).sqrt()

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if not self._v:
            return noise
        signal, sigma = self.signal_and_noise(t)
        return signal * noise - sigma * x0

    def predict(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        prediction: Tensor = self._pipeline.unet(
            xt, t, encoder_hidden_states=cond.embeddings, added_cond_kwargs=self.added(xt, cond)
        ).sample
        return prediction

    def added(self, xt: Tensor, cond: Cond) -> dict[str, Tensor] | None:
        """Conditioning beside the text states; none here."""
        return None

    def sampler(self) -> Any:
        return sampler(self._pipeline.scheduler, DPMSolverMultistepScheduler, "dpm++")


def _check_unet(config: Any, addition: str | None, name: str) -> None:
    """Refuse a UNet that wants conditions which are not given here.

    Raises:
        ErasureError: says what it is.
    """
    if config.get("time_cond_proj_dim") is not None:
        raise ErasureError(
            f"{name}: its UNet is distilled by guidance (an LCM: time_cond_proj_dim "
            f"{config.time_cond_proj_dim}) and wants the guidance scale as an embedding, which is "
            "not supported; erase from the model that it was distilled from"
        )
    for option in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
        if config.get(option) is not None:
            raise ErasureError(
                f"{name}: its UNet wants more than text ({option} {config[option]!r}), which is "
                "not supported"
            )
    if config.get("addition_embed_type") != addition:
        raise ErasureError(
            f"{name}: its UNet has the added embedding {config.get('addition_embed_type')!r}, not "
            f"{addition!r}, so it is of another family"
        )
