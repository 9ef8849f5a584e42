"""The training data: forget and retain latents, sampled or encoded from images."""

from erase.latents.config import LatentConfig
from erase.latents.latent_set import LatentSet
from erase.latents.prepare import prepare_latents

__all__ = ["LatentConfig", "LatentSet", "prepare_latents"]
