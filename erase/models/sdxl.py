"""Stable Diffusion XL (base): two text encoders, pooled text states and the image's size as further
conditions."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from erase.models.base import Cond
from erase.models.pipelines import Pipeline
from erase.models.sd import StableDiffusion
from erase.models.stock import POOLED, Stock
from erase.prompts.errors import ErasureError


class StockXL(Stock):
    """A stock `StableDiffusionXLPipeline` as it is called."""

    family = "sdxl"


class StableDiffusionXL(StableDiffusion):
    """A `DiffusionModel` over a stock `StableDiffusionXLPipeline`."""

    components: ClassVar[tuple[str, ...]] = ("unet", "text_encoder", "text_encoder_2")
    stock: ClassVar[type[Stock]] = StockXL
    addition: ClassVar[str | None] = "text_time"

    def __init__(self, pipeline: Pipeline, name: str = "in memory") -> None:
        if pipeline.text_encoder is None:
            raise ErasureError(
                f"{name}: it has one text encoder, so it is an SDXL refiner; give the base model"
            )
        super().__init__(pipeline, name)

    def added(self, xt: Tensor, cond: Cond) -> dict[str, Tensor]:
        """Pooled text states of the second encoder, and the size conditioning of whole images of
        this size, uncropped."""
        height, width = (side * self._pipeline.vae_scale_factor for side in xt.shape[-2:])
        ids = torch.tensor(
            [[height, width, 0, 0, height, width]], dtype=cond.embeddings.dtype, device=xt.device
        )
        return {"text_embeds": cond.extras[POOLED], "time_ids": ids.repeat(len(xt), 1)}
