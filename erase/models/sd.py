"""Stable Diffusion 1.x and 2.x: a UNet with one CLIP text encoder, epsilon or v prediction."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor, nn

from erase.models.base import Cond, fingerprint
from prompts.errors import ErasureError

Pipeline = Any  # a StableDiffusionPipeline: its parts are attributes made at run time, which no type checker sees
COMPONENTS = ("unet", "text_encoder")


class StableDiffusion:
    """A `DiffusionModel` over a stock `StableDiffusionPipeline`."""

    def __init__(self, pipeline: Pipeline, name: str = "in memory") -> None:
        self.name = name
        self._pipeline = pipeline
        pipeline.set_progress_bar_config(disable=True)
        for component in (*COMPONENTS, "vae"):
            getattr(pipeline, component).requires_grad_(False).eval()
        unet, schedule = pipeline.unet, pipeline.scheduler
        self.latent_shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        self.image_size = unet.config.sample_size * pipeline.vae_scale_factor
        self.timesteps = schedule.config.num_train_timesteps
        if schedule.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ErasureError(
                f"{name}: prediction type {schedule.config.prediction_type!r} is not supported; use epsilon or v_prediction"
            )
        self._v = schedule.config.prediction_type == "v_prediction"
        self._alphas = schedule.alphas_cumprod.float()
        self.refresh_fingerprint()

    def refresh_fingerprint(self) -> None:
        self.fingerprint = fingerprint(self.parameters().items())

    @property
    def device(self) -> torch.device:
        return self._pipeline.unet.device

    def component(self, name: str) -> nn.Module:
        module: nn.Module = getattr(self._pipeline, name)
        return module

    def parameters(self, component: str | None = None) -> dict[str, nn.Parameter]:
        parts = COMPONENTS if component is None else (component,)
        return {f"{part}.{name}": p for part in parts for name, p in self.component(part).named_parameters()}

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Cond:
        pipe = self._pipeline
        return Cond(torch.cat([pipe.encode_prompt(prompt, self.device, 1, False)[0] for prompt in prompts]))

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        vae = self._pipeline.vae
        posterior = vae.encode(images.to(self.device, vae.dtype)).latent_dist
        return posterior.mean * vae.config.scaling_factor, posterior.std * vae.config.scaling_factor

    def _signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self._alphas.to(t.device)[t].view(-1, 1, 1, 1)
        return alpha.sqrt(), (1 - alpha).sqrt()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal, sigma = self._signal_and_noise(t)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if not self._v:
            return noise
        signal, sigma = self._signal_and_noise(t)
        return signal * noise - sigma * x0

    def predict(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        prediction: Tensor = self._pipeline.unet(xt, t, encoder_hidden_states=cond.embeddings).sample
        return prediction

    @torch.no_grad()
    def sample(self, prompts: list[str], seeds: list[int], steps: int, guidance: float, size: int | None = None) -> Tensor:
        sampler = DPMSolverMultistepScheduler.from_config(self._pipeline.scheduler.config)
        pipe = type(self._pipeline)(**{**self._pipeline.components, "scheduler": sampler}, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        latents: Tensor = pipe(
            prompts,
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="latent",
        ).images
        return latents

    def pipeline(self) -> Any:
        return self._pipeline
