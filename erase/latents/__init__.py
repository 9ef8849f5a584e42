"""The training data: forget and retain latents, sampled or encoded from images."""

from erase.latents.prepare import LatentConfig, LatentSet, prepare_latents

__all__ = ["LatentConfig", "LatentSet", "prepare_latents"]
