"""The layout that ComfyUI reads Qwen-Image's transformer in (`diffusion_models/`): diffusers' own
names, bare or behind `model.diffusion_model.`.

The first editing models (2507 and 2509) have the same keys and shapes: nothing in a file tells
them.
"""

from __future__ import annotations

from erase.models.single_file.ldm import Entry, Network, bare
from erase.models.single_file.tensor_file import TensorFile

FIRST = ("txt_norm.weight", "transformer_blocks.0.img_mod.1.weight")
"""keys by which the layout is known"""
SIBLINGS = (
    (r"(^|\.)__index_timestep_zero__$", "an editing model (Qwen-Image-Edit 2511)"),
    (r"(^|\.)addition_t_embedding\.", "a model that takes images apart (Qwen-Image-Layered)"),
)


def is_qwen_image(file: TensorFile) -> bool:
    """Whether a file holds a transformer in this layout."""
    return set(map(bare, file.shapes)).issuperset(FIRST)


def table(transformer: Network) -> list[Entry]:
    """Every weight of a `QwenImageTransformer2DModel` exactly once."""
    return [Entry(name, (f"transformer.{name}",)) for name in transformer.state_dict()]
