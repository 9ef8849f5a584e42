"""Stock diffusers pipelines, whatever their family: their sizes, how they are conditioned and
sampled, and how their latents become pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from erase.models.base import Cond, fingerprint
from erase.models.families import family_of
from erase.models.precision import autocast
from erase.models.stock import Pipeline, Stock
from erase.prompts.errors import ErasureError
from erase.tensors import sha256_of

SCHEDULE = (
    "prediction_type",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "rescale_betas_zero_snr",
    "timestep_spacing",
    "steps_offset",
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
)
"""options of a scheduler that every sampler made from it takes over"""
FROZEN = ("vae", *SCHEDULE)
"""keys of `frozen_facts`"""
SCALES = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""options of a VAE that stand between its latents and the denoiser's"""


def stock(pipeline: Pipeline) -> Stock:
    """The pipeline as its family calls it.

    Raises:
        ErasureError: a class that no family has.
    """
    way: Stock = family_of(pipeline, "the pipeline").stock(pipeline)
    return way


def denoiser(pipeline: Pipeline) -> Any:
    """The UNet or the transformer of a pipeline."""
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def image_size(pipeline: Pipeline) -> int:
    """Side of an image at the model's own resolution, in pixels."""
    return latent_side(pipeline) * stock(pipeline).cell


def latent_side(pipeline: Pipeline) -> int:
    """Side of a latent at the model's own resolution.

    Raises:
        ErasureError: the denoiser's configuration does not say, or its latents are not square.
    """
    size = stock(pipeline).stated_side()
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


def check_side(pipeline: Pipeline, side: int) -> None:
    """Refuse images that are not made of whole latent cells and patches, which a pipeline would cut
    to size.

    Raises:
        ErasureError: such a side, in pixels.
    """
    way = stock(pipeline)
    step = way.patch * way.cell
    if side % step:
        raise ErasureError(
            f"images of {side} pixels are no whole number of latent cells or patches; give a "
            f"multiple of {step}"
        )


def frozen_facts(pipeline: Pipeline) -> dict[str, Any]:
    """What images depend on beside the weights that methods change: a digest of the VAE, and the
    scheduler's options, less those that are not there or empty. JSON-ready."""
    vae, options = pipeline.vae, pipeline.scheduler.config
    scales = [vae.config.get(key) for key in SCALES]
    facts = {key: options[key] for key in SCHEDULE if options.get(key)}
    return {"vae": sha256_of([fingerprint(vae.state_dict().items()), scales]), **facts}


def modules(pipeline: Pipeline) -> dict[str, nn.Module]:
    """The parts of a pipeline that hold weights, by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def text_encoders(pipeline: Pipeline) -> dict[str, Any]:
    """The text encoders of a pipeline, by name."""
    return {
        name: part for name, part in modules(pipeline).items() if name.startswith("text_encoder")
    }


@torch.no_grad()
def encode(pipeline: Pipeline, prompts: list[str], device: torch.device) -> Cond:
    """Text states of the prompts, each encoded alone, so that its bits do not depend on the others.

    The empty prompt is the null condition of classifier-free guidance; a pipeline that wants zeros
    there (SDXL) gets zeros. `device` is where the pipeline runs, which callers know: diffusers
    searches all modules to tell, which takes a small model as long as encoding a prompt.
    """
    rows = []
    for prompt in prompts:
        row = stock(pipeline).encoded([prompt], device)
        zeros = not prompt and pipeline.config.get("force_zeros_for_empty_prompt", False)
        rows.append(row.each(torch.zeros_like) if zeros else row)
    return Cond.stack(rows)


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
        guidance: scale, of which 1 is none: FLUX.1 dev embeds it, and schnell has none.
        steps: of the sampler.
        side: pixels of the square image.
        start: noise to start from, shape as the latents', before the sampler scales it; None: drawn
            by the generators.
        on_state: is shown the latents after each step.

    Raises:
        ErasureError: see `check_side`.
    """
    check_side(pipe, side)
    way = stock(pipe)
    rows, last = side // way.cell, torch.empty(0)

    def shown(pipeline: Pipeline, step: int, t: Tensor, tensors: dict[str, Tensor]) -> Any:
        # what a call gives at its end may be no more what the denoiser sees (FLUX.2)
        nonlocal last
        last = way.given(tensors["latents"], rows)
        if on_state:
            on_state(last)
        return tensors

    pipe(
        **way.arguments(cond, null),
        **way.guided(guidance),
        height=side,
        width=side,
        num_inference_steps=steps,
        generator=list(generators),
        latents=None if start is None else way.taken(start),
        output_type="latent",
        callback_on_step_end=shown,
    )
    return last


@torch.no_grad()
def decode(pipeline: Pipeline, latents: Tensor, precision: str) -> Tensor:
    """Pixels in [0, 1], shape (n, 3, H, W), of latents as the denoiser sees them.

    In fp16 a VAE that is marked `force_upcast` (SDXL's, whose activations pass 65,504) is run in
    float32.
    """
    vae = pipeline.vae
    stored, half = vae.dtype, precision == "fp16" or vae.dtype == torch.float16
    upcast = half and vae.config.get("force_upcast", False)
    try:
        if upcast and stored == torch.float16:
            vae.to(torch.float32)
        with autocast(latents.device, "no" if upcast else precision):
            pixels = stock(pipeline).decoded(latents)
    finally:
        if vae.dtype != stored:
            vae.to(stored)
    images: Tensor = pipeline.image_processor.postprocess(pixels, output_type="pt")
    return images
