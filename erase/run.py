"""Erase concepts from a checkpoint: the whole job, from words to a delta."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from erase.delta import ErasedDelta
from erase.files import written_whole
from erase.latents import LatentConfig, prepare_latents
from erase.methods import get_method
from erase.models import DiffusionModel, LoadConfig, load_model
from erase.models.loading import is_here, kind_of
from erase.processes import found, processes
from erase.prompt_checks import check_prompts, cut_prompts
from erase.scopes import select_trainable
from erase.train_config import TrainConfig
from erase.training import make_accelerator
from prompts.concepts import ConceptSpec
from prompts.errors import ErasureError, check_ranges

VERSION = "0.1.0"
log = logging.getLogger("erase")


@dataclass
class EraseConfig:
    """What to erase from, and with what data; the method has its own configuration."""

    model: str = "canvas"
    """the base checkpoint: canvas (shipped with this package), a diffusers folder, a single file (.safetensors, .ckpt), or a hub id"""
    method: str = "salun"
    """salun (our default), or salun-paper (the reference to the letter)"""
    seed: int = 0
    """fixes prompts, latents, noise and order: same seed, same machine, same delta"""
    latents: LatentConfig = field(default_factory=LatentConfig)
    load: LoadConfig = field(default_factory=LoadConfig)

    def __post_init__(self) -> None:
        check_ranges(self, {"seed": (-(2**43), 2**43)})  # times a million, and it still seeds a generator


def erase_concept(
    concepts: ConceptSpec | list[ConceptSpec],
    config: EraseConfig | None = None,
    method_config: Any = None,
    *,
    model: DiffusionModel | None = None,
    out: str | Path | None = None,
) -> ErasedDelta:
    """Erase one or several concepts; the base stays as it is.

    Args:
        concepts: what to forget, and what to put in its place.
        config: base, method, data; defaults where none is given.
        method_config: the method's own configuration, e.g. `SalUnConfig(density=0.3)`; the method's defaults where none is given.
        model: a loaded base, to save loading it again.
        out: a folder for delta.safetensors, mask.safetensors, saliency.safetensors and training.json, and for what a stopped run
            needs to go on: the same call with the same folder resumes.

    Returns:
        The delta, which `delta.apply(model)` puts into a base and `erase.export` writes in the formats of others.

    Raises:
        ErasureError: bad input, in a sentence that names it.
    """
    config = config or EraseConfig()
    concepts = [concepts] if isinstance(concepts, ConceptSpec) else list(concepts)
    _check_concepts(concepts)
    method = get_method(config.method)
    settings = method.config if method_config is None else method_config
    accelerator = make_accelerator(getattr(settings, "train", TrainConfig()))
    if config.load.dtype != "float32":
        raise ErasureError(
            f"load.dtype is {config.load.dtype}, but training needs float32 weights; use train.mixed_precision instead"
        )
    model = model or load_model(config.model, accelerator.device, config.load)
    base = model.parameters()
    _check_base(base, getattr(settings, "scope", "full"))
    check_prompts(model, concepts)
    metadata = describe(model, concepts, config, settings)
    folder = Path(out) if out else None
    if folder:
        _claim(folder, metadata)
        if found(folder / "delta.safetensors"):
            return ErasedDelta.load(folder / "delta.safetensors")
    share = getattr(settings, "anchor_latents", 0.0)
    forget, retain = prepare_latents(model, concepts, config.latents, config.seed, folder and folder / "latents", share)
    edit = method.compute(model, concepts, forget, retain, settings, seed=config.seed, accelerator=accelerator, folder=folder)
    delta = ErasedDelta.between({name: base[name].data for name in edit.values}, edit.values, metadata)
    if folder and accelerator.is_main_process:
        if edit.mask:
            edit.mask.save(folder / "mask.safetensors")
        with written_whole(folder / "training.json") as aside:
            aside.write_text(json.dumps({"losses": edit.losses}))
        delta.save(folder / "delta.safetensors")
        (folder / "training.pt").unlink(missing_ok=True)
    accelerator.wait_for_everyone()  # who goes on finds the files
    return delta


def load_base(
    delta: ErasedDelta, name: str | None = None, device: str | torch.device = "cpu", options: LoadConfig | None = None
) -> DiffusionModel:
    """The base that a delta was made from, read as it was then.

    Args:
        delta: names its base and how it was read.
        name: where the base is now; by default where it was. A hub id is fetched only if it is given here: a delta may come from
            anybody, and name anything.
        device: where it goes.
        options: how it is read now; what is not the default wins over the delta's.

    Raises:
        ErasureError: it cannot be loaded, or would have to be fetched. Whether it is the right one is checked where the delta is applied.
    """
    base, given = name or delta.metadata.get("base_id") or "", options or LoadConfig()
    if not base:
        raise ErasureError(f"{delta.source} does not say which base it was made from; give the base with --model")
    chosen = _stored_options(delta).meant_for("folder" if base == "canvas" else kind_of(base)).updated(given)
    if name is None and base != "canvas":
        if not is_here(base, chosen):
            revision = f" --load.revision {chosen.revision}" if chosen.revision else ""
            raise ErasureError(
                f"{delta.source} names {base!r} as its base, which is not on this machine; to fetch it from the hub, say so with --model "
                f"{base}{revision}, or give with --model where it is"
            )
        chosen = replace(chosen, offline=True)
    return load_model(base, device, chosen)


def _stored_options(delta: ErasedDelta) -> LoadConfig:
    """How a delta's base was read; options of newer versions are left out, and said."""
    try:
        config = json.loads(delta.metadata.get("config", "{}"))
        while "parts" in config:  # a composed delta's have one base, and may be composed themselves
            config = config["parts"][0]
        stored = dict(config.get("erase", {}).get("load", {}))
        known = {field.name for field in fields(LoadConfig)}
        if newer := sorted(stored.keys() - known):
            log.warning("%s: its option load.%s is not known to this version, and left out", delta.source, ", load.".join(newer))
        return LoadConfig(**{key: value for key, value in stored.items() if key in known})
    except (TypeError, ValueError, AttributeError, LookupError, RecursionError) as error:
        raise ErasureError(
            f"{delta.source} does not say how its base was read ({error}); the file is damaged, erase again"
        ) from error


def _check_concepts(concepts: list[ConceptSpec]) -> None:
    if not concepts:
        raise ErasureError("no concept to erase was given")
    gone = {name.casefold(): concept.target for concept in concepts for name in concept.names}
    for concept in concepts:
        if concept.anchor.casefold() in gone:
            raise ErasureError(
                f"the anchor of {concept.target!r} is {concept.anchor!r}, which is to be forgotten as well; choose another anchor, "
                "or erase the concepts one at a time"
            )


def _check_base(params: Mapping[str, nn.Parameter], scope: str) -> None:
    """Refuse weights or a scope that cannot be trained, before hours are spent on latents."""
    for name, param in params.items():
        if param.dtype != torch.float32:
            raise ErasureError(
                f"{name} is {param.dtype}, but training needs float32 weights; load the model in float32, and use "
                "train.mixed_precision instead"
            )
    select_trainable(params, scope)


def describe(model: DiffusionModel, concepts: list[ConceptSpec], config: EraseConfig, settings: Any) -> dict[str, str]:
    """Everything that fixes the result, as a delta's metadata."""
    prompts = [prompt for concept in concepts for pair in concept.pairs() for prompt in pair]
    cut = cut_prompts([*prompts, *(prompt for concept in concepts for prompt in concept.retain)], model.tokens)
    return {
        "base_fingerprint": model.fingerprint,
        "base_id": model.name,
        "method": config.method,
        "config": json.dumps({"erase": asdict(config), "method": asdict(settings)}, sort_keys=True),
        "concepts": json.dumps([asdict(concept) for concept in concepts]),
        "created_with": f"concept-erasure-toolkit {VERSION}, torch {torch.__version__}",
        **({"cut_prompts": json.dumps(cut, ensure_ascii=False)} if cut else {}),
    }


def _claim(folder: Path, metadata: dict[str, str]) -> None:
    """Mark the folder as this erasure's, or refuse one that holds another: resuming must never mix two."""
    path = folder / "run.json"
    if found(path):
        other = json.loads(path.read_text())
        differing = [key for key in metadata if other.get(key) != metadata[key]]
        if differing:
            raise ErasureError(
                f"{folder} holds another run (its {', '.join(differing)} differ); choose another folder or delete it"
            )
    elif processes().is_main_process:
        with written_whole(path) as aside:
            aside.write_text(json.dumps(metadata, indent=1))
