"""Flow transformers whose text encoder is a language model, in miniature: the layers of the real
ones, narrow, with random weights."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from tests.families import flux_vae, stirred

WORDS = (
    "a Ġa red Ġred blue Ġblue heart Ġheart mushroom Ġmushroom moon Ġmoon house Ġhouse user "
    "assistant think"
).split()
"""one token each, as the real tokenizer has them"""
INSTRUCTION = (
    "system Describe Ġthe Ġimage Ġby Ġdetailing Ġcolor Ġshape Ġsize Ġtexture Ġquantity Ġtext "
    "Ġspatial Ġrelationships Ġof Ġobjects Ġand Ġbackground user"
).split()
"""the words of Qwen-Image's, one token each too: 34 with signs and line ends"""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""what Qwen3's says of one message, written anew"""
WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def chat_tokenizer(words: tuple[str, ...] | list[str] = WORDS) -> Qwen2Tokenizer:
    """Bytes and some words, in Qwen's manner, with a chat template."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    merges = []
    for word in sorted(words, key=lambda word: not word.startswith("Ġ")):  # their pairs first
        for end in range(1, len(word)):
            if word[: end + 1] not in vocabulary:
                vocabulary[word[: end + 1]] = len(vocabulary)
                merges.append((word[:end], word[end]))
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_z_image(seed: int = 0, by_size: bool = False) -> ZImagePipeline:
    """Z-Image: one layer each that refines the image and the text, two of one stream, a Qwen3 of
    three layers of which the last is not read, FLUX.1's VAE; a shift of 3, as Turbo's. `by_size`:
    one that follows the image's size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = chat_tokenizer()
        transformer = ZImageTransformer2DModel(
            in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=4, n_kv_heads=4,
            cap_feat_dim=32, axes_dims=[2, 2, 4], axes_lens=[1024, 32, 32],
        )  # fmt: skip
        encoder = Qwen3Model(
            Qwen3Config(vocab_size=len(tokenizer) + 7, head_dim=8, **WIDTH, **HEADS)
        )
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=by_size)
        return stirred(ZImagePipeline(scheduler, flux_vae(), encoder, tokenizer, transformer))


def tiny_klein(seed: int = 0, distilled: bool = False) -> Flux2KleinPipeline:
    """FLUX.2 klein: a block of two streams and two of one, positions of four axes, a Qwen3 of 28
    layers (the 9th, 18th and 27th are read), a VAE with running statistics; a shift by the image's
    size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = chat_tokenizer()
        transformer = Flux2Transformer2DModel(
            in_channels=32, num_layers=1, num_single_layers=2, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=3 * 16, timestep_guidance_channels=32,
            axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
        )  # fmt: skip
        encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer) + 7, head_dim=8, hidden_size=16, intermediate_size=32,
                num_hidden_layers=28, num_attention_heads=2, num_key_value_heads=1,
                tie_word_embeddings=True,
            )
        )  # fmt: skip
        vae = AutoencoderKLFlux2(
            block_out_channels=(4, 8, 16, 16), latent_channels=8, norm_num_groups=4, sample_size=64
        )
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        parts = scheduler, vae, encoder, tokenizer, transformer
        return stirred(Flux2KleinPipeline(*parts, is_distilled=distilled))


def tiny_qwen_image(seed: int = 0) -> QwenImagePipeline:
    """Qwen-Image: two blocks of two streams, a Qwen2.5-VL of two layers (and of two that see), a
    video VAE; a shift by the image's size, stretched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = chat_tokenizer(INSTRUCTION + WORDS)
        transformer = QwenImageTransformer2DModel(
            in_channels=64, out_channels=16, num_layers=2, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=32, axes_dims_rope=(2, 2, 4),
        )  # fmt: skip
        text = {"vocab_size": len(tokenizer) + 7, "max_position_embeddings": 2048, **HEADS}
        text |= WIDTH | {
            "num_hidden_layers": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [1, 1, 2],
            },
        }
        sight = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
        encoder = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=sight | {"out_hidden_size": 32})
        )
        vae = AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 2, 2], num_res_blocks=1)
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        )
        pipeline = QwenImagePipeline(scheduler, vae, encoder, tokenizer, transformer)
        # its side in latents, for calls that name none; 128 is written into the class
        pipeline.default_sample_size = 8
        return stirred(pipeline)


FLOWS = {
    "z-image": tiny_z_image,
    "klein": tiny_klein,
    "klein-distilled": lambda seed=0: tiny_klein(seed, distilled=True),
    "qwen-image": tiny_qwen_image,
}
