"""The layout that ComfyUI reads Z-Image's transformer in (`diffusion_models/`): which key holds
which of diffusers' weights.

The names are those of Tongyi-MAI's own implementation, as its model in diffusers keeps them, but
for the attention, whose queries, keys and values are one matrix, and for the two ends, which stand
without their patch size.
"""

from __future__ import annotations

from erase.models.single_file.ldm import Entry, Network, bare
from erase.models.single_file.tensor_file import TensorFile
from erase.prompts.errors import ErasureError

ENDS = {"all_x_embedder.2-1.": "x_embedder.", "all_final_layer.2-1.": "final_layer."}
ATTENTION = {"to_out.0": "out", "norm_q": "q_norm", "norm_k": "k_norm"}
STACKED = ("to_q", "to_k", "to_v")
FIRST = ("cap_pad_token", "layers.0.attention.qkv.weight")
"""keys by which the layout is known; Lumina's has the second alone"""
SPARE = r"norm_final\.weight"
"""the key of published files that no program uses"""


def is_z_image(file: TensorFile) -> bool:
    """Whether a file holds a transformer in this layout."""
    return set(map(bare, file.shapes)).issuperset(FIRST)


def table(transformer: Network) -> list[Entry]:
    """Every weight of a `ZImageTransformer2DModel` exactly once.

    Raises:
        ErasureError: a weight for which the layout has no key.
    """
    entries: dict[str, Entry] = {}
    for name in transformer.state_dict():
        entry = _entry(name)
        entries.setdefault(entry.key, entry)
    return list(entries.values())


def _entry(name: str) -> Entry:
    """The tensor of the file that holds a weight."""
    for end, key in ENDS.items():
        if name.startswith(end):
            return Entry(key + name.removeprefix(end), (f"transformer.{name}",))
    block, attention, inner = name.partition(".attention.")
    layer, _, leaf = inner.rpartition(".")
    if layer in STACKED:
        names = tuple(f"transformer.{block}.attention.{one}.{leaf}" for one in STACKED)
        return Entry(f"{block}.attention.qkv.{leaf}", names, "stacked")
    if attention:
        return Entry(f"{block}.attention.{ATTENTION[layer]}.{leaf}", (f"transformer.{name}",))
    if name.startswith(("all_", "siglip_")):
        raise ErasureError(
            f"the layout of Z-Image has no key for transformer.{name}; export a diffusers folder "
            "instead"
        )
    return Entry(name, (f"transformer.{name}",))
