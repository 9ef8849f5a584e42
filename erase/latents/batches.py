"""Rows of latents as the denoiser sees them: noised, with their timesteps and what it is trained to
answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from erase.latents.latent_set import LatentSet
from erase.models import DiffusionModel


@dataclass(frozen=True)
class Rows:
    """Noisy latents of some rows; without prompts, for the same rows may be asked under several."""

    noisy: Tensor
    """x_t, shape (n, c, h, w)"""
    t: Tensor
    """training timesteps, shape (n,), int64"""
    target: Tensor
    """what the denoiser is trained to predict there (noise, velocity or flow), shape (n, c, h,
    w)"""

    def __len__(self) -> int:
        return len(self.noisy)

    def cat(self, other: Rows) -> Rows:
        """The rows of both, in order."""
        pairs = ((self.noisy, other.noisy), (self.t, other.t), (self.target, other.target))
        return Rows(*(torch.cat(pair) for pair in pairs))


def noised(model: DiffusionModel, latents: Tensor, noise: Tensor, t: Tensor) -> Rows:
    """Rows of clean latents under this noise at these timesteps, on the model's device."""
    latents, noise, t = (tensor.to(model.device) for tensor in (latents, noise, t))
    return Rows(model.add_noise(latents, noise, t), t, model.target(latents, noise, t))


def draw_rows(
    model: DiffusionModel,
    latents: LatentSet,
    rows: Tensor,
    generator: torch.Generator,
    power: float = 1.0,
) -> Rows:
    """These rows of a set: a posterior sample, a timestep and noise each, in this order from the
    generator; `power` as in `LatentSet.draw_noise`."""
    clean = latents.draw(rows, generator)
    t, noise = latents.draw_noise(rows, model.timesteps, generator, power)
    return noised(model, clean, noise, t)


def rows_at(
    model: DiffusionModel, latents: LatentSet, rows: Tensor, t: int, generator: torch.Generator
) -> Rows:
    """These rows of a set, all at one timestep: a posterior sample and noise each, from the
    generator."""
    clean = latents.draw(rows, generator)
    noise = torch.randn(clean.shape, generator=generator)
    return noised(model, clean, noise, torch.full((len(rows),), t))


def clean(model: DiffusionModel, rows: Rows, prediction: Tensor) -> Tensor:
    """The clean latents x_0 that a prediction means, whatever is predicted: x_t = a x_0 + b n and
    the prediction c x_0 + d n, so x_0 = (d x_t - b prediction) / (a d - b c)."""
    zero, one = (torch.full_like(rows.noisy[:, :1, :1, :1], value) for value in (0.0, 1.0))
    a, b = (model.add_noise(*pair, rows.t) for pair in ((one, zero), (zero, one)))
    c, d = (model.target(*pair, rows.t) for pair in ((one, zero), (zero, one)))
    return (d * rows.noisy - b * prediction) / (a * d - b * c)
