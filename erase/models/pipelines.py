"""Stock diffusers pipelines, whatever their family: how they are conditioned, and how their latents
become pixels.

Stable Diffusion 1.x and 2.x are conditioned on text states alone; XL and 3 on pooled ones too. Here
is all that tells them apart where images are made, so that generation needs no code for a family of
its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from erase.models.base import Cond
from erase.models.precision import autocast
from erase.prompts.errors import ErasureError

# a diffusers pipeline: its parts are attributes made at run time, which no type checker sees
Pipeline = Any
POOLED = "pooled"


def denoiser(pipeline: Pipeline) -> Any:
    """The UNet or the transformer of a pipeline."""
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def image_size(pipeline: Pipeline) -> int:
    """Side of an image at the model's own resolution, in pixels."""
    size: int = latent_side(pipeline) * pipeline.vae_scale_factor
    return size


def latent_side(pipeline: Pipeline) -> int:
    """Side of a latent at the model's own resolution.

    Raises:
        ErasureError: the denoiser's configuration does not say, or its latents are not square.
    """
    size = denoiser(pipeline).config.sample_size
    side, *others = size if isinstance(size, list | tuple) and size else [size]
    if (
        any(other != side for other in others)
        or not isinstance(side, int)
        or isinstance(side, bool)
        or side < 1
    ):
        raise ErasureError(
            f"the {type(denoiser(pipeline)).__name__}'s configuration has the sample_size "
            f"{size!r}; a number is needed, of latents that are square"
        )
    return side


def modules(pipeline: Pipeline) -> dict[str, nn.Module]:
    """The parts of a pipeline that hold weights, by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def text_encoders(pipeline: Pipeline) -> dict[str, Any]:
    """The text encoders of a pipeline, by name."""
    return {
        name: part for name, part in modules(pipeline).items() if name.startswith("text_encoder")
    }


@torch.no_grad()
def encode(pipeline: Pipeline, prompts: list[str], device: torch.device | None = None) -> Cond:
    """Text states of the prompts, each encoded alone, so that its bits do not depend on the others.

    The empty prompt is the null condition of classifier-free guidance; a pipeline that wants zeros
    there (SDXL) gets zeros. `device` is where the pipeline runs, for a caller who knows: diffusers
    searches all modules to tell, which takes a small model as long as encoding a prompt.
    """
    device = device or pipeline._execution_device
    further = {"prompt_2": None, "prompt_3": None} if hasattr(pipeline, "text_encoder_3") else {}
    rows = []
    for prompt in prompts:
        encoded = pipeline.encode_prompt(
            prompt=prompt,
            device=device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            **further,
        )
        row = Cond(encoded[0], {POOLED: encoded[2]} if len(encoded) == 4 else {})
        zeros = not prompt and pipeline.config.get("force_zeros_for_empty_prompt", False)
        rows.append(row.each(torch.zeros_like) if zeros else row)
    return Cond.stack(rows)


def arguments(cond: Cond, null: Cond) -> dict[str, Tensor]:
    """The keyword arguments of a pipeline's call in the place of prompts: these conditions, each
    guided away from its null condition."""
    keywords = {"prompt_embeds": cond.embeddings, "negative_prompt_embeds": null.embeddings}
    if POOLED in cond.extras:
        keywords |= {
            "pooled_prompt_embeds": cond.extras[POOLED],
            "negative_pooled_prompt_embeds": null.extras[POOLED],
        }
    return keywords


@torch.no_grad()
def decode(pipeline: Pipeline, latents: Tensor, precision: str) -> Tensor:
    """Pixels in [0, 1], shape (n, 3, H, W), of latents as the denoiser sees them.

    In fp16 a VAE that is marked `force_upcast` (SDXL's, whose activations pass 65,504) is run in
    float32.
    """
    vae = pipeline.vae
    stored, half = vae.dtype, precision == "fp16" or vae.dtype == torch.float16
    upcast = half and vae.config.force_upcast
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    try:
        if upcast and stored == torch.float16:
            vae.to(torch.float32)
        with autocast(latents.device, "no" if upcast else precision):
            pixels = vae.decode((latents / vae.config.scaling_factor + shift).to(vae.dtype)).sample
    finally:
        if vae.dtype != stored:
            vae.to(stored)
    images: Tensor = pipeline.image_processor.postprocess(pixels, output_type="pt")
    return images
