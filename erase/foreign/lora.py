"""Foreign LoRAs: the layers that they change, read from the layouts of kohya's sd-scripts, of peft
and of diffusers, old and new.

A layer's change is scale * up @ down (Hu et al. 2021, section 4.1), with scale = alpha / rank, or 1
where neither the file nor the configuration beside it tells an alpha.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from erase.delta import difference
from erase.export.lora import merged
from erase.foreign.names import Places
from erase.foreign.weights import Changes
from erase.models.part_files import read_config
from erase.models.single_file.filling import converted
from erase.models.single_file.ldm import Entry
from erase.models.single_file.tensor_file import TensorFile
from erase.prompts.errors import ErasureError

FACTORS = (
    re.compile(r"(?P<layer>.+)\.lora_(?P<part>down|up|A|B)(\.[^.]+)?\.weight"),
    re.compile(r"(?P<layer>.+)\.lora(_linear_layer)?\.(?P<part>down|up)\.weight"),
    re.compile(
        r"(?P<layer>.+)\.processor\.(?P<of>to_[qkv]|to_out)_lora\.(?P<part>down|up)\.weight"
    ),
    re.compile(r"(?P<layer>.+)\.(?P<part>alpha)"),
)
"""kohya's and peft's names (the latter with the adapter's own name in it); those of diffusers since
0.17, and before"""
PARTS = {"A": "down", "B": "up"}
MORE = re.compile(
    r"hada_|lokr_|lora_mid|dora_scale|lora_magnitude|lora_B\.bias|lora_embedding|\.diff(_b)?$"
    r"|oft_|boft_"
)
"""keys of other parametrisations than a product of two factors"""


@dataclass
class Layer:
    """The factors of one layer, by the keys that they stand under."""

    keys: dict[str, str] = field(default_factory=dict)
    """down, up, alpha -> key"""


def is_lora(file: TensorFile) -> bool:
    """Whether a file holds factors of layers, or what else stands in their place."""
    return any(map(_of_factor, file.shapes))


def _of_factor(key: str) -> bool:
    return bool(MORE.search(key)) or any(form.fullmatch(key) for form in FACTORS[:3])


def read_lora(
    file: TensorFile, known: Places, base: Mapping[str, Tensor], changes: Changes
) -> list[str]:
    """Add a LoRA to the base's layers, into `changes`.

    Args:
        file: an open file of factors.
        known: the names that its layers may have.
        base: the weights that may change.
        changes: where the difference goes.

    Returns:
        The keys that are of no layer of the base.

    Raises:
        ErasureError: a layer that lacks a factor, or whose factors do not make its shape; another
            parametrisation (LoHa, LoKr, DoRA, ...), which a sum of two factors would misread.
    """
    if other := [key for key in file.shapes if MORE.search(key)]:
        raise ErasureError(
            f"{file.path} holds {other[0]}, which is no LoRA of two factors a layer; merge it into "
            "its base with the program that made it, and give the merged checkpoint"
        )
    found, strange = _layers(file)
    alphas = _alphas(file)
    for name, layer in found.items():
        entry = _entry(file, name, layer, known, base)
        if entry is None:
            strange += layer.keys.values()
            continue
        for weight in entry.names:
            if weight in changes.given:
                raise ErasureError(
                    f"{file.path} changes {weight} twice, by {changes.given[weight]} and by "
                    f"{name}; give one LoRA a file"
                )
            changes.given[weight] = name
        down, up = (_factor(file, layer.keys[part]) for part in ("down", "up"))
        changes.dtypes[str(down.dtype).removeprefix("torch.")] += 1
        alpha = float(file.read(layer.keys["alpha"])) if "alpha" in layer.keys else alphas.of(name)
        scale = 1.0 if alpha is None else alphas.scale(alpha, down.shape[0])
        up = up.double() * scale
        parts = entry.unpack(up) if entry.form in ("stacked", "swapped") else [up]
        for weight, rows in zip(entry.names, parts, strict=True):
            change = difference(base[weight], merged(base[weight], rows, down))
            if change:
                changes.values[weight], changes.bits[weight] = change
    return strange


def _layers(file: TensorFile) -> tuple[dict[str, Layer], list[str]]:
    """Layer -> its factors; and the keys that are none."""
    found: dict[str, Layer] = {}
    strange = []
    for key in file.shapes:
        match = next(filter(None, (form.fullmatch(key) for form in FACTORS)), None)
        if match is None:
            strange.append(key)
            continue
        of = match.groupdict().get("of")
        inner = {"to_out": ".to_out.0"}.get(of, f".{of}") if of else ""
        name = match["layer"].removeprefix("base_model.model.") + inner
        layer = found.setdefault(name, Layer())
        part = PARTS.get(match["part"], match["part"])
        if part in layer.keys:
            raise ErasureError(
                f"{file.path} holds two adapters, {layer.keys[part]} and {key}; save one of them "
                "alone"
            )
        layer.keys[part] = key
    return found, strange


def _entry(
    file: TensorFile, name: str, layer: Layer, known: Places, base: Mapping[str, Tensor]
) -> Entry | None:
    """The weight, or those stacked in one, that a layer's factors change; None if the base has no
    such layer."""
    meant = known.get(name, [])
    if not meant:
        return None
    for part in ("down", "up"):
        if part not in layer.keys:
            raise ErasureError(f"{file.path}: {name} lacks its {part} factor; fetch it again")
    down, up = (file.shapes[layer.keys[part]] for part in ("down", "up"))
    fitting = []
    for entry in meant:
        shapes = [base[weight].shape for weight in entry.names]
        if len(up) >= 2 and len(down) >= 2 and up[1] == down[0]:
            wide = torch.Size(down[1:]).numel() == shapes[0][1:].numel()
            fitting += [entry] if wide and up[0] == sum(shape[0] for shape in shapes) else []
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        either = " or ".join(entry.names[0] for entry in fitting)
        raise ErasureError(
            f"{file.path}: {name} may be of {either}; put the component's name before each layer's"
        )
    first = meant[0].names[0]
    raise ErasureError(
        f"{file.path} is not of this base: the factors of {name} are {list(up)} and {list(down)}, "
        f"and do not make {list(base[first].shape)} of {first}; name the checkpoint that it "
        "was made for with --model"
    )


def _factor(file: TensorFile, key: str) -> Tensor:
    tensor = file.read(key)
    return converted(tensor, tensor.dtype, f"{file.path}: {key}")


@dataclass(frozen=True)
class Alphas:
    """The alphas that peft keeps beside the factors, for layers that carry none."""

    usual: dict[str, float]
    """component, or nothing for all -> alpha"""
    patterns: dict[tuple[str, str], float]
    """component, or nothing for all, and the end of a layer's name -> alpha"""
    rooted: bool = False
    """rsLoRA: divided by the root of the rank (Kalajdzievski 2023)"""

    def of(self, layer: str) -> float | None:
        """The alpha of a layer; None where nothing tells it."""
        component = layer.split(".")[0]
        for (of, end), alpha in self.patterns.items():
            if of in ("", component) and f".{layer}".endswith(f".{end}"):
                return alpha
        return self.usual.get(component, self.usual.get(""))

    def scale(self, alpha: float, rank: int) -> float:
        return alpha / (rank**0.5 if self.rooted else rank)


def _alphas(file: TensorFile) -> Alphas:
    """What the file's metadata say (diffusers' `lora_adapter_metadata`), or peft's
    `adapter_config.json` beside it."""
    text = file.metadata.get("lora_adapter_metadata")
    beside = file.path.with_name("adapter_config.json")
    settings: dict[str, Any] = {}
    if text:
        try:
            settings = dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise ErasureError(
                f"{file.path}: its lora_adapter_metadata is no JSON ({str(error)[:80]}); fetch it "
                "again"
            ) from error
    elif beside.is_file() and file.path.stem == "adapter_model":
        settings = read_config(beside)
    usual: dict[str, float] = {}
    patterns: dict[tuple[str, str], float] = {}
    rooted = False
    for key, value in settings.items():
        component, _, name = key.rpartition(".")
        if name == "use_dora" and value:
            raise ErasureError(f"{file.path} is a DoRA, which is no sum; merge it into its base")
        if name == "lora_alpha":
            usual[component] = _number(file, value)
        if name == "alpha_pattern" and isinstance(value, dict):
            for end, alpha in value.items():
                patterns[component, _plain(file, end)] = _number(file, alpha)
        rooted |= name == "use_rslora" and bool(value)
    return Alphas(usual, patterns, rooted)


def _number(file: TensorFile, value: object) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ErasureError(f"{file.path}: its alpha {value!r} is no number; fetch it again")
    return float(value)


def _plain(file: TensorFile, pattern: str) -> str:
    """The name of a layer in an alpha pattern; peft reads it as a regular expression."""
    name = pattern.removeprefix("^").replace("\\.", ".")
    if not re.fullmatch(r"[\w.]+", name):
        raise ErasureError(
            f"{file.path}: its alpha_pattern {pattern[:80]!r} is more than a layer's name; merge "
            "the LoRA into its base, and give the merged checkpoint"
        )
    return name
