"""Z-Image and Z-Image-Turbo: a transformer of one stream over the image's patches and a language
model's text states, trained by rectified flow (Turbo distilled from it).

Z-Image Team 2025, https://arxiv.org/abs/2511.22699.

The transformer counts time from noise (0) to image (1), and says x_0 - noise: here both are turned
round. Its stock pipeline counts guidance from 0, v(c) + s (v(c) - v("")): a scale g here is s = g -
1 there, so that 1 is none as for every family. Turbo is drawn at 1.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from erase.models.base import Cond
from erase.models.chat import Chat, padded, unpadded
from erase.models.flow import PatchedFlow
from erase.models.pipelines import Pipeline
from erase.models.stock import Stock
from erase.prompts.errors import ErasureError


class StockZ(Chat):
    """A stock `ZImagePipeline` as it is called: its text states are a list, of several lengths."""

    family = "z-image"
    thinking = True
    tells_levels = True

    def encoded(self, prompts: list[str], device: torch.device) -> Cond:
        # the pipeline writes into the list that it is given
        states, _ = self.pipeline.encode_prompt(
            list(prompts),
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.tokens,
        )
        return padded(states, self.tokens)

    def arguments(self, cond: Cond, null: Cond) -> dict[str, Any]:
        return {"prompt_embeds": unpadded(cond), "negative_prompt_embeds": unpadded(null)}

    def guided(self, scale: float) -> dict[str, float]:
        return {"guidance_scale": scale - 1}


class ZImage(PatchedFlow):
    """A `DiffusionModel` over a stock `ZImagePipeline`."""

    components: ClassVar[tuple[str, ...]] = ("transformer", "text_encoder")
    stock: ClassVar[type[Stock]] = StockZ

    def __init__(self, pipeline: Pipeline, name: str = "in memory") -> None:
        config = pipeline.transformer.config
        if config.get("siglip_feat_dim") is not None:
            raise ErasureError(
                f"{name}: its transformer takes images beside text (siglip_feat_dim "
                f"{config.siglip_feat_dim}), so it is an Omni model; give Z-Image or Z-Image-Turbo"
            )
        StockZ(pipeline).check_template(name)
        super().__init__(pipeline, name)

    def predict(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        frames = list(xt.unsqueeze(2))
        found = self._pipeline.transformer(frames, 1 - self.sigma(t), unpadded(cond)).sample
        return -torch.stack(found).squeeze(2)
