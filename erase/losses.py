"""Losses: small pure functions of predictions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """`(1 + g) * eps_c - g * eps_null`: classifier-free guidance as SalUn writes it; g = 7.5 is
    diffusers' guidance_scale 8.5."""
    return (1 + guidance) * conditional - guidance * unconditional


def denoising(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of a denoiser, in float32 (Ho et al. 2020, eq. 14)."""
    return F.mse_loss(prediction.float(), target.float())


def denoising_rows(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each row, in float32, shape (n,)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)


def forgetting(prediction: Tensor, target: Tensor) -> Tensor:
    """The forget loss whose gradient is the saliency: minus the denoising error (SalUn, eq. 3)."""
    return -denoising(prediction, target)


def remap(prediction: Tensor, anchor: Tensor) -> Tensor:
    """Pull the forget prompt's prediction to the anchor prompt's, which takes no gradient (SalUn,
    eq. 6)."""
    return denoising(prediction, anchor.detach())
