"""The names that kohya's sd-scripts gives to the layers of a LoRA, and the header by which its
readers know the base.

ComfyUI, A1111, Forge, sd-scripts, stable-diffusion.cpp and diffusers read them. SDXL's UNet and
FLUX.1's transformer go by the names of their originals, since sd-scripts trains those; the UNets of
Stable Diffusion 1 and 2 go by those of diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from erase.models.pipelines import Pipeline
from erase.models.single_file import bfl, ldm
from erase.models.single_file.spec import ORIGINAL, family_name, model_spec, prediction

TEXTS = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
VERSIONS = {
    "sd1": "sd_v1",
    "sd2": "sd_v2",
    "sdxl": "sdxl_base_v1-0",
    "flux-dev": "flux1",
    "flux-schnell": "flux1",
}
"""family -> ss_base_model_version"""
MODULES = {"flux1": "networks.lora_flux"}
"""version -> ss_network_module, where it is not networks.lora"""
OUTSIDE = re.compile(r"unet\.(conv_in|conv_out|(time|add)_embedding\.linear_[12])")
"""layers outside of the blocks, which sd-scripts and stable-diffusion.cpp pass over"""


@dataclass(frozen=True)
class Place:
    """Where the factors of a layer stand."""

    name: str
    """of the layer in the file"""
    first: int = 0
    """row of that layer's matrix with which this one begins, where several are stacked in it"""
    rows: int | None = None
    """of that matrix; None: the layer is alone in it"""
    swapped: bool = False
    """whether its two halves stand in the other order"""


def kohya_names(pipeline: Pipeline, layers: Iterable[str]) -> dict[str, Place]:
    """`component.module` -> its place; empty for a family that has no such names."""
    family = family_name(pipeline)
    if family not in VERSIONS:
        return {}
    stacked = _of_transformer(pipeline) if VERSIONS[family] == "flux1" else {}
    return {
        layer: stacked.get(layer) or Place(_name(pipeline, family, *layer.split(".", 1)))
        for layer in layers
    }


def _of_transformer(pipeline: Pipeline) -> dict[str, Place]:
    """The places of a FLUX.1's layers: those of the weights in its published file."""
    places = {}
    for entry in bfl.flux(pipeline.transformer):
        name, first = "lora_unet_" + entry.key.rpartition(".")[0].replace(".", "_"), 0
        rows = entry.rows or (None,) * len(entry.names)
        for part, count in zip(entry.names, rows, strict=True):
            layer, _, leaf = part.rpartition(".")
            if leaf == "weight":
                total = sum(entry.rows) if entry.rows else None
                places[layer] = Place(name, first, total, entry.form == "swapped")
            first += count or 0
    return places


def _name(pipeline: Pipeline, family: str, component: str, module: str) -> str:
    if component == "unet":
        place = ldm.unet_module(pipeline.unet.config, module) if family == "sdxl" else module
        return "lora_unet_" + place.replace(".", "_")
    prefix = "lora_te" if family in ("sd1", "sd2") else TEXTS[component]
    # which transformers 5 leaves out
    return f"{prefix}_text_model_{module.removeprefix('text_model.')}".replace(".", "_")


def kohya_tensors(
    down: Mapping[str, Tensor],
    up: Mapping[str, Tensor],
    places: Mapping[str, Place],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The tensors of a file, with the one alpha of 1 in all layers.

    Its readers scale a layer by alpha / rank. diffusers 0.42 confuses alphas that differ between
    layers, so the ranks go into the up factors instead.
    """
    members: dict[str, list[str]] = {}
    for layer in down:
        members.setdefault(places[layer].name, []).append(layer)
    tensors: dict[str, Tensor] = {}
    for name, layers in members.items():
        below, above = _stacked(down, up, [(layer, places[layer]) for layer in layers])
        tensors[f"{name}.alpha"] = torch.ones((), dtype=dtype)
        tensors[f"{name}.lora_down.weight"] = below.to(dtype)
        tensors[f"{name}.lora_up.weight"] = (above * len(below)).to(dtype)
    return tensors


def _stacked(
    down: Mapping[str, Tensor], up: Mapping[str, Tensor], members: list[tuple[str, Place]]
) -> tuple[Tensor, Tensor]:
    """The factors of one matrix of the file, which holds the matrices of these layers, one under
    the other: theirs, each in its own rows and ranks."""
    layer, place = members[0]
    if place.rows is None:
        halves = up[layer].chunk(2)[::-1] if place.swapped else (up[layer],)
        return down[layer], torch.cat(halves)
    below = torch.cat([down[layer] for layer, _ in members])
    above, rank = below.new_zeros(place.rows, len(below)), 0
    for layer, place in members:
        rows, ranks = up[layer].shape
        above[place.first : place.first + rows, rank : rank + ranks] = up[layer]
        rank += ranks
    return below, above


def lora_header(pipeline: Pipeline, title: str, ranks: Iterable[int]) -> dict[str, str]:
    """ModelSpec's keys and the six that sd-scripts calls the least. A1111 takes a LoRA without them
    for one of Stable Diffusion 1."""
    family, ranks = family_name(pipeline), set(ranks)
    header = model_spec(pipeline, title, ORIGINAL if family == "sdxl" else "diffusers", "lora")
    if family not in VERSIONS:
        return header
    version, one_or_two = VERSIONS[family], family in ("sd1", "sd2")
    velocity = one_or_two and prediction(pipeline.scheduler.config) == "v_prediction"
    header |= {
        "ss_base_model_version": version + ("_v" if velocity else ""),
        "ss_v2": str(family == "sd2"),
    }
    module = MODULES.get(version, "networks.lora")
    header |= {"ss_network_module": module, "ss_network_args": "{}"}
    return header | {
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": "1.0",
    }
