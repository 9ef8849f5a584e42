"""Stock diffusers pipelines, whatever their family: how they are conditioned, and how their latents
become pixels.

Stable Diffusion 1.x and 2.x are conditioned on text states alone; XL, 3 and FLUX.1 on pooled ones
too, and FLUX.1 counts its latents in patches. Here is all that tells them apart where images are
made, so that generation needs no code for a family of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from erase.models.base import Cond
from erase.models.patches import pack, unpack
from erase.models.precision import autocast
from erase.prompts.errors import ErasureError

# a diffusers pipeline: its parts are attributes made at run time, which no type checker sees
Pipeline = Any
POOLED = "pooled"
PATCHED = ("FluxPipeline",)
"""pipelines that take and give latents as patches of 2 x 2"""
T5_TOKENS = {"StableDiffusion3Pipeline": 256, "FluxPipeline": 512}
"""pipeline -> tokens of a prompt that its T5 reads, where the caller of its stock form gives no
`max_sequence_length`"""


def denoiser(pipeline: Pipeline) -> Any:
    """The UNet or the transformer of a pipeline."""
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def image_size(pipeline: Pipeline) -> int:
    """Side of an image at the model's own resolution, in pixels."""
    size: int = latent_side(pipeline) * pipeline.vae_scale_factor
    return size


def latent_side(pipeline: Pipeline) -> int:
    """Side of a latent at the model's own resolution.

    A transformer of FLUX.1 says nothing of it. Its VAE may, in pixels; else it is what the stock
    pipeline draws.

    Raises:
        ErasureError: the denoiser's configuration does not say, or its latents are not square.
    """
    if is_patched(pipeline):
        stated = pipeline.vae.config
        if "sample_size" in stated.get("_use_default_values", ()):
            return int(pipeline.default_sample_size)
        return int(stated.sample_size // pipeline.vae_scale_factor)
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


def is_patched(pipeline: Pipeline) -> bool:
    """Whether a pipeline takes and gives latents as patches."""
    return type(pipeline).__name__ in PATCHED


def check_side(pipeline: Pipeline, side: int) -> None:
    """Refuse images that are not made of whole patches, which a pipeline would cut to size.

    Raises:
        ErasureError: such a side, in pixels.
    """
    step = 2 * pipeline.vae_scale_factor
    if is_patched(pipeline) and side % step:
        raise ErasureError(
            f"images of {side} pixels are no whole number of patches; give a multiple of {step}"
        )


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
    rows = []
    for prompt in prompts:
        row = encoded(pipeline, [prompt], device)
        zeros = not prompt and pipeline.config.get("force_zeros_for_empty_prompt", False)
        rows.append(row.each(torch.zeros_like) if zeros else row)
    return Cond.stack(rows)


def encoded(pipeline: Pipeline, prompts: list[str], device: torch.device) -> Cond:
    """Text states of the prompts, all in one pass; nothing is said of an empty one."""
    given: dict[str, Any] = {"prompt": prompts, "device": device, "num_images_per_prompt": 1}
    if room := T5_TOKENS.get(type(pipeline).__name__):
        given["max_sequence_length"] = room
    if is_patched(pipeline):
        states, pooled, _ = pipeline.encode_prompt(**given)
        return Cond(states, {POOLED: pooled})
    further = {"prompt_2": None, "prompt_3": None} if hasattr(pipeline, "text_encoder_3") else {}
    found = pipeline.encode_prompt(**given, do_classifier_free_guidance=False, **further)
    return Cond(found[0], {POOLED: found[2]} if len(found) == 4 else {})


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


def denoised(
    pipe: Pipeline,
    cond: Cond,
    null: Cond,
    generators: Sequence[torch.Generator],
    guidance: float,
    steps: int,
    side: int,
    start: Tensor | None = None,
    on_state: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Latents of a batch by a stock call, shape (n, c, h, w).

    Args:
        pipe: its scheduler is the sampler.
        cond: states of the prompts.
        null: of the empty prompt, as many rows.
        generators: of the noise, one a row.
        guidance: scale, as the pipeline means its own `guidance_scale`: FLUX.1 dev embeds it, and
            schnell has none.
        steps: of the sampler.
        side: pixels of the square image.
        start: noise to start from, shape as the latents', before the sampler scales it; None: drawn
            by the generators.
        on_state: is shown the latents after each step.

    Raises:
        ErasureError: see `check_side`.
    """
    check_side(pipe, side)
    rows = side // pipe.vae_scale_factor
    patched = is_patched(pipe)

    def plain(latents: Tensor) -> Tensor:
        return unpack(latents, rows, rows) if patched else latents

    def shown(pipeline: Pipeline, step: int, t: Tensor, tensors: dict[str, Tensor]) -> Any:
        if on_state:
            on_state(plain(tensors["latents"]))
        return tensors

    latents: Tensor = pipe(
        **arguments(cond, null),
        height=side,
        width=side,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=list(generators),
        latents=pack(start) if patched and start is not None else start,
        output_type="latent",
        callback_on_step_end=shown,
    ).images
    return plain(latents)


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
