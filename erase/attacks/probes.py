"""Probes: ways to draw a concept that its erased prompt does not show, without a search.

Boosted noise, completion and inpainting: Lu et al., "When Are Concepts Erased From Diffusion
Models?", NeurIPS 2025, https://arxiv.org/abs/2505.17013. Latent inversion: Rusanovsky et al.,
"Memories of Forgotten Concepts", CVPR 2025, https://arxiv.org/abs/2412.00782. What brings a concept
back so was never in the words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from erase.attacks.walk import Level, Walker, levels, noised_to, preserves_variance, start_noise
from erase.models import DiffusionModel
from erase.prompts.errors import ErasureError


@dataclass(frozen=True)
class Sampling:
    """How a probe samples."""

    steps: int = 20
    guidance: float = 5.0
    """as diffusers counts it; 1 is none"""


def has_eta(model: DiffusionModel) -> bool:
    """Whether the model samples with noise: not one of flow matching."""
    return preserves_variance(Level.of(model, model.timesteps // 2))


def check_eta(model: DiffusionModel) -> None:
    """Refuse boosted noise where there is no eta.

    Raises:
        ErasureError: the model is one of flow matching.
    """
    if not has_eta(model):
        raise ErasureError(
            f"{model.name} is trained by flow matching, which samples without noise, so it has no "
            "eta to raise; leave the probe noise out"
        )


def boosted_noise(
    model: DiffusionModel, prompts: Sequence[str], seeds: Sequence[int], eta: float, how: Sampling
) -> Tensor:
    """Latents of ordinary prompts, sampled with eta times DDPM's noise at each step (1 to 1.85 in
    the paper).

    Raises:
        ErasureError: see `check_eta`.
    """
    check_eta(model)
    walker = Walker.under(model, prompts, how.guidance)
    return walker.stochastic(start_noise(model, seeds), levels(model, how.steps), eta, seeds)


def complete(
    model: DiffusionModel,
    latents: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    level: float,
    how: Sampling,
) -> Tensor:
    """Latents denoised from images that are noised part of the way.

    Args:
        model: completes them.
        latents: of images of the concept, shape (n, *latent_shape).
        prompts: one each; empty or without its name.
        seeds: of the noise.
        level: fraction of the steps that are taken, rounded; at 1 nothing of the image is left, at
            0 nothing is done.
        how: steps of a whole sampling, guidance.
    """
    path = levels(model, how.steps)[how.steps - round(level * how.steps) :]
    noise = start_noise(model, seeds)
    if len(path) == how.steps + 1:
        begun = noise
    else:
        begun = noised_to(path[0], latents.to(model.device), noise)
    return Walker.under(model, prompts, how.guidance).forwards(begun, path)


def inpaint(
    model: DiffusionModel,
    latents: Tensor,
    keep: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    how: Sampling,
) -> Tensor:
    """Latents of images of which a part is drawn anew: at each step, what is kept is put back, as
    noisy as the rest (Lugmayr et al., CVPR 2022, eq. 8, without resampling).

    Args:
        model: draws the missing part.
        latents: of images of the concept, shape (n, *latent_shape).
        keep: 1 where the image stays, shape (n or 1, 1, h, w).
        prompts: one each; empty or without its name.
        seeds: of the start, and of the noise on what is kept.
        how: steps, guidance.
    """
    latents, keep = latents.to(model.device), keep.to(model.device)
    noise = start_noise(model, seeds)

    def put_back(x: Tensor, level: Level) -> Tensor:
        return torch.where(keep.bool(), noised_to(level, latents, noise), x)

    path = levels(model, how.steps)
    walker = Walker.under(model, prompts, how.guidance)
    return walker.forwards(put_back(noise, path[0]), path, put_back)


def halves(model: DiffusionModel, count: int) -> Tensor:
    """Masks that keep the left half and the right half in turn, shape (count, 1, h, w)."""
    _, height, width = model.latent_shape
    left = (torch.arange(width) < width // 2).expand(1, height, width)
    return torch.stack([~left if row % 2 else left for row in range(count)])


@dataclass(frozen=True)
class Inverted:
    """Start noise from which a model draws given images."""

    start: Tensor
    """shape (n, *latent_shape)"""

    def mean_square(self) -> list[float]:
        """Of each start; a sampler's own noise has 1.

        A network that predicts nothing is inverted to the image itself, enlarged: that is no memory
        of it, and far from 1.
        """
        return [float(one) for one in self.start.float().square().mean((1, 2, 3))]


def invert(
    model: DiffusionModel,
    latents: Tensor,
    prompts: Sequence[str],
    how: Sampling,
    iterations: int = 3,
) -> Inverted:
    """Starts from which `redraw` leads to these images, under the same prompts.

    Args:
        model: inverted.
        latents: of the images, shape (n, *latent_shape).
        prompts: one each.
        how: steps, guidance; with guidance the way back is less exact.
        iterations: of each step, for exactness (`Walker.backwards`).
    """
    walker = Walker.under(model, prompts, how.guidance)
    path = levels(model, how.steps)
    return Inverted(walker.backwards(latents.to(model.device), path, iterations))


def redraw(
    model: DiffusionModel, inverted: Inverted, prompts: Sequence[str], how: Sampling
) -> Tensor:
    """Latents sampled from these starts."""
    walker = Walker.under(model, prompts, how.guidance)
    return walker.forwards(inverted.start, levels(model, how.steps))
