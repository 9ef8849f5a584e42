"""Stable Diffusion 1, 2 and XL in miniature: the layers of the real ones, narrow, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENIZER = Path(__file__).parents[1] / "erase/models/canvas/tokenizer"
SCHEDULE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1, "timestep_spacing": "leading"
}  # fmt: skip
LEVELS = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (16, 32, 64, 64),
    "norm_num_groups": 8,
    "sample_size": 8,
}


def tiny_sd1(seed: int = 0) -> StableDiffusionPipeline:
    """SD 1: four levels, 1x1 convolutions around the attention, a CLIP-L text encoder; 64 pixels, 2.3 M weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**LEVELS, cross_attention_dim=32, attention_head_dim=4)
        scheduler = PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False)
        return _pipeline(unet, _text(CLIPTextModel, 32, 2, "quick_gelu"), scheduler)


def tiny_sd2(seed: int = 0, prediction: str = "epsilon") -> StableDiffusionPipeline:
    """SD 2: four levels, linear layers around the attention, the OpenCLIP-H text encoder without its last layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**LEVELS, cross_attention_dim=48, attention_head_dim=(2, 4, 8, 8), use_linear_projection=True)
        scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction)
        return _pipeline(unet, _text(CLIPTextModel, 48, 3, "gelu"), scheduler, "!")


def tiny_sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """SDXL: three levels of 0, 2 and 3 transformer layers, two text encoders, size and pooled text as an added embedding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(16, 32, 64),
            norm_num_groups=8,
            sample_size=8,
            cross_attention_dim=32 + 48,
            attention_head_dim=(2, 4, 8),
            transformer_layers_per_block=(1, 2, 3),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 40,
        )
        texts = _text(CLIPTextModel, 32, 2, "quick_gelu"), _text(CLIPTextModelWithProjection, 48, 3, "gelu", projection=40)
        pipeline = StableDiffusionXLPipeline(
            _vae(0.13025), *texts, _tokenizer(), _tokenizer("!"), unet, EulerDiscreteScheduler(**SCHEDULE),
            add_watermarker=False,
        )  # fmt: skip
        return _stirred(pipeline)


def _pipeline(unet: nn.Module, text: nn.Module, scheduler: object, pad: str = "<|endoftext|>") -> StableDiffusionPipeline:
    parts = (_vae(0.18215), text, _tokenizer(pad), unet, scheduler)
    return _stirred(StableDiffusionPipeline(*parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False))


def _tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(TOKENIZER, pad_token=pad)


def _text(kind: type, width: int, layers: int, act: str, projection: int = 512) -> nn.Module:
    """Begin, end and padding ids 0, 2 and 1, as in the real configurations, where they are not the tokenizer's either."""
    return kind(
        CLIPTextConfig(
            vocab_size=723, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
            max_position_embeddings=32, hidden_act=act, projection_dim=projection, bos_token_id=0, eos_token_id=2, pad_token_id=1,
        )
    )  # fmt: skip


def _vae(scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 8, 16, 16),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=scaling_factor,
    )


def _stirred(pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline):
    """No two tensors alike (fresh norms are all ones, fresh biases zero), so that no exchanged pair goes unseen."""
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
            for weight in part.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.02)
    return pipeline
