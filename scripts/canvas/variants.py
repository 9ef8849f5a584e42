"""The settings that docs/results.md compares on the embedded world: the presets, their controls,
and where those may differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from erase.latents.prepare import LatentConfig
from erase.methods import get_method


@dataclass(frozen=True)
class Variant:
    """One way to erase a concept."""

    method: str
    settings: Any
    """the method's configuration"""
    latents: LatentConfig


def groups(precision: str) -> dict[str, dict[str, Variant]]:
    """Group -> name -> variant; each control differs from the preset `salun` in what its name
    says."""
    ours, paper = (_preset(name, precision) for name in ("salun", "salun-paper"))
    masks: dict[str, dict[str, Any]] = {
        "no mask": {"mask.rule": "none"},
        "random mask": {"mask.rule": "random"},
        "inverted mask": {"mask.rule": "inverted"},
        "xattn only": {"scope": "xattn"},
        **{f"density {density}": {"mask.density": density} for density in (0.1, 0.3, 0.7, 0.9)},
    }
    few = {
        f"density {density}{kind}": {"mask.density": density, "mask.rule": rule}
        for density in (0.03, 0.01)
        for kind, rule in (("", "forget"), (", random", "random"))
    }
    weights = {
        "": {},
        ", no mask": masks["no mask"],
        ", random mask": masks["random mask"],
        ", density 0.1": masks["density 0.1"],
        ", density 0.1, random": masks["density 0.1"] | masks["random mask"],
    }
    fast = _with(ours, {"train": replace(ours.settings.train, lr=2e-3)})
    sampling = {
        "50 sampling steps": {"steps": 50},
        "trajectory 10": {"trajectory": 10},
        "trajectory 5, a fifth of the images": {"trajectory": 5, "n_forget": 20, "n_retain": 40},
    }
    return {
        "presets": {"salun": ours, "salun-paper": paper},
        "controls": {name: _with(ours, change) for name, change in masks.items()},
        "few weights": {name: _with(ours, change) for name, change in few.items()},
        "no retain": {
            f"no retain{name}": _with(ours, {"alpha": 0.0, **change})
            for name, change in weights.items()
        },
        "large rate": {f"lr 2e-3{name}": _with(fast, change) for name, change in weights.items()},
        "sampling": {
            name: replace(ours, latents=replace(ours.latents, **change))
            for name, change in sampling.items()
        },
    }


def _preset(name: str, precision: str) -> Variant:
    config = get_method(name).config
    settings = replace(config, train=replace(config.train, mixed_precision=precision))
    return Variant(name, settings, LatentConfig(mixed_precision=precision))


def _with(variant: Variant, change: Mapping[str, Any]) -> Variant:
    """The variant with other settings; `mask.NAME` is one of the mask's."""
    settings = variant.settings
    mask = {
        name.removeprefix("mask."): value
        for name, value in change.items()
        if name.startswith("mask.")
    }
    own = {name: value for name, value in change.items() if not name.startswith("mask.")}
    return replace(variant, settings=replace(settings, **own, mask=replace(settings.mask, **mask)))
