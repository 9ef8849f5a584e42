"""Qwen-Image: two streams of image and text, the states of a language model that sees, and the
latents of a video VAE; trained by rectified flow and guided by two passes.

Qwen Team 2025, https://arxiv.org/abs/2508.02324.

Its stock pipeline puts the prompt behind an instruction, whose states it drops, and gives what is
guided the norm of what is not, patch by patch. What the encoder sees with is no weight that a
method may change: no prompt comes through it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from erase.models.base import Cond
from erase.models.chat import Chat, masked, padded
from erase.models.flow import PatchedFlow
from erase.models.patches import pack, unpack
from erase.models.pipelines import Pipeline
from erase.models.stock import Stock
from erase.prompts.errors import ErasureError

SIGHT = "text_encoder.model.visual."
OTHERS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
"""what the transformers of its siblings take beside noise, time and text"""


class StockQwen(Chat):
    """A stock `QwenImagePipeline` as it is called: its latents are a sequence of patches, and a
    mask tells text states from their filling."""

    family = "qwen-image"
    tells_shift = tells_levels = True

    @property
    def channels(self) -> int:
        count: int = self.pipeline.vae.config.z_dim
        return count

    def taken(self, latents: Tensor) -> Tensor:
        return pack(latents)

    def given(self, latents: Tensor, rows: int) -> Tensor:
        return unpack(latents, rows, rows)

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, and one over the standard deviation, of each channel."""
        config = self.pipeline.vae.config
        mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
        return mean.view(-1, 1, 1, 1).to(like), 1 / std.view(-1, 1, 1, 1).to(like)

    def decoded(self, latents: Tensor) -> Tensor:
        frames = latents.unsqueeze(2).to(self.pipeline.vae.dtype)
        mean, scale = self.statistics(frames)
        pixels: Tensor = self.pipeline.vae.decode(frames / scale + mean).sample[:, :, 0]
        return pixels

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.pipeline.vae.encode(images.unsqueeze(2)).latent_dist
        mean, scale = self.statistics(posterior.mean)
        return ((posterior.mean - mean) * scale).squeeze(2), (posterior.std * scale).squeeze(2)

    def filled(self, prompt: str) -> str:
        text: str = self.pipeline.prompt_template_encode.format(prompt)
        return text

    def room(self, tokenizer: Any) -> int:
        return self.tokens

    def states(self, encoder: str) -> range | None:
        return range(self.tokens)  # the pipeline drops those of the instruction before it

    def encoded(self, prompts: list[str], device: torch.device) -> Cond:
        states, mask = self.pipeline.encode_prompt(
            prompts, device=device, max_sequence_length=self.tokens
        )
        lengths = [states.shape[1]] * len(states) if mask is None else mask.sum(1).tolist()
        return padded([row[:n] for row, n in zip(states, lengths, strict=True)], self.tokens)

    def arguments(self, cond: Cond, null: Cond) -> dict[str, Any]:
        (states, mask), (none, none_mask) = masked(cond), masked(null)
        return {
            "prompt_embeds": states,
            "prompt_embeds_mask": mask,
            "negative_prompt_embeds": none,
            "negative_prompt_embeds_mask": none_mask,
        }

    def guided(self, scale: float) -> dict[str, float]:
        return {"true_cfg_scale": scale}


class QwenImage(PatchedFlow):
    """A `DiffusionModel` over a stock `QwenImagePipeline`."""

    components: ClassVar[tuple[str, ...]] = ("transformer", "text_encoder")
    stock: ClassVar[type[Stock]] = StockQwen
    stretched: ClassVar[bool] = True

    def __init__(self, pipeline: Pipeline, name: str = "in memory") -> None:
        config = pipeline.transformer.config
        if other := next((option for option in OTHERS if config.get(option)), None):
            raise ErasureError(
                f"{name}: its transformer says {other}, so it is one of Qwen-Image's siblings "
                "(editing, layers); give Qwen-Image"
            )
        StockQwen(pipeline).check_template(name)
        instruction = pipeline.prompt_template_encode.partition("{}")[0]
        long = len(pipeline.tokenizer(instruction).input_ids)
        if long != (dropped := pipeline.prompt_template_encode_start_idx):
            raise ErasureError(
                f"{name}: its instruction is {long} tokens to its tokenizer, and the states of "
                f"{dropped} are dropped; give the tokenizer that belongs to the model"
            )
        super().__init__(pipeline, name)

    def parameters(self, component: str | None = None) -> dict[str, nn.Parameter]:
        params = super().parameters(component)
        return {key: param for key, param in params.items() if not key.startswith(SIGHT)}

    def predict(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        height, width = xt.shape[-2:]
        states, mask = masked(cond)
        prediction: Tensor = self._pipeline.transformer(
            hidden_states=pack(xt),
            timestep=self.sigma(t),
            encoder_hidden_states=states,
            encoder_hidden_states_mask=None if mask.all() else mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(xt),
        ).sample
        return unpack(prediction, height, width)
