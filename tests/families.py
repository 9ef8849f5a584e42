"""Stable Diffusion 1, 2, XL and 3 and FLUX.1 in miniature: the layers of the real ones, narrow,
with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TOKENIZER = Path(__file__).parents[1] / "erase/models/canvas/tokenizer"
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
LEVELS = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (16, 32, 64, 64),
    "norm_num_groups": 8,
    "sample_size": 8,
}


def tiny_sd1(seed: int = 0) -> StableDiffusionPipeline:
    """SD 1: four levels, 1x1 convolutions around the attention, a CLIP-L text encoder; 64 pixels,
    2.3 M weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**LEVELS, cross_attention_dim=32, attention_head_dim=4)
        scheduler = PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False)
        return _pipeline(unet, _text(CLIPTextModel, 32, 2, "quick_gelu"), scheduler)


def tiny_sd2(seed: int = 0, prediction: str = "epsilon") -> StableDiffusionPipeline:
    """SD 2: four levels, linear layers around the attention, the OpenCLIP-H text encoder without
    its last layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            **LEVELS,
            cross_attention_dim=48,
            attention_head_dim=(2, 4, 8, 8),
            use_linear_projection=True,
        )
        scheduler = DDIMScheduler(
            **SCHEDULE, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction
        )
        return _pipeline(unet, _text(CLIPTextModel, 48, 3, "gelu"), scheduler, "!")


def tiny_sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """SDXL: three levels of 0, 2 and 3 transformer layers, two text encoders, size and pooled text
    as an added embedding."""
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
        texts = (
            _text(CLIPTextModel, 32, 2, "quick_gelu"),
            _text(CLIPTextModelWithProjection, 48, 3, "gelu", projection=40),
        )
        pipeline = StableDiffusionXLPipeline(
            small_vae(0.13025), *texts, _tokenizer(), _tokenizer("!"), unet,
            EulerDiscreteScheduler(**SCHEDULE),
            add_watermarker=False,
        )  # fmt: skip
        return stirred(pipeline)


def tiny_sd3(seed: int = 0, t5: bool = True, projection: int = 40) -> StableDiffusion3Pipeline:
    """SD 3.5: joint attention over image and text, with the second attention of its medium size,
    two CLIPs and a T5; flow matching. The first CLIP, 16 wide, projects to `projection`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=16, num_layers=3, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=64,
            caption_projection_dim=32, pooled_projection_dim=projection + 24, out_channels=16,
            pos_embed_max_size=12, dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )  # fmt: skip
        texts = [
            _text(CLIPTextModelWithProjection, 16, 2, "quick_gelu", projection),
            _text(CLIPTextModelWithProjection, 32, 3, "gelu", 24),
        ]
        third = _t5() if t5 else None
        vae = small_vae(
            1.5305,
            latent_channels=16,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        tokenizers = _tokenizer(), _tokenizer("!"), _t5_tokenizer() if t5 else None
        return stirred(
            StableDiffusion3Pipeline(
                transformer,
                scheduler,
                vae,
                texts[0],
                tokenizers[0],
                texts[1],
                tokenizers[1],
                third,
                tokenizers[2],
            )
        )


def tiny_flux(seed: int = 0, guidance: bool = True) -> FluxPipeline:
    """FLUX.1 dev: two blocks of two streams and two of one, rotary positions, a CLIP whose pooled
    state alone is used, a T5, the guidance embedded, a shift by the image's size. Without guidance:
    schnell."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=64, pooled_projection_dim=32,
            guidance_embeds=guidance, axes_dims_rope=(2, 2, 4),
        )  # fmt: skip
        clip = _text(CLIPTextModel, 32, 2, "quick_gelu")
        vae = flux_vae()
        shift = {"shift": 3.0, "use_dynamic_shifting": True} if guidance else {"shift": 1.0}
        scheduler = FlowMatchEulerDiscreteScheduler(**shift)
        pipeline = FluxPipeline(
            scheduler, vae, clip, _tokenizer(), _t5(), _t5_tokenizer(), transformer
        )
        # its side in latents, for calls that name none; 128 is written into the class
        pipeline.default_sample_size = 8
        return stirred(pipeline)


def _t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=64, d_model=64, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    )


def _t5_tokenizer() -> T5Tokenizer:
    letters = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"),
    ]
    # words of one token, as the real one has them
    letters += [
        ("▁a", -1.0),
        ("▁red", -1.0),
        ("▁blue", -1.0),
    ]
    return T5Tokenizer(vocab=letters, extra_ids=0, model_max_length=77)


def _pipeline(
    unet: nn.Module, text: nn.Module, scheduler: object, pad: str = "<|endoftext|>"
) -> StableDiffusionPipeline:
    parts = (small_vae(0.18215), text, _tokenizer(pad), unet, scheduler)
    return stirred(
        StableDiffusionPipeline(
            *parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    )


def _tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(TOKENIZER, pad_token=pad)


def _text(kind: type, width: int, layers: int, act: str, projection: int = 512) -> nn.Module:
    """Begin, end and padding ids 0, 2 and 1, as in the real configurations, where they are not the
    tokenizer's either."""
    return kind(
        CLIPTextConfig(
            vocab_size=723, hidden_size=width, intermediate_size=2 * width,
            num_hidden_layers=layers, num_attention_heads=4,
            max_position_embeddings=32, hidden_act=act, projection_dim=projection, bos_token_id=0,
            eos_token_id=2, pad_token_id=1,
        )
    )  # fmt: skip


def small_vae(scaling_factor: float, latent_channels: int = 4, **further: float) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 8, 16, 16),
        layers_per_block=2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=scaling_factor,
        **further,
    )


def flux_vae() -> AutoencoderKL:
    """That of FLUX.1, which Z-Image has too."""
    return small_vae(
        0.3611,
        latent_channels=16,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def stirred(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """No two tensors alike (fresh norms are all ones, fresh biases zero), so that no exchanged pair
    goes unseen."""
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
            for weight in part.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.02)
    return pipeline


FAMILIES = {
    "sd1": tiny_sd1,
    "sd2": tiny_sd2,
    "sd2-v": lambda seed=0: tiny_sd2(seed, "v_prediction"),
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "sd3-without-t5": lambda seed=0: tiny_sd3(seed, t5=False),
    "flux": tiny_flux,
    "flux-schnell": lambda seed=0: tiny_flux(seed, guidance=False),
}
