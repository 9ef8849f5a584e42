"""The settings that docs/results.md compares on the embedded world: the presets, their controls,
and where those may differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from erase.latents.prepare import LatentConfig
from erase.methods import get_method
from erase.training.config import ALLOCATIONS, CONTROLS, RULES

DENSITIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.5)
PRESETS = ("salun", "salun-paper")


@dataclass(frozen=True)
class Variant:
    """One way to erase a concept."""

    method: str
    settings: Any
    """the method's configuration"""
    latents: LatentConfig
    shares: bool = False
    """whether the statistics of its gradients are shared with variants of the same batches"""


def groups(precision: str) -> dict[str, dict[str, Variant]]:
    """Group -> name -> variant; each differs from the preset `salun` in what its name says, and
    those with a density in their names in that they take 60 steps."""
    presets = {name: _preset(name, precision) for name in PRESETS}
    ours = presets["salun"]
    short = replace(ours.settings, train=replace(ours.settings.train, steps=60))
    swept = replace(ours, settings=short, shares=True)
    steps = {f"{count} steps": replace(ours.settings.train, steps=count) for count in (120, 300)}
    return {
        "presets": presets,
        "before": {"before": _before(ours)},
        "sweep": _masks(swept, ("forget", "benefit", "matched-random", "random")),
        "rules": _masks(swept, ("remap", "fisher-ratio", "weight-gradient", "agreement")),
        "per tensor": _masks(swept, ("forget", "remap", "benefit"), "per-tensor"),
        "polarity": _masks(swept, ("lowest", "inverted")),
        "whole": {"none": _with(ours, {"mask.rule": "none"})},
        "scopes": {"xattn only": _with(ours, {"scope": "xattn"})},
        "no retain": {
            f"no retain, {name}": _with(ours, {"alpha": 0.0, **change})
            for name, change in _few().items()
        },
        "longer": {
            f"{name}, {rule} 0.1 %": _with(
                replace(swept, settings=replace(swept.settings, train=train)),
                {"mask.rule": rule, "mask.density": 0.001},
            )
            for name, train in steps.items()
            for rule in ("forget", "benefit", "matched-random", "random")
        },
    }


def _before(ours: Variant) -> Variant:
    """The preset `salun` until its mask was chosen by `benefit`."""
    train = replace(ours.settings.train, steps=300, lr=4e-4, warmup=0)
    mask = replace(ours.settings.mask, rule="forget", density=0.5)
    latents = replace(ours.latents, n_forget=96, n_retain=192, steps=10)
    return replace(ours, settings=replace(ours.settings, train=train, mask=mask), latents=latents)


def _few() -> dict[str, dict[str, Any]]:
    """Name -> mask, of those that are compared with no retain loss to hold the model back."""
    few: dict[str, dict[str, Any]] = {"no mask": {"mask.rule": "none"}}
    for rule in ("forget", "benefit", "random"):
        for density in (0.1, 0.5):
            few[f"{rule} {density:.0%}"] = {"mask.rule": rule, "mask.density": density}
    return few


def _masks(base: Variant, rules: tuple[str, ...], allocation: str = "global") -> dict[str, Variant]:
    """Each rule at each density, by a name such as `benefit 0.1 %`."""
    assert set(rules) <= {*RULES, *CONTROLS} and allocation in ALLOCATIONS
    variants = {}
    for density in DENSITIES:
        for rule in rules:
            kind = "" if allocation == "global" else ", per tensor"
            change = {
                "mask.rule": rule,
                "mask.density": density,
                "mask.allocation": allocation,
            }
            variants[f"{rule}{kind} {100 * density:g} %"] = _with(base, change)
    return variants


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
