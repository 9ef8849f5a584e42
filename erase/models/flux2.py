"""FLUX.2 klein: two kinds of blocks as FLUX.1, a language model's text states, and a VAE whose
latents are patches, normalised by its own running statistics; trained by rectified flow.

Black Forest Labs 2026, https://bfl.ai/blog/flux2-klein-towards-interactive-visual-intelligence.

A latent here is what the denoiser sees: 128 channels for each square of 16 pixels. The base models
are guided by two passes; the distilled ones (`is_distilled`) are drawn in one, whatever the scale.
The text states of all 512 tokens are read, those of the filling too.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from erase.models.base import Cond
from erase.models.chat import Chat
from erase.models.flow import PatchedFlow
from erase.models.patches import pack, unpack
from erase.models.pipelines import Pipeline
from erase.models.stock import Stock
from erase.prompts.errors import ErasureError

STEPS = 50
"""of the sampler whose shift the training timesteps have; the pipeline's falls with its steps"""


class StockKlein(Chat):
    """A stock `Flux2KleinPipeline` as it is called."""

    family = "flux-2-klein"
    patch = 1
    tells_shift = True

    @property
    def cell(self) -> int:
        return 2 * super().cell

    @property
    def channels(self) -> int:
        return 4 * super().channels

    def given(self, latents: Tensor, rows: int) -> Tensor:
        return latents.transpose(1, 2).unflatten(2, (rows, rows))

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, by which latents are normalised."""
        vae = self.pipeline.vae
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
        return vae.bn.running_mean.view(1, -1, 1, 1).to(like), std.to(like)

    def decoded(self, latents: Tensor) -> Tensor:
        mean, std = self.statistics(latents)
        height, width = latents.shape[-2:]
        whole = unpack((latents * std + mean).flatten(2).transpose(1, 2), 2 * height, 2 * width)
        pixels: Tensor = self.pipeline.vae.decode(whole.to(self.pipeline.vae.dtype)).sample
        return pixels

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.pipeline.vae.encode(images).latent_dist
        side = images.shape[-1] // self.cell
        means, stds = (self.given(pack(one), side) for one in (posterior.mean, posterior.std))
        mean, std = self.statistics(means)
        return (means - mean) / std, stds / std

    def encoded(self, prompts: list[str], device: torch.device) -> Cond:
        states, _ = self.pipeline.encode_prompt(
            prompts, device=device, max_sequence_length=self.tokens
        )
        return Cond(states)

    def guided(self, scale: float) -> dict[str, float]:
        return {"guidance_scale": 1.0 if self.pipeline.config.is_distilled else scale}


class Klein(PatchedFlow):
    """A `DiffusionModel` over a stock `Flux2KleinPipeline`."""

    components: ClassVar[tuple[str, ...]] = ("transformer", "text_encoder")
    stock: ClassVar[type[Stock]] = StockKlein

    def __init__(self, pipeline: Pipeline, name: str = "in memory") -> None:
        if pipeline.transformer.config.guidance_embeds:
            raise ErasureError(
                f"{name}: its transformer wants the guidance scale as an embedding, so it is no "
                "FLUX.2 klein, and not supported; give klein"
            )
        schedule = pipeline.scheduler.config
        if not schedule.get("use_dynamic_shifting") or schedule.time_shift_type != "exponential":
            raise ErasureError(
                f"{name}: the shift of its noise levels does not follow the image's size; FLUX.2 "
                "klein's scheduler says use_dynamic_shifting true, time_shift_type exponential"
            )
        StockKlein(pipeline).check_template(name)
        super().__init__(pipeline, name)

    def log_shift(self, config: Any, patches: int) -> float:
        return compute_empirical_mu(patches, STEPS)

    def predict(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        rows, columns = map(torch.arange, xt.shape[-2:])
        here, tokens = torch.zeros(1).long(), torch.arange(cond.embeddings.shape[1])
        prediction: Tensor = self._pipeline.transformer(
            hidden_states=xt.flatten(2).transpose(1, 2),
            timestep=self.sigma(t),  # times 1000 in there
            encoder_hidden_states=cond.embeddings,
            txt_ids=torch.cartesian_prod(here, here, here, tokens).to(xt.device),
            img_ids=torch.cartesian_prod(here, rows, columns, here).to(xt.device),
        ).sample
        return prediction.transpose(1, 2).unflatten(2, xt.shape[-2:])
