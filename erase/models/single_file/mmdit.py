"""Stability's layout of Stable Diffusion 3 and 3.5: which key of a file holds which of diffusers'
weights.

The names are those of Stability-AI/sd3.5 (`mmditx.py`, `sd3_infer.py`): the transformer's behind
`model.diffusion_model.`, the VAE's as in the LDM layout, and in the files that have them, the text
encoders'. Queries, keys and values are one matrix there, for each of the two
streams and for medium's second attention; and the modulations of two parts, the last block's for
the text and the last of all, give the shift before the scale, diffusers' after it.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from erase.models.single_file import blocks
from erase.models.single_file.blocks import ADDED, Block, Names, stacked
from erase.models.single_file.ldm import BEFORE, Entry, Network
from erase.models.single_file.tensor_file import TensorFile
from erase.prompts.errors import ErasureError

NAMES = Names(
    "Stable Diffusion 3",
    {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "context_embedder": "context_embedder",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    },
    {
        "transformer_blocks": Block(
            "joint_blocks",
            {
                "norm1.linear": "x_block.adaLN_modulation.1",
                "norm1_context.linear": "context_block.adaLN_modulation.1",
                "attn.norm_q": "x_block.attn.ln_q",
                "attn.norm_k": "x_block.attn.ln_k",
                "attn.norm_added_q": "context_block.attn.ln_q",
                "attn.norm_added_k": "context_block.attn.ln_k",
                "attn.to_out.0": "x_block.attn.proj",
                "attn.to_add_out": "context_block.attn.proj",
                "attn2.norm_q": "x_block.attn2.ln_q",
                "attn2.norm_k": "x_block.attn2.ln_k",
                "attn2.to_out.0": "x_block.attn2.proj",
                "ff.net.0.proj": "x_block.mlp.fc1",
                "ff.net.2": "x_block.mlp.fc2",
                "ff_context.net.0.proj": "context_block.mlp.fc1",
                "ff_context.net.2": "context_block.mlp.fc2",
            },
            {
                "x_block.attn.qkv": stacked("attn"),
                "x_block.attn2.qkv": stacked("attn2"),
                "context_block.attn.qkv": stacked("attn", ADDED),
            },
        )
    },
)
FIRST = "joint_blocks.0.context_block.attn.qkv.weight"
"""a key by which the layout is known"""


def is_sd3(file: TensorFile) -> bool:
    """Whether a file holds a transformer in this layout."""
    return any(prefix + FIRST in file.shapes for prefix in BEFORE)


def table(transformer: Network) -> list[Entry]:
    """Every tensor of an `SD3Transformer2DModel` exactly once; errors as `blocks.table`."""
    last = len(transformer.transformer_blocks) - 1
    swapped = ("norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear")
    return blocks.table(transformer, NAMES, swapped)


# ---- what files hold beside the transformer ----

CLIP_L, CLIP_G, T5 = (
    f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl")
)
"""before the names that transformers has for a text encoder's weights"""
PROJECTION = "text_projection.weight"
SPARE = (
    r"text_encoders\.(clip_l|clip_g|t5xxl)\.(.*\.)?(logit_scale|position_ids)"
    rf"|{re.escape(CLIP_L + PROJECTION)}|{re.escape(T5)}encoder\.embed_tokens\.weight"
)
"""keys that no program uses: temperatures, position ids, the projection of the first CLIP, whose
pooled state is taken without, and the second name of T5's embeddings"""


def clip_l(encoder: Network) -> list[Entry]:
    """Every weight of SD 3's first CLIP but its projection; see `projection`."""
    return [
        entry for entry in _clip("text_encoder", encoder, CLIP_L) if PROJECTION not in entry.key
    ]


def clip_g(encoder: Network) -> list[Entry]:
    """Every weight of SD 3's second CLIP."""
    return _clip("text_encoder_2", encoder, CLIP_G)


def _clip(component: str, encoder: Network, prefix: str) -> list[Entry]:
    entries = []
    for name in encoder.state_dict():
        bare = name.removeprefix("text_model.")
        key = bare if bare == PROJECTION else f"text_model.{bare}"
        entries.append(Entry(prefix + key, (f"{component}.{name}",)))
    return entries


def projection(encoder: Network) -> dict[str, Tensor]:
    """The projection of the first CLIP: none, which diffusers writes as the identity.

    Raises:
        ErasureError: the encoder's configuration has one of another width.
    """
    width, given = encoder.config.hidden_size, encoder.config.projection_dim
    if given != width:
        raise ErasureError(
            f"the pooled state of Stable Diffusion 3's first CLIP is not projected, and the "
            f"configuration of text_encoder projects {width} values to {given}; give the folder of "
            "the same model (load.config), or leave the file's CLIP out (load.ignore "
            "text_encoders.clip_l)"
        )
    return {PROJECTION: torch.eye(width)}


def t5(encoder: Network) -> list[Entry]:
    """Every weight of SD 3's T5; its embeddings have two names in the encoder."""
    entries = []
    for name in encoder.state_dict():
        key = "shared.weight" if name == "encoder.embed_tokens.weight" else name
        entries.append(Entry(T5 + key, (f"text_encoder_3.{name}",)))
    return entries
