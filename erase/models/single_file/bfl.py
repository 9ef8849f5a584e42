"""Black Forest Labs' layouts of FLUX.1 and FLUX.2: which key of a transformer's file holds which of
diffusers' weights.

The names are those of black-forest-labs/flux and flux2 (`model.py`, `modules/layers.py`), which
ComfyUI reads from `diffusion_models/`: bare, or behind `model.diffusion_model.`. Queries, keys and
values are one matrix there, in blocks of one stream together with the feed-forward half's first (as
in diffusers' FLUX.2 too); and the last modulation gives the shift before the scale, diffusers'
after it.
"""

from __future__ import annotations

from erase.models.single_file import blocks
from erase.models.single_file.blocks import ADDED, Block, Names, stacked
from erase.models.single_file.ldm import BEFORE, Entry, Network
from erase.models.single_file.tensor_file import TensorFile

DOUBLE = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
}
DOUBLE_STACKS = {"img_attn.qkv": stacked("attn"), "txt_attn.qkv": stacked("attn", ADDED)}
SINGLE = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
ENDS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
FLUX = Names(
    "FLUX.1",
    ENDS
    | {
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    },
    {
        "transformer_blocks": Block(
            "double_blocks",
            DOUBLE
            | {
                "norm1.linear": "img_mod.lin",
                "norm1_context.linear": "txt_mod.lin",
                "ff.net.0.proj": "img_mlp.0",
                "ff.net.2": "img_mlp.2",
                "ff_context.net.0.proj": "txt_mlp.0",
                "ff_context.net.2": "txt_mlp.2",
            },
            DOUBLE_STACKS,
        ),
        "single_transformer_blocks": Block(
            "single_blocks",
            SINGLE | {"norm.linear": "modulation.lin", "proj_out": "linear2"},
            {"linear1": (*stacked("attn"), "proj_mlp")},
        ),
    },
    norm="scale",
)
FLUX2 = Names(
    "FLUX.2",
    ENDS
    | {
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
    },
    {
        "transformer_blocks": Block(
            "double_blocks",
            DOUBLE
            | {
                "ff.linear_in": "img_mlp.0",
                "ff.linear_out": "img_mlp.2",
                "ff_context.linear_in": "txt_mlp.0",
                "ff_context.linear_out": "txt_mlp.2",
            },
            DOUBLE_STACKS,
        ),
        "single_transformer_blocks": Block(
            "single_blocks",
            SINGLE | {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"},
        ),
    },
    norm="scale",
)
FIRST = "double_blocks.0.img_attn.qkv.weight"
"""a key by which the layouts are known"""
SHARED = "double_stream_modulation_img.lin.weight"
"""a key by which FLUX.2 is told from FLUX.1: one modulation for all blocks"""
DEV2 = ((r"(^|\.)guidance_in\.", "FLUX.2 dev, which takes the guidance scale as an input"),)


def _has(file: TensorFile, key: str) -> bool:
    return any(prefix + key in file.shapes for prefix in BEFORE)


def is_flux(file: TensorFile) -> bool:
    """Whether a file holds a transformer in FLUX.1's layout."""
    return _has(file, FIRST) and not _has(file, SHARED)


def is_flux2(file: TensorFile) -> bool:
    """Whether a file holds a transformer in FLUX.2's layout."""
    return _has(file, FIRST) and _has(file, SHARED)


def flux(transformer: Network) -> list[Entry]:
    """Every weight of a `FluxTransformer2DModel` exactly once; errors as `blocks.table`."""
    return blocks.table(transformer, FLUX)


def flux2(transformer: Network) -> list[Entry]:
    """Every weight of a `Flux2Transformer2DModel` exactly once; errors as `blocks.table`."""
    return blocks.table(transformer, FLUX2)
