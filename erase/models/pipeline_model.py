"""The part that every family shares: a `DiffusionModel` over a stock diffusers pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from erase.models.base import Cond, Tokens, fingerprint
from erase.models.naming import named_weights
from erase.models.pipelines import (
    Pipeline,
    denoised,
    encode,
    latent_side,
    modules,
    text_encoders,
)
from erase.models.prefix import encode_live
from erase.models.stock import Stock
from erase.models.tokenizers import check_tokenizers, tokens
from erase.models.waiting import device_of


class PipelineModel:
    """A pipeline's parts, names and sizes. A family adds its forward process and its prediction."""

    components: ClassVar[tuple[str, ...]]
    """parts whose weights a method may change, the denoiser first"""
    stock: ClassVar[type[Stock]] = Stock
    """how the pipeline is called"""

    def __init__(self, pipeline: Pipeline, name: str = "in memory") -> None:
        self.name = name
        self._pipeline = pipeline
        pipeline.set_progress_bar_config(disable=True)
        for part in modules(pipeline).values():
            part.requires_grad_(False).eval()
        check_tokenizers(pipeline, name)
        way, side = self.stock(pipeline), latent_side(pipeline)
        self.latent_shape = (way.channels, side, side)
        self.image_size = side * way.cell
        self.timesteps: int = pipeline.scheduler.config.num_train_timesteps
        self.refresh_fingerprint()

    def refresh_fingerprint(self) -> None:
        self.fingerprint = fingerprint(self.parameters().items())

    @property
    def device(self) -> torch.device:
        return device_of(self._pipeline)

    def component(self, name: str) -> nn.Module:
        module: nn.Module = getattr(self._pipeline, name)
        return module

    def parameters(self, component: str | None = None) -> dict[str, nn.Parameter]:
        parts = modules(self._pipeline)
        names = (
            [part for part in self.components if part in parts]
            if component is None
            else [component]
        )
        return {f"{part}.{name}": p for part in names for name, p in named_weights(parts[part])}

    def encode(
        self, prompts: list[str], prefix: Tensor | Mapping[str, Tensor] | None = None
    ) -> Cond:
        if prefix is not None or (torch.is_grad_enabled() and self._texts_trained()):
            return encode_live(self._pipeline, prompts, self.device, prefix)
        return encode(self._pipeline, prompts, self.device)

    def _texts_trained(self) -> bool:
        encoders = text_encoders(self._pipeline).values()
        return any(param.requires_grad for encoder in encoders for param in encoder.parameters())

    def tokens(self, prompts: list[str]) -> dict[str, list[Tokens]]:
        return tokens(self._pipeline, prompts)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.stock(self._pipeline).moments(images.to(self.device, self._pipeline.vae.dtype))

    def sampler(self) -> Any:
        """The scheduler that `sample` uses: the checkpoint's own, unless a family has a quicker
        one."""
        return copy(self._pipeline.scheduler)

    def signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The two factors of the forward process at each timestep, shape (n, 1, 1, 1): x_t = signal
        * x_0 + sigma * noise."""
        raise NotImplementedError

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal, sigma = self.signal_and_noise(t)
        return signal * x0 + sigma * noise

    def timestep(self, sampled: Tensor) -> Tensor:
        """Training timesteps of the timesteps that a sampler counts in."""
        return sampled.long()

    def sample(
        self,
        prompts: list[str] | tuple[Cond, Cond],
        seeds: list[int],
        steps: int,
        guidance: float,
        size: int | None = None,
        prefix: Tensor | Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        return self._denoise(prompts, seeds, steps, guidance, size, prefix)[0]

    def trajectory(
        self, prompts: list[str] | tuple[Cond, Cond], seeds: list[int], steps: int, guidance: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        latents, states, sampled = self._denoise(prompts, seeds, steps, guidance)
        t = self.timestep(sampled.to(latents.device))
        signal, sigma = (factor[:, None] for factor in self.signal_and_noise(t))
        return latents, (torch.stack(states) - signal * latents) / sigma, t

    @torch.no_grad()
    def _denoise(
        self,
        prompts: list[str] | tuple[Cond, Cond],
        seeds: list[int],
        steps: int,
        guidance: float,
        size: int | None = None,
        prefix: Tensor | Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Latents of generated images, the noisy states on the way there, and the sampler's
        timesteps of these."""
        if isinstance(prompts, tuple):
            cond, null = (states.to(self.device) for states in prompts)
        else:  # null encoded once
            cond, null = self.encode(prompts, prefix), self.encode([""])
            null = null[torch.zeros(len(prompts), dtype=torch.long)]
        # the same parts behind another scheduler; the caller's pipeline stays as it is
        pipe = copy(self._pipeline)
        pipe.scheduler = self.sampler()
        # said, since XL and 3 stumble over a sample_size that is a pair
        size = size or self.image_size
        side = [size // self.stock(pipe).cell] * 2
        # drawn from as the pipeline itself would
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape, dtype = (1, self.latent_shape[0], *side), cond.embeddings.dtype
        states = [
            torch.cat([torch.randn(shape, generator=each, dtype=dtype) for each in generators]).to(
                self.device
            )
        ]

        latents = denoised(
            pipe, cond, null, generators, guidance, steps, size, states[0], states.append
        )
        return latents, states[:-1], pipe.scheduler.timesteps

    def pipeline(self) -> Any:
        return self._pipeline
