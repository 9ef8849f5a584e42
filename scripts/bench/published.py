"""The published models at their full sizes, without memory for weights, and what one row of each
denoiser is given at its own resolution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import transformers
from accelerate import init_empty_weights
from torch import nn

from erase.models.single_file.architectures import shipped

PATCHES, TOKENS = 4096, 512
"""of 1024 pixels, and of the longest prompt"""
Made = Callable[..., Any]


def weights(module: nn.Module) -> int:
    """How many a module has."""
    return sum(param.numel() for param in module.parameters())


@dataclass(frozen=True)
class Published:
    """A model's parts; sizes as in its configurations on the hub."""

    denoiser: Callable[[], Any]
    row: Callable[[Made, Any], dict[str, Any]]
    """arguments of a forward pass, of a maker of tensors by shape and a time in 0 .. 1, shape
    (1,)"""
    beside: tuple[Callable[[], Any], ...]
    """text encoders and VAE"""

    def network(self) -> nn.Module:
        """The denoiser, on the meta device."""
        with init_empty_weights():
            network: nn.Module = self.denoiser()
        return network

    def others(self) -> list[nn.Module]:
        """Text encoders and VAE, on the meta device."""
        with init_empty_weights():
            return [make() for make in self.beside]


def _of_sd(family: str) -> Published:
    architecture = shipped(family, "v_prediction" if family == "sd2" else "epsilon")
    parts = architecture.modules()
    config: Any = parts["unet"].config

    def row(made: Made, time: Any) -> dict[str, Any]:
        return {
            "sample": made(1, 4, config.sample_size, config.sample_size),
            "timestep": (1000 * time).long(),
            "encoder_hidden_states": made(1, 77, config.cross_attention_dim),
            "added_cond_kwargs": {"text_embeds": made(1, 1280), "time_ids": made(1, 6)},
        }

    def part(name: str) -> Any:
        return architecture.modules()[name]

    others = tuple(partial(part, name) for name in parts if name != "unet")
    return Published(partial(part, "unet"), row, others)


def _clip(name: str) -> Any:
    return shipped("sdxl", "epsilon").modules()[name]


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=32128,
        d_model=4096,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    config.tie_word_embeddings = False
    return transformers.T5EncoderModel(config)


def _qwen3(width: int, inner: int) -> Any:
    return transformers.Qwen3Model(
        transformers.Qwen3Config(
            vocab_size=151936,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
        )
    )


def _qwen25() -> Any:
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={
                "vocab_size": 152064,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
            },
            vision_config={
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": 3584,
            },
        )
    )


def wide_vae(**stated: Any) -> Any:
    """The VAE of 16 channels that SD 3, FLUX.1 and Z-Image have; each states its own factors."""
    return diffusers.AutoencoderKL(
        latent_channels=16,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **stated,
    )


def _of_sd3(width: int, layers: int, dual: int) -> Published:
    def denoiser() -> Any:
        return diffusers.SD3Transformer2DModel(
            sample_size=128,
            num_layers=layers,
            num_attention_heads=width // 64,
            caption_projection_dim=width,
            pos_embed_max_size=384 if dual else 192,
            qk_norm="rms_norm",
            dual_attention_layers=tuple(range(dual)),
        )

    def row(made: Made, time: Any) -> dict[str, Any]:
        return {
            "hidden_states": made(1, 16, 128, 128),
            "timestep": 1000 * time,
            "encoder_hidden_states": made(1, 77 + 256, 4096),
            "pooled_projections": made(1, 2048),
        }

    clips = partial(_clip, "text_encoder"), partial(_clip, "text_encoder_2")
    return Published(denoiser, row, (*clips, _t5, wide_vae))


def _of_klein(width: int, layers: int, single: int, text: int, inner: int) -> Published:
    def denoiser() -> Any:
        return diffusers.Flux2Transformer2DModel(
            num_layers=layers,
            num_single_layers=single,
            num_attention_heads=width // 128,
            joint_attention_dim=3 * text,
            guidance_embeds=False,
        )

    def row(made: Made, time: Any) -> dict[str, Any]:
        return {
            "hidden_states": made(1, PATCHES, 128),
            "timestep": time,
            "encoder_hidden_states": made(1, TOKENS, 3 * text),
            "txt_ids": made(TOKENS, 4),
            "img_ids": made(PATCHES, 4),
        }

    return Published(denoiser, row, (partial(_qwen3, text, inner), diffusers.AutoencoderKLFlux2))


def _flux(made: Made, time: Any) -> dict[str, Any]:
    return {
        "hidden_states": made(1, PATCHES, 64),
        "timestep": time,
        "guidance": time,
        "encoder_hidden_states": made(1, TOKENS, 4096),
        "pooled_projections": made(1, 768),
        "txt_ids": made(TOKENS, 3),
        "img_ids": made(PATCHES, 3),
    }


def _z_image(made: Made, time: Any) -> dict[str, Any]:
    return {"x": [made(16, 1, 128, 128)], "t": time, "cap_feats": [made(TOKENS, 2560)]}


def _qwen(made: Made, time: Any) -> dict[str, Any]:
    return {
        "hidden_states": made(1, PATCHES, 64),
        "timestep": time,
        "encoder_hidden_states": made(1, TOKENS, 3584),
        "img_shapes": [[(1, 64, 64)]],
    }


MODELS: dict[str, Callable[[], Published]] = {
    "sd1": partial(_of_sd, "sd1"),
    "sd2": partial(_of_sd, "sd2"),
    "sdxl": partial(_of_sd, "sdxl"),
    "sd3.5-medium": partial(_of_sd3, 1536, 24, 13),
    "sd3.5-large": partial(_of_sd3, 2432, 38, 0),
    "klein-4b": partial(_of_klein, 3072, 5, 20, 2560, 9728),
    "klein-9b": partial(_of_klein, 4096, 8, 24, 4096, 12288),
    "z-image": lambda: Published(
        diffusers.ZImageTransformer2DModel, _z_image, (partial(_qwen3, 2560, 9728), wide_vae)
    ),
    "flux1-dev": lambda: Published(
        partial(diffusers.FluxTransformer2DModel, guidance_embeds=True),
        _flux,
        (partial(_clip, "text_encoder"), _t5, wide_vae),
    ),
    "qwen-image": lambda: Published(
        diffusers.QwenImageTransformer2DModel, _qwen, (_qwen25, diffusers.AutoencoderKLQwenImage)
    ),
}
"""name -> what is built"""
