"""The settings that docs/results.md compares on the embedded world: the presets, their controls,
and where those may differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from erase.latents.prepare import LatentConfig
from erase.methods import METHODS, get_method
from erase.scripts.cli import build, parse
from erase.scripts.cli.recipes import recipes
from erase.scripts.run_erase import make_parser
from erase.training.config import ALLOCATIONS, CONTROLS, RULES, TunedConfig

DENSITIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.5)
PRESETS = ("salun", "salun-text", "salun-twofold", "salun-half", "salun-paper")
DRAWN: dict[str, dict[str, Any]] = {
    "trajectories": {"trajectory": 5, "retain_guidance": 1.0},
    "retained without guidance": {"retain_guidance": 1.0},
}
"""latents that are sooner drawn than the presets'"""
RATES = {"race": (1e-3, 2e-3), "advunlearn": (5e-4, 2e-3), "stereo": (4e-4, 8e-4)}
"""what was tried beside the rate of their recipes"""


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
    """Group -> name -> variant."""
    presets = {name: _preset(name, precision) for name in PRESETS}
    methods = _methods(precision)
    return {
        "presets": presets,
        "methods": methods,
        "esd from": _of_esd(methods["esd"]),
        "rates": {
            f"{name}, rate {lr:g}": _with(
                methods[name], {"train": replace(methods[name].settings.train, lr=lr)}
            )
            for name, rates in RATES.items()
            for lr in rates
        },
        **_of_flow(presets["salun"], methods["esd"]),
        **_of_default(presets["salun"]),
        "text": _of_text(presets["salun-text"]),
        **_of_half(presets["salun-half"]),
        **_of_thin(presets["salun-half"]),
    }


def _of_default(ours: Variant) -> dict[str, dict[str, Variant]]:
    """Groups around the preset `salun`: which prompts, which weights, and which target."""
    ours = replace(ours, shares=True)
    masks = {
        "matched-random": {"mask.rule": "matched-random"},
        "random": {"mask.rule": "random"},
        "paper's rule": {"mask.rule": "forget"},
        "benefit, half": {"mask.density": 0.5},
        "paper's rule, half": {"mask.rule": "forget", "mask.density": 0.5},
        "no mask": {"mask.rule": "none"},
    }
    target = {
        "to the anchor": {"beyond": 0.0},
        "no limit": {"beyond_limit": None},
        "limit 0.05": {"beyond_limit": 0.05, "alpha": 10.0},
        "uniform noise": {"noise_power": 1.0},
        "alpha 1": {"alpha": 1.0},
        "batches of 8": {"train": replace(ours.settings.train, batch_size=8)},
    }
    whole: dict[str, Any] = {"scope": "xattn_kv", "mask.density": 1.0}
    texts = {"": whole, ", confined": whole | {"confine": 0.9}}
    even = replace(ours.latents, pick="even")
    drawn = _from_latents(replace(ours, shares=False), DRAWN)
    return {
        "prompts": {"salun, even prompts": replace(ours, latents=even, shares=False)},
        "latents": {f"salun, {name}": variant for name, variant in drawn.items()},
        "hold": {"salun, hold": replace(_with(ours, {"hold": 1.0}), shares=False)},
        "masks": {f"salun, {name}": _with(ours, change) for name, change in masks.items()},
        "keys and values": {
            f"salun, keys and values{name}": replace(_with(ours, change), shares=False)
            for name, change in texts.items()
        },
        "target": {f"salun, {name}": _with(ours, change) for name, change in target.items()},
    }


def _of_text(text: Variant) -> dict[str, Variant]:
    """The preset `salun-text` by other holds and rates; not drawn back and at the rate of `salun`
    it is "salun, keys and values"."""
    changes: dict[str, dict[str, Any]] = {
        "not drawn back": {"prox_text": 0.0},
        "confined": {"prox_text": 0.0, "confine": 0.9},
        "half as much": {"prox_text": 1.0},
        "limit 0.05": {"beyond_limit": 0.05, "alpha": 10.0},
        "rate 0.001": {"train": replace(text.settings.train, lr=1e-3)},
        **{
            f"no retained image, {weight} x": {"alpha": 0.0, "prox_text": float(weight)}
            for weight in (20, 50)
        },
        "one row": {"prox_text": 4.0, "train": replace(text.settings.train, batch_size=1)},
        **{
            f"{100 * density:g} %{kind}": {
                "mask.rule": rule,
                "mask.density": density,
                "mask.batches": 8,
            }
            for density in (0.1, 0.03)
            for kind, rule in (("", "benefit"), (", matched-random", "matched-random"))
        },
    }
    found = {name: _with(text, change) for name, change in changes.items()}
    found |= _from_latents(text, DRAWN | {"64 retained": {"n_retain": 64}})
    return {f"salun-text, {name}": variant for name, variant in found.items()}


def _from_latents(ours: Variant, changes: dict[str, dict[str, Any]]) -> dict[str, Variant]:
    """Name -> the variant from latents that differ in this."""
    return {
        name: replace(ours, latents=replace(ours.latents, **change))
        for name, change in changes.items()
    }


def _of_esd(esd: Variant) -> dict[str, Variant]:
    """ESD to the anchor, and of whole captions."""
    anchored = replace(esd.settings, erase_from="anchor")
    return {
        "esd, from the anchor": replace(esd, settings=anchored),
        "esd, captions": replace(esd, settings=replace(esd.settings, prompts="captions")),
        "esd, captions from the anchor": replace(
            esd, settings=replace(anchored, prompts="captions")
        ),
    }


def _of_flow(ours: Variant, esd: Variant) -> dict[str, dict[str, Variant]]:
    """What other settings help on the flow transformer, and their controls."""
    masked = replace(esd.settings, scope="full", train=replace(esd.settings.train, lr=4e-4))
    mask = {"mask.rule": "benefit", "mask.density": 0.1, "mask.batches": 8}
    wider = _with(ours, {"mask.density": 0.1})
    return {
        "flow": {
            "salun, 10 %": wider,
            "esd, 10 % of full": _with(replace(esd, settings=masked), mask),
        },
        "flow masks": {
            f"salun, 10 %, {rule}": _with(wider, {"mask.rule": rule})
            for rule in ("matched-random", "random", "none")
        },
    }


def _of_half(ours: Variant) -> dict[str, dict[str, Variant]]:
    """Groups around the preset `salun-half`."""
    masks: dict[str, dict[str, Any]] = {
        "no mask": {"mask.rule": "none"},
        "random mask": {"mask.rule": "random"},
        "inverted mask": {"mask.rule": "inverted", "mask.like": "forget"},
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


def _of_thin(half: Variant) -> dict[str, dict[str, Variant]]:
    """Rules and densities under the objective of `salun-half`, with few steps and few latents."""
    train = replace(half.settings.train, steps=60, lr=1e-3, warmup=8)
    short = replace(half.settings, train=train, mask=replace(half.settings.mask, batches=8))
    few = LatentConfig(n_retain=64, mixed_precision=train.mixed_precision)
    swept = replace(half, settings=short, latents=few, shares=True)
    steps = {f"{count} steps": replace(train, steps=count) for count in (120, 300)}
    return {
        "sweep": _masks(swept, ("forget", "benefit", "matched-random", "random")),
        "rules": _masks(swept, ("remap", "fisher-ratio", "weight-gradient", "agreement")),
        "per tensor": _masks(swept, ("forget", "remap", "benefit"), "per-tensor"),
        "polarity": _masks(swept, ("lowest", "inverted")),
        "longer": {
            f"{name}, {rule} 0.1 %": _with(
                replace(swept, settings=replace(swept.settings, train=train)),
                {"mask.rule": rule, "mask.density": 0.001},
            )
            for name, train in steps.items()
            for rule in ("forget", "benefit", "matched-random", "random")
        },
    }


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
    method = get_method(name)
    return _at(precision, Variant(name, method.config, method.latents))


@cache
def _methods(precision: str) -> dict[str, Variant]:
    """Those that have a recipe for the embedded world, at its settings."""
    found = {}
    for recipe in recipes():
        name = recipe.removeprefix("canvas-")
        if name != recipe and name in METHODS:
            options = parse(make_parser(name), ["--config", recipe])
            settings = build(type(get_method(name).config), options)
            found[name] = _at(precision, Variant(name, settings, options.latents))
    return found


def _at(precision: str, variant: Variant) -> Variant:
    """The variant, sampling and training so."""
    settings = variant.settings
    if isinstance(settings, TunedConfig):
        settings = replace(settings, train=replace(settings.train, mixed_precision=precision))
    latents = replace(variant.latents, mixed_precision=precision)
    return replace(variant, settings=settings, latents=latents)


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
