"""The training data: forget and retain latents, sampled or encoded from images."""
