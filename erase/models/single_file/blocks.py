"""Layouts of transformers that name layers and stack queries, keys and values differently from
diffusers: which key of a file holds which weight, from what the layers are called."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from erase.models.single_file.ldm import Entry, Form, Network
from erase.prompts.errors import ErasureError

QUERY_KEY_VALUE = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


def stacked(attention: str, layers: tuple[str, ...] = QUERY_KEY_VALUE) -> tuple[str, ...]:
    """The layers of an attention whose rows a file has in one matrix, in order."""
    return tuple(f"{attention}.{layer}" for layer in layers)


@dataclass(frozen=True)
class Block:
    """A kind of block in a file."""

    place: str
    """before its number"""
    layers: Mapping[str, str]
    """layer of diffusers -> its name in the file"""
    stacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """layer of the file -> the layers of diffusers whose rows it holds, in order"""


@dataclass(frozen=True)
class Names:
    """What the layers of a transformer are called in its files."""

    family: str
    """for people"""
    ends: Mapping[str, str]
    """layer outside blocks, or whole name of a tensor -> its name in the file"""
    blocks: Mapping[str, Block]
    """list of blocks in diffusers -> what it is in the file"""
    norm: str = "weight"
    """the last word of a norm's weight in the file"""


def table(
    transformer: Network, names: Names, swapped: Collection[str] = ("norm_out.linear",)
) -> list[Entry]:
    """Every tensor of a transformer exactly once.

    Args:
        transformer: of diffusers.
        names: those of the layout.
        swapped: the layers whose two halves (shift and scale) the file has in the other order.

    Raises:
        ErasureError: a weight for which the layout has no key.
    """
    shapes = {name: tuple(weight.shape) for name, weight in transformer.state_dict().items()}
    entries: dict[str, Entry] = {}
    for name in shapes:
        form: Form = "swapped" if name.rpartition(".")[0] in swapped else "same"
        entry = _entry(name, shapes, names, form)
        entries.setdefault(entry.key, entry)
    return list(entries.values())


def _entry(name: str, shapes: Mapping[str, tuple[int, ...]], names: Names, form: Form) -> Entry:
    """The tensor of the file that holds a weight."""
    whole = (f"transformer.{name}",)
    layer, _, leaf = name.rpartition(".")
    kind, *rest = layer.split(".", 2)
    if name in names.ends:
        return Entry(names.ends[name], whole, form)
    if kind not in names.blocks or len(rest) < 2:
        return Entry(f"{_known(names.ends, layer, name, names)}.{leaf}", whole, form)

    block, (number, inner) = names.blocks[kind], rest
    for stack, members in block.stacks.items():
        if inner in members:
            parts = [f"{kind}.{number}.{member}.{leaf}" for member in members]
            rows = tuple(shapes[part][0] for part in parts)
            several = tuple(f"transformer.{part}" for part in parts)
            return Entry(f"{block.place}.{number}.{stack}.{leaf}", several, "stacked", rows)
    place = _known(block.layers, inner, name, names)
    leaf = names.norm if re.search(r"\.norm_(added_)?[qk]$", inner) else leaf
    return Entry(f"{block.place}.{number}.{place}.{leaf}", whole, form)


def _known(places: Mapping[str, str], layer: str, name: str, names: Names) -> str:
    if layer not in places:
        raise ErasureError(
            f"the layout of {names.family} has no key for transformer.{name}; export a diffusers "
            "folder instead"
        )
    return places[layer]
