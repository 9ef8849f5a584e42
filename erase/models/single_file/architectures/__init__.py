"""The stock architectures: configurations, schedules and tokenizers, so that a single file needs no
network.

One JSON file each, with what differs from the defaults of the classes; the facts are those of the
configurations on the hub: stable-diffusion-v1-5, stable-diffusion-2-1-base (`sd2-epsilon`),
stable-diffusion-2-1 (`sd2-v_prediction`), stable-diffusion-xl-base-1.0.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from erase.models.part_files import read_config
from erase.models.pipelines import Pipeline
from erase.models.schedules import scheduler_class
from erase.models.tokenizers import read_tokenizer
from erase.prompts.errors import ErasureError

HERE = Path(__file__).parent
STOCK = {"sd1": 768, "sd2": 1024, "sdxl": 2048}
"""family -> width of its cross-attention"""


@dataclass(frozen=True)
class Architecture:
    """Everything of a pipeline but its weights."""

    family: str
    """sd1, sd2 or sdxl"""
    configs: dict[str, dict[str, Any]]
    """by component: unet, vae, the text encoders, scheduler"""
    tokenizers: dict[str, CLIPTokenizer]
    options: Mapping[str, Any]
    """what the pipeline itself is told"""

    def modules(self) -> dict[str, nn.Module]:
        """The networks with parameters on the meta device (they take no memory) and real buffers.

        Raises:
            ErasureError: the classes refuse a configuration.
        """
        texts = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        try:
            with init_empty_weights():
                modules = {"unet": UNet2DConditionModel.from_config(self.configs["unet"])}
                modules["vae"] = AutoencoderKL.from_config(self.configs["vae"])
                modules |= {
                    part: kind(CLIPTextConfig(**self.configs[part]))
                    for part, kind in texts.items()
                    if part in self.configs
                }
        except (TypeError, ValueError, KeyError) as error:
            raise ErasureError(
                f"the configuration describes no {self.family} that can be built: {error}"
            ) from error
        return modules

    def pipeline(self, modules: Mapping[str, nn.Module]) -> Pipeline:
        """The stock pipeline over the modules, without a safety checker."""
        config = self.configs["scheduler"]
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        parts = {**modules, **self.tokenizers, "scheduler": scheduler}
        if self.family == "sdxl":
            return StableDiffusionXLPipeline(**parts, **self.options, add_watermarker=False)
        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )


def shipped(family: str, prediction: str) -> Architecture:
    """A stock architecture; SD 2 at 512 pixels for `epsilon`, at 768 for `v_prediction`."""
    name = f"{family}-{prediction}" if family == "sd2" else family
    parts = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    tokenizers = {
        key: clip_tokenizer(**parts.pop(key))
        for key in ("tokenizer", "tokenizer_2")
        if key in parts
    }
    return Architecture(family, parts, tokenizers, {})


def from_folder(folder: str | Path) -> Architecture:
    """The architecture of a diffusers folder; its weights, if any, are not read.

    Raises:
        ErasureError: no such folder, another kind of pipeline, or a configuration that cannot be
            read.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise ErasureError(
            f"{folder} has no model_index.json; load.config must name a diffusers folder"
        )
    index = read_config(folder / "model_index.json")
    families = {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl"}
    family = families.get(str(index.get("_class_name")))
    if family is None:
        raise ErasureError(
            f"{folder} describes a {index.get('_class_name')}; a StableDiffusion(XL)Pipeline is "
            "needed"
        )
    second = ("_2",) if family == "sdxl" else ()
    texts = [f"text_encoder{n}" for n in ("", *second)]
    configs = {part: read_config(folder / part / "config.json") for part in ("unet", "vae", *texts)}
    configs["scheduler"] = read_config(folder / "scheduler/scheduler_config.json")
    if scheduler_class(configs["scheduler"].get("_class_name")) is None:
        raise ErasureError(
            f"{folder} has no scheduler that diffusers knows; scheduler_config.json names none of "
            "its classes"
        )
    if family == "sd":
        family = sd_family(configs["unet"])
    names = [f"tokenizer{n}" for n in ("", *second)]
    options = (
        {"force_zeros_for_empty_prompt": index.get("force_zeros_for_empty_prompt", True)}
        if family == "sdxl"
        else {}
    )
    return Architecture(
        family, configs, {name: read_tokenizer(folder / name) for name in names}, options
    )


def sd_family(unet_config: Mapping[str, Any]) -> str:
    """SD 2 or SD 1: SD 2 came with linear layers around the attention, and with OpenCLIP for its
    text."""
    return "sd2" if unet_config.get("use_linear_projection") else "sd1"


def clip_tokenizer(pad_token: str, model_max_length: int) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer, built from the merges that open_clip installs; SD 1 pads with the
    end token, OpenCLIP with `!` (0)."""
    merges = _merges()
    # by code point, the order in which OpenAI numbered the byte symbols
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [
        *alphabet,
        *(symbol + "</w>" for symbol in alphabet),
        *map("".join, merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(
        vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=model_max_length
    )


@cache
def _merges() -> Any:  # pairs, though the annotation of CLIPTokenizer says strings
    spec = find_spec("open_clip")  # found, not imported: the package is heavy
    if spec is None or spec.origin is None:
        raise ErasureError(
            "CLIP's vocabulary comes with open_clip_torch, which is not installed; pip install "
            "open_clip_torch"
        )
    lines = (
        gzip.decompress((Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes())
        .decode("utf-8")
        .split("\n")
    )
    # the first line is a header; the rest was never used
    pairs = (line.split() for line in lines[1 : 49152 - 256 - 2 + 1])
    return [tuple(pair) for pair in pairs]
