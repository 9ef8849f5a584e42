"""The names that kohya's sd-scripts gives to the layers of a LoRA, and the header by which its
readers know the base.

ComfyUI, A1111, Forge, sd-scripts, stable-diffusion.cpp and diffusers read them. SDXL's UNet goes by
the names of its original, since sd-scripts trains that one; the UNets of Stable Diffusion 1 and 2
go by those of diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from erase.models.pipelines import Pipeline
from erase.models.single_file import ldm
from erase.models.single_file.spec import ORIGINAL, family_name, model_spec, prediction

TEXTS = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
"""family -> ss_base_model_version"""
OUTSIDE = re.compile(r"unet\.(conv_in|conv_out|(time|add)_embedding\.linear_[12])")
"""layers outside of the blocks, which sd-scripts and stable-diffusion.cpp pass over"""


def kohya_names(pipeline: Pipeline, layers: Iterable[str]) -> dict[str, str]:
    """`component.module` -> its name; empty for a family that has no UNet."""
    family = family_name(pipeline)
    if family not in VERSIONS:
        return {}
    return {layer: _name(pipeline, family, *layer.split(".", 1)) for layer in layers}


def _name(pipeline: Pipeline, family: str, component: str, module: str) -> str:
    if component == "unet":
        place = ldm.unet_module(pipeline.unet.config, module) if family == "sdxl" else module
        return "lora_unet_" + place.replace(".", "_")
    prefix = TEXTS[component] if family == "sdxl" else "lora_te"
    # which transformers 5 leaves out
    return f"{prefix}_text_model_{module.removeprefix('text_model.')}".replace(".", "_")


def lora_header(pipeline: Pipeline, title: str, ranks: Iterable[int]) -> dict[str, str]:
    """ModelSpec's keys and the six that sd-scripts calls the least. A1111 takes a LoRA without them
    for one of Stable Diffusion 1."""
    family, ranks = family_name(pipeline), set(ranks)
    header = model_spec(pipeline, title, ORIGINAL if family == "sdxl" else "diffusers", "lora")
    if family not in VERSIONS:
        return header
    velocity = family != "sdxl" and prediction(pipeline.scheduler.config) == "v_prediction"
    header |= {
        "ss_base_model_version": VERSIONS[family] + ("_v" if velocity else ""),
        "ss_v2": str(family == "sd2"),
    }
    header |= {"ss_network_module": "networks.lora", "ss_network_args": "{}"}
    return header | {
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": "1.0",
    }
