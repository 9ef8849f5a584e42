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

from math import exp
from typing import Any, ClassVar

from torch import Tensor

from erase.models.base import Cond
from erase.models.flow import RectifiedFlow
from erase.models.patches import pack, positions, unpack
from erase.models.pipelines import POOLED, Pipeline
from erase.models.schedules import check_flow
from erase.prompts.errors import ErasureError

PLAIN = 1.0
"""g, where nothing is guided"""


class Flux(RectifiedFlow):
    """A `DiffusionModel` over a stock `FluxPipeline`."""

    components: ClassVar[tuple[str, ...]] = ("transformer", "text_encoder", "text_encoder_2")

    def __init__(self, pipeline: Pipeline, name: str = "in memory") -> None:
        check_flow(pipeline.scheduler, name, by_size=True)
        _check_transformer(pipeline, name)
        super().__init__(pipeline, name)
        if self.latent_shape[1] % 2:
            raise ErasureError(
                f"{name}: its VAE's configuration has the sample_size {self.image_size}, which "
                "patches of 2 x 2 latents do not fill; write 1024 there"
            )

    def shift(self) -> float:
        """At the model's own resolution: dev's grows with the number of patches, linearly in its
        logarithm."""
        config: Any = self._pipeline.scheduler.config
        if not config.use_dynamic_shifting:
            return super().shift()
        patches = (self.latent_shape[1] // 2) * (self.latent_shape[2] // 2)
        slope = (config.max_shift - config.base_shift) / (
            config.max_image_seq_len - config.base_image_seq_len
        )
        mu: float = config.base_shift + slope * (patches - config.base_image_seq_len)
        return mu if config.time_shift_type == "linear" else exp(mu)

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
