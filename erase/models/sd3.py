"""Stable Diffusion 3 and 3.5: a transformer with joint attention over image and text, trained by
rectified flow.

Esser et al., 2024, https://arxiv.org/abs/2403.03206.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from erase.models.base import Cond
from erase.models.flow import RectifiedFlow
from erase.models.pipelines import Pipeline
from erase.models.schedules import check_flow
from erase.models.stock import POOLED, Stock


class Stock3(Stock):
    """A stock `StableDiffusion3Pipeline` as it is called.

    In the place of a T5 that is left out stand zeros: as many as CLIP has tokens, as the reference
    code has it. (The stock call puts `max_sequence_length` of them there, 256 by default.)
    """

    family = "sd3"
    tokens = 256

    @property
    def length(self) -> int:
        """Places of the last encoder's states."""
        if self.pipeline.text_encoder_3 is not None:
            return self.tokens
        clip: int = self.pipeline.tokenizer_max_length
        return clip

    def states(self, encoder: str) -> range | None:
        clip = self.pipeline.tokenizer_max_length
        t5 = range(clip, clip + self.tokens)
        return t5 if encoder == "text_encoder_3" else range(1, clip)

    def stated(self) -> dict[str, int]:
        return {} if self.length == self.tokens else {"max_sequence_length": self.length}

    def encoded(self, prompts: list[str], device: torch.device) -> Cond:
        found = self.pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            device=device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            max_sequence_length=self.length,
        )
        return Cond(found[0], {POOLED: found[2]})


class StableDiffusion3(RectifiedFlow):
    """A `DiffusionModel` over a stock `StableDiffusion3Pipeline`."""

    components: ClassVar[tuple[str, ...]] = (
        "transformer",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
    )
    stock: ClassVar[type[Stock]] = Stock3

    def __init__(self, pipeline: Pipeline, name: str = "in memory") -> None:
        check_flow(pipeline.scheduler, name)
        super().__init__(pipeline, name)

    def predict(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        prediction: Tensor = self._pipeline.transformer(
            xt,
            timestep=self.sigma(t) * self.timesteps,
            encoder_hidden_states=cond.embeddings,
            pooled_projections=cond.extras[POOLED],
        ).sample
        return prediction
