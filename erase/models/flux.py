"""FLUX.1 dev and schnell: a transformer over patches of the image and T5's text states, distilled
from a model with guidance, trained by rectified flow.

Black Forest Labs 2024, https://github.com/black-forest-labs/flux; dev's distillation: Meng et al.,
CVPR 2023, https://arxiv.org/abs/2210.03142.

dev learnt v(x, c, g) = v(x, "") + g (v(x, c) - v(x, "")) of its teacher, with g as an input. So g
is 1 wherever a method asks: there alone a prediction is the velocity under its prompt, which
methods' equations (guided sums of two prompts among them) and the target noise - x_0 mean. Images
are drawn at the g that is asked for (`guidance`), in one pass. schnell has no g, and is drawn
without guidance, as its stock pipeline draws it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from erase.models.base import Cond
from erase.models.flow import PatchedFlow
from erase.models.patches import pack, positions, unpack
from erase.models.pipelines import Pipeline
from erase.models.stock import POOLED, Patched, Stock
from erase.prompts.errors import ErasureError

PLAIN = 1.0
"""g, where nothing is guided"""


class StockFlux(Patched):
    """A stock `FluxPipeline` as it is called: its latents are a sequence of patches."""

    tells_shift = True

    @property
    def family(self) -> str:  # type: ignore[override]  # the transformer tells
        return "flux-dev" if self.pipeline.transformer.config.guidance_embeds else "flux-schnell"

    def taken(self, latents: Tensor) -> Tensor:
        return pack(latents)

    def given(self, latents: Tensor, rows: int) -> Tensor:
        return unpack(latents, rows, rows)

    def states(self, encoder: str) -> range | None:
        return range(self.tokens) if encoder == "text_encoder_2" else None

    def encoded(self, prompts: list[str], device: torch.device) -> Cond:
        states, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            device=device,
            num_images_per_prompt=1,
            max_sequence_length=self.tokens,
        )
        return Cond(states, {POOLED: pooled})


class Flux(PatchedFlow):
    """A `DiffusionModel` over a stock `FluxPipeline`; dev's shift grows with the number of
    patches, linearly in its logarithm."""

    components: ClassVar[tuple[str, ...]] = ("transformer", "text_encoder", "text_encoder_2")
    stock: ClassVar[type[Stock]] = StockFlux

    def __init__(self, pipeline: Pipeline, name: str = "in memory") -> None:
        _check_transformer(pipeline, name)
        super().__init__(pipeline, name)

    def predict(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        height, width = xt.shape[-2:]
        transformer = self._pipeline.transformer
        prediction: Tensor = transformer(
            pack(xt),
            # times 1000 in there
            timestep=self.sigma(t),
            guidance=xt.new_full((len(xt),), PLAIN) if transformer.config.guidance_embeds else None,
            encoder_hidden_states=cond.embeddings,
            pooled_projections=cond.extras[POOLED],
            txt_ids=xt.new_zeros(cond.embeddings.shape[1], 3),
            img_ids=positions(height, width).to(xt),
        ).sample
        return unpack(prediction, height, width)


def _check_transformer(pipeline: Pipeline, name: str) -> None:
    """Refuse a transformer that wants more than noisy latents.

    Raises:
        ErasureError: says what it takes.
    """
    channels, latents = pipeline.transformer.config.in_channels, pipeline.vae.config.latent_channels
    if channels != 4 * latents:
        raise ErasureError(
            f"{name}: its transformer takes {channels} channels where patches of latents have "
            f"{4 * latents}, so it is a filling, depth or edge model; give FLUX.1 dev or schnell"
        )
