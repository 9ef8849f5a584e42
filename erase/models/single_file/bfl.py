"""Black Forest Labs' layout of FLUX.1: which key of a transformer's file holds which of diffusers'
weights.

The names are those of black-forest-labs/flux (`model.py`, `modules/layers.py`), which ComfyUI reads
from `diffusion_models/`: bare, or behind `model.diffusion_model.`. Queries, keys and values are one
matrix there, in blocks of one stream together with the feed-forward half's first; and the last
modulation gives the shift before the scale, diffusers' after it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from erase.models.single_file.ldm import UNET, Entry, Form, Network
from erase.models.single_file.tensor_file import TensorFile
from erase.prompts.errors import ErasureError

ENDS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}
BLOCKS: dict[str, tuple[str, dict[str, str]]] = {
    "transformer_blocks": ("double_blocks", DOUBLE),
    "single_transformer_blocks": ("single_blocks", SINGLE),
}
STACKS: dict[str, dict[str, tuple[str, ...]]] = {
    "transformer_blocks": {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    },
    "single_transformer_blocks": {
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    },
}
"""kind of block -> layer of the file -> the layers whose rows it holds, in order"""
FIRST = "double_blocks.0.img_attn.qkv.weight"
"""a key by which the layout is known"""


def is_flux(file: TensorFile) -> bool:
    """Whether a file holds a transformer in this layout."""
    return FIRST in file.shapes or UNET + FIRST in file.shapes


def table(transformer: Network) -> list[Entry]:
    """Every weight of a `FluxTransformer2DModel` exactly once.

    Raises:
        ErasureError: a weight for which the layout has no key.
    """
    shapes = {name: tuple(weight.shape) for name, weight in transformer.state_dict().items()}
    entries: dict[str, Entry] = {}
    for name in shapes:
        entry = _entry(name, shapes)
        entries.setdefault(entry.key, entry)
    return list(entries.values())


def _entry(name: str, shapes: Mapping[str, tuple[int, ...]]) -> Entry:
    """The tensor of the file that holds a weight."""
    layer, _, leaf = name.rpartition(".")
    found = re.fullmatch(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\.(.+)", layer)
    if found is None:
        form: Form = "swapped" if layer == "norm_out.linear" else "same"
        return Entry(f"{_known(ENDS, layer, name)}.{leaf}", (f"transformer.{name}",), form)

    kind, number, inner = found.groups()
    place, places = BLOCKS[kind]
    for stack, members in STACKS[kind].items():
        if inner in members:
            names = [f"{kind}.{number}.{member}.{leaf}" for member in members]
            rows = tuple(shapes[one][0] for one in names)
            whole = tuple(f"transformer.{one}" for one in names)
            return Entry(f"{place}.{number}.{stack}.{leaf}", whole, "stacked", rows)
    leaf = "scale" if ".norm_" in f".{inner}" else leaf
    return Entry(f"{place}.{number}.{_known(places, inner, name)}.{leaf}", (f"transformer.{name}",))


def _known(places: Mapping[str, str], layer: str, name: str) -> str:
    if layer not in places:
        raise ErasureError(
            f"the layout of FLUX.1 has no key for transformer.{name}; export a diffusers folder "
            "instead"
        )
    return places[layer]
