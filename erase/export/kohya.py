"""The names that kohya's sd-scripts gives to the layers of a LoRA, and the header by which its
readers know the base.

ComfyUI, A1111, Forge, sd-scripts, stable-diffusion.cpp and diffusers read them. SDXL's UNet and
FLUX.1's transformer go by the names of their originals, since sd-scripts trains those; the UNets of
Stable Diffusion 1 and 2 go by those of diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from erase.models.pipelines import Pipeline
from erase.models.single_file import bfl, ldm
from erase.models.single_file.ldm import Entry
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


def kohya_entries(pipeline: Pipeline, layers: Iterable[str]) -> tuple[Entry, ...]:
    """What a file under these names holds of the layers (`component.module`): a name each, or one
    of several that are stacked; empty for a family that has no such names."""
    family, layers = family_name(pipeline), list(layers)
    if family not in VERSIONS:
        return ()
    stacked = _of_transformer(pipeline) if VERSIONS[family] == "flux1" else []
    stacked = [entry for entry in stacked if not set(entry.names).isdisjoint(layers)]
    placed = {layer for entry in stacked for layer in entry.names}
    alone = [layer for layer in layers if layer not in placed]
    single = [Entry(_name(pipeline, family, *layer.split(".", 1)), (layer,)) for layer in alone]
    return (*stacked, *single)


def _of_transformer(pipeline: Pipeline) -> list[Entry]:
    """A FLUX.1's layers as they lie in its published file."""
    end, entries = ".weight", []
    for entry in bfl.flux(pipeline.transformer):
        if entry.key.endswith(end):
            key = "lora_unet_" + entry.key.removesuffix(end).replace(".", "_")
            layers = tuple(name.removesuffix(end) for name in entry.names)
            entries.append(replace(entry, key=key, names=layers))
    return entries


def _name(pipeline: Pipeline, family: str, component: str, module: str) -> str:
    if component == "unet":
        place = ldm.unet_module(pipeline.unet.config, module) if family == "sdxl" else module
        return "lora_unet_" + place.replace(".", "_")
    prefix = "lora_te" if family in ("sd1", "sd2") else TEXTS[component]
    # which transformers 5 leaves out
    return f"{prefix}_text_model_{module.removeprefix('text_model.')}".replace(".", "_")


def kohya_tensors(
    entries: Iterable[Entry],
    down: Mapping[str, Tensor],
    up: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The tensors of a file, with the one alpha of 1 in all layers.

    Its readers scale a layer by alpha / rank. diffusers 0.42 confuses alphas that differ between
    layers, so the ranks go into the up factors instead.
    """
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        below = torch.cat([down[layer] for layer in entry.names if layer in down])
        above = entry.pack(_raised(entry, up, len(below)))
        tensors[f"{entry.key}.alpha"] = torch.ones((), dtype=dtype)
        tensors[f"{entry.key}.lora_down.weight"] = below.to(dtype)
        tensors[f"{entry.key}.lora_up.weight"] = (above * len(below)).to(dtype)
    return tensors


def _raised(entry: Entry, up: Mapping[str, Tensor], ranks: int) -> list[Tensor]:
    """The up factors of an entry's layers; of several, each with the ranks of all, of which it
    takes its own."""
    if len(entry.names) == 1:
        return [up[entry.names[0]]]
    factors, first = [], 0
    for layer, rows in zip(entry.names, entry.rows, strict=True):
        factor = torch.zeros(rows, ranks)
        if layer in up:
            own = up[layer].shape[1]
            factor[:, first : first + own] = up[layer]
            first += own
        factors.append(factor)
    return factors


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
