"""Settings of the training data of an erasure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import inf
from typing import Any

from erase.latents.picking import PICKS
from erase.models.precision import check_precision
from erase.prompts.errors import BELOW_ONE, COUNT, FINITE, ErasureError, check_names, check_ranges

CAPTIONS = ("beside", "folder", "none")


@dataclass
class LatentConfig:
    """Where forget and retain latents come from."""

    n_forget: int = 32
    """forget images in all, over all concepts"""
    n_retain: int = 128
    """retain images in all"""
    steps: int = 5
    """sampling steps (DPM-Solver++ 2M) of latents that the model makes itself"""
    guidance: float = 3.0
    """guidance scale of that sampling"""
    retain_guidance: float | None = None
    """that of the retain images, where it differs: 1 is none, and takes half of the time"""
    pick: str = "random"
    """of the prompts that there are: random, or even (each word as often as in all of them, so that
    no style or thing is left out by chance)"""
    trajectory: int = 0
    """k: of each image that the model makes itself, train on k noisy states that its sampling
    passed through (on all, where there are fewer steps). They are fixed, so that what the frozen
    base predicts there is computed once. 0: on the finished image, noised anew at each step"""
    mixed_precision: str = "no"
    """no, bf16 or fp16, for the sampling"""
    batch_size: int = 32
    """images sampled or encoded at a time"""
    forget_images: str | None = None
    """a folder of images of the concept to encode instead of sampling: n_forget of all in it and in
    its folders, spread by the seed; without captions, the concept's prompts are paired with them in
    turn"""
    retain_images: str | None = None
    """a folder of images to keep, likewise"""
    captions: str = "beside"
    """what the prompts of these images are: beside (the .txt file of the same name, where images
    have one), folder (the name of the folder that each lies in, put into templates), or none. A
    forget image's must name the concept; with the anchor in its place it is the anchor prompt"""
    earlier: float = 0.25
    """Only with --after: fraction of the retain latents that the model draws under
    the earlier concepts' prompts, so that these go on giving what they give now; 0: none"""
    cache: str | None = None
    """a folder of finished latents that several runs share, at the same time too: what one has made
    of a base, prompts, seed and these settings, no other makes again. Default: the run's own"""

    def __post_init__(self) -> None:
        check_precision(self.mixed_precision)
        check_names(self, {"captions": CAPTIONS, "pick": PICKS})
        instead = dict.fromkeys(("forget_images", "retain_images"), "sample the images")
        for name, otherwise in {**instead, "cache": "keep the latents in the run's"}.items():
            if (folder := getattr(self, name)) is not None and not folder.strip():
                raise ErasureError(
                    f"latents.{name} is empty; name a folder, or leave it out to {otherwise}"
                )
        counts = dict.fromkeys(("n_forget", "n_retain", "steps", "batch_size"), COUNT)
        guidances = dict.fromkeys(("guidance", "retain_guidance"), FINITE)
        check_ranges(self, {**counts, "trajectory": (0, inf), **guidances}, "latents")
        check_ranges(self, {"earlier": BELOW_ONE}, "latents")

    @property
    def facts(self) -> dict[str, Any]:
        """All that the latents depend on: not where they are kept."""
        return {name: value for name, value in asdict(self).items() if name != "cache"}
