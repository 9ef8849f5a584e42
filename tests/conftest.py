"""Fixtures shared by the tests: a Stable Diffusion of a few thousand random weights, with every
part of a real one."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from erase.models import CANVAS
from erase.models.chat import Chat
from erase.models.flux import StockFlux
from erase.models.precision import pin_mkl_rounding

pin_mkl_rounding()  # before the first product, as the commands do


def pytest_collection_finish() -> None:
    """What is there before the first test, libraries and tests, stays: collecting garbage, as every
    training does at its end, need not walk through it."""
    gc.collect()
    gc.freeze()


def build_pico_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """The canvas model made small: 32x32 pixels, 8x8x4 latents, cross-attention of width 32;
    weights random by `seed`."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(CANVAS / "tokenizer")
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = DDIMScheduler.from_pretrained(CANVAS / "scheduler")
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=text_encoder.eval(), tokenizer=tokenizer, unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def short_t5(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX's T5 reads few tokens, so that tests which ask no stock pipeline take less time."""
    monkeypatch.setattr(StockFlux, "tokens", 24)


@pytest.fixture
def short_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Language models read few tokens, so that tests take less time."""
    monkeypatch.setattr(Chat, "tokens", 40)


@pytest.fixture(scope="session")
def make_pico_pipeline() -> Callable[..., StableDiffusionPipeline]:
    """`make_pico_pipeline(seed=0)` builds a fresh one on every call: tests may change its
    weights."""
    return build_pico_pipeline
