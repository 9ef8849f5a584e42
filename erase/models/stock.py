"""What a stock pipeline takes and gives: conditions, latents, pixels.

Here is what Stable Diffusion's do. A family whose pipeline differs says so in its own file, and
nothing else asks for a family: sampling, decoding and counting tokens go through this.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from erase.models.base import Cond

# a diffusers pipeline: its parts are attributes made at run time, which no type checker sees
Pipeline = Any
POOLED = "pooled"
SIDE = 128
"""cells of a latent's side where neither the parts nor the pipeline say: 1024 pixels"""


class Stock:
    """A stock pipeline as it is called."""

    family: ClassVar[str | None] = None
    """its name in an exported file's header; None: a UNet tells"""
    patch: ClassVar[int] = 1
    """side of the squares of latent cells that the denoiser takes at once"""
    tells_shift: ClassVar[bool] = False
    """whether the pipeline tells its scheduler the shift of its noise levels, as e^mu with mu
    linear in the image's patches"""
    tells_levels: ClassVar[bool] = False
    """whether it hands its scheduler the noise levels themselves, which few take"""
    tokens: ClassVar[int] = 77
    """of a prompt that a T5 or a language model reads, where the caller gives no
    `max_sequence_length`"""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    # ---- latents ----

    @property
    def cell(self) -> int:
        """Pixels of a latent cell's side."""
        size: int = self.pipeline.vae_scale_factor
        return size

    @property
    def channels(self) -> int:
        """Of a latent."""
        count: int = self.pipeline.vae.config.latent_channels
        return count

    def stated_side(self) -> Any:
        """Side of a latent at the model's own resolution, as the configurations have it."""
        if hasattr(self.pipeline, "unet"):
            return self.pipeline.unet.config.sample_size
        return self.pipeline.transformer.config.sample_size

    def taken(self, latents: Tensor) -> Tensor:
        """Latents (n, c, h, w) as the call takes them."""
        return latents

    def given(self, latents: Tensor, rows: int) -> Tensor:
        """Latents (n, c, rows, rows) of what the call shows after a step."""
        return latents

    # ---- pixels ----

    def decoded(self, latents: Tensor) -> Tensor:
        """Pixels in [-1, 1] of latents."""
        vae = self.pipeline.vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        scaled = (latents / vae.config.scaling_factor + shift).to(vae.dtype)
        pixels: Tensor = vae.decode(scaled).sample
        return pixels

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of images in [-1, 1]."""
        vae = self.pipeline.vae
        posterior = vae.encode(images).latent_dist
        shift, scale = getattr(vae.config, "shift_factor", None), vae.config.scaling_factor
        return (posterior.mean - (shift or 0.0)) * scale, posterior.std * scale

    # ---- conditions ----

    def text(self, prompt: str) -> str:
        """What the tokenizers are given for a prompt."""
        return prompt

    def room(self, tokenizer: Any) -> int:
        """Tokens of a prompt that the tokenizer's encoder sees, beside begin, end and template."""
        clip = type(tokenizer).__name__.startswith("CLIP")
        length: int = tokenizer.model_max_length if clip else self.tokens
        return length - int(tokenizer.num_special_tokens_to_add())

    def states(self, encoder: str) -> range | None:
        """Where an encoder's text states lie, see `Tokens`: behind CLIP's begin token, those of
        several side by side."""
        length: int = self.pipeline.tokenizer.model_max_length
        return range(1, length)

    def stated(self) -> dict[str, int]:
        """What a stock call must be told, beside the prompt, to read it as it is read here."""
        return {}

    def encoded(self, prompts: list[str], device: torch.device) -> Cond:
        """Text states of the prompts, all in one pass; nothing is said of an empty one."""
        found = self.pipeline.encode_prompt(
            prompt=prompts,
            device=device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return Cond(found[0], {POOLED: found[2]} if len(found) == 4 else {})

    def arguments(self, cond: Cond, null: Cond) -> dict[str, Any]:
        """The keyword arguments of a call in the place of prompts: these conditions, each guided
        away from its null condition."""
        keywords = {"prompt_embeds": cond.embeddings, "negative_prompt_embeds": null.embeddings}
        if POOLED in cond.extras:
            keywords |= {
                "pooled_prompt_embeds": cond.extras[POOLED],
                "negative_pooled_prompt_embeds": null.extras[POOLED],
            }
        return keywords

    def guided(self, scale: float) -> dict[str, float]:
        """The keyword argument of a call for a guidance scale, of which 1 is none."""
        return {"guidance_scale": scale}


class Patched(Stock):
    """A pipeline whose denoiser takes patches of 2 x 2 latent cells, and says nothing of a size:
    its VAE may, in pixels; else it is what the pipeline draws."""

    patch = 2
    tokens = 512

    def stated_side(self) -> Any:
        stated = self.pipeline.vae.config
        if "sample_size" not in stated or "sample_size" in stated.get("_use_default_values", ()):
            drawn = getattr(self.pipeline, "default_sample_size", SIDE)
            return int(drawn * self.pipeline.vae_scale_factor // self.cell)
        return int(stated.sample_size // self.cell)
