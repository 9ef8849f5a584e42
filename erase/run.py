"""Erase concepts from a checkpoint: the whole job, from words to a delta."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from erase.claims import check_artifact, check_settings, claimed, flat
from erase.compose.sequence import check_earlier, with_earlier
from erase.delta import ErasedDelta
from erase.delta.origin import foreign_of
from erase.delta.stored import FILE
from erase.files import atomic_write
from erase.latents.config import LatentConfig
from erase.methods import Method, get_method
from erase.models import DiffusionModel, LoadConfig, load_model
from erase.models.prompt_checks import check_prompts, cut_prompts
from erase.parallel.processes import default_device, exists_on_all, peak_memory, processes
from erase.prompts.canvas import EMBEDDED, check_canvas
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError, check_ranges
from erase.prompts.reading import as_path
from erase.prompts.several import (
    anchored_pairs,
    check_after,
    check_together,
    retained_prompts,
)
from erase.task import Edit, Task
from erase.training.config import TunedConfig
from erase.training.confine import check_held_prompts
from erase.training.fine_tune import check_machine, check_scope
from erase.training.saliency import check_files
from erase.training.trackers import check_log

VERSION = "0.1.0"
UNSAID = LatentConfig()
"""stands for the method's own"""
log = logging.getLogger("erase")


@dataclass
class EraseConfig:
    """What to erase from, and with what data; the method has its own configuration."""

    model: str = "canvas"
    """the base checkpoint: canvas or canvas-flow (shipped with this package), a diffusers folder, a
    single file (.safetensors, .ckpt), or a hub id"""
    method: str = "salun"
    """salun (our default), salun-text (where text enters alone: quicker, and keeps most),
    salun-twofold (comes back later, takes half as long again), salun-half (the paper's mask, half
    of the weights), salun-paper (the reference to the letter), ..."""
    seed: int = 0
    """fixes prompts, latents, noise and order: same seed, same machine, same number of threads,
    same delta"""
    latents: LatentConfig = field(default_factory=lambda: UNSAID)
    load: LoadConfig = field(default_factory=LoadConfig)

    def __post_init__(self) -> None:
        if isinstance(self.model, Path):
            self.model = str(self.model)
        if self.latents is UNSAID:
            self.latents = replace(get_method(self.method).latents)
        # times a million, and it still seeds a generator
        check_ranges(self, {"seed": (-(2**43), 2**43)})


def erase_concept(
    concepts: ConceptSpec | list[ConceptSpec],
    config: EraseConfig | None = None,
    method_config: Any = None,
    *,
    model: DiffusionModel | None = None,
    out: str | Path | None = None,
    after: ErasedDelta | None = None,
) -> ErasedDelta:
    """Erase one or several concepts; the base stays as it is.

    Args:
        concepts: each names the thing to forget and the anchor in its place.
        config: base, method, data; defaults where none is given.
        method_config: the method's own configuration, e.g.
            `SalUnConfig(mask=MaskConfig(density=0.3))`; the method's defaults where none is given.
        model: a loaded base, to save loading it again.
        out: a folder for delta.safetensors, mask.safetensors, saliency.safetensors and
            training.json, and for the state of a stopped run: the same call with the same folder
            resumes.
        after: an earlier erasure of the same base, to go on from (`erase.compose.sequence`).

    Returns:
        The delta, which `delta.apply(model)` puts into a base and `erase.export` writes in the
        formats of others. With `after`, it holds the earlier changes too.

    Raises:
        ErasureError: bad input, in a sentence that names it; a folder of another run; or no weight
            changed.
    """
    config = EraseConfig() if config is None else config
    concepts = [concepts] if isinstance(concepts, ConceptSpec) else list(concepts)
    _check_request(concepts, config, model, after)
    method = get_method(config.method)
    settings, folder = method.settings(method_config), _folder(out)
    earlier = after.origin.concepts if after else []
    _check_settings(config, settings, folder, concepts, earlier)
    description = describe(concepts, config, settings, after)
    defaults = flat(asdict(EraseConfig(method=config.method))) | flat(asdict(method.config))
    path = folder / FILE if folder else None
    finished = path is not None and exists_on_all(path)
    if folder:
        check_settings(folder, description, defaults)
    if finished:
        log.info("%s is finished, so nothing is computed again; only its base is checked", path)
    model = model or load_model(config.model, default_device(), _load_options(config, settings))
    _check_base(model, settings, after)
    check_prompts(model, concepts)

    metadata = _metadata(model, [*earlier, *concepts], description)
    known = _finished(path, metadata, defaults) if path and finished else None
    with claimed(folder, metadata, defaults, finished):
        if known:
            return known
        task = Task(model, concepts, config.latents, config.seed, folder, earlier)
        if isinstance(settings, TunedConfig):
            check_files(task, settings)
        edit, delta, cost = _erased(task, method, settings, metadata, after)
        _save(folder, edit, delta, cost)
        return delta


def _erased(
    task: Task,
    method: Method[Any],
    settings: Any,
    metadata: dict[str, str],
    after: ErasedDelta | None,
) -> tuple[Edit, ErasedDelta, dict[str, float]]:
    """A method's edit of the task's model, or of what `after` left of it; the delta against the
    task's model; and what it cost."""
    model = task.model
    with after.applied(model) if after else nullcontext():
        started = perf_counter()
        edit = method.edit(task, settings)
        cost = {"seconds": perf_counter() - started, "peak_memory_bytes": peak_memory()}
        base = model.parameters()
        delta = ErasedDelta.between(
            {name: base[name].data for name in edit.values},
            edit.values,
            {**metadata, "base_fingerprint": model.fingerprint},
        )
    _check_changed(delta, task.concepts)
    if after:
        targets = [concept.target for concept in task.concepts]
        delta = with_earlier(model, after, delta, targets, metadata)
    return edit, delta, cost


def _check_request(
    concepts: list[ConceptSpec],
    config: EraseConfig,
    model: DiffusionModel | None,
    after: ErasedDelta | None,
) -> None:
    """Refuse, before anything is loaded, what no method could do."""
    if not isinstance(config, EraseConfig):
        raise ErasureError(
            f"config is a {type(config).__name__}; give an EraseConfig, and the method's own as "
            "method_config"
        )
    check_together(concepts)
    if after is not None:
        check_earlier(after)
        check_after(concepts, after.origin.concepts, after.source)
    if (model.name if model else config.model) in EMBEDDED:
        check_canvas(concepts)
    if config.load.dtype != "float32":
        raise ErasureError(
            f"load.dtype is {config.load.dtype}, but training needs float32 weights; use "
            "train.mixed_precision instead"
        )


def _save(folder: Path | None, edit: Edit, delta: ErasedDelta, cost: Mapping[str, float]) -> None:
    """Keep the results of a run, if it has a folder; whoever goes on finds the files."""
    if folder and processes().is_main_process:
        _write(folder, edit, delta, cost)
    processes().wait_for_everyone()


def _write(folder: Path, edit: Edit, delta: ErasedDelta, cost: Mapping[str, float]) -> None:
    """Write the results of a run, the delta last: it says that the run is finished."""
    if edit.mask:
        edit.mask.save(folder / "mask.safetensors")
    with atomic_write(folder / "training.json") as aside:
        aside.write_text(
            json.dumps(
                {
                    "losses": list(edit.losses),
                    "delta_sha256": delta.sha256,
                    "cost": cost,
                    "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                }
            ),
            encoding="utf-8",
        )
    delta.save(folder / FILE)
    for state in folder.glob("training*.pt"):
        state.unlink()


def _folder(out: str | Path | None) -> Path | None:
    if out is None:
        return None
    if not str(out).strip():
        raise ErasureError(
            "out is empty, so nothing would be written; name a folder, or leave it out to keep the "
            "delta in memory"
        )
    folder = as_path(out)
    if folder.is_file():
        raise ErasureError(f"{folder} is a file, not a folder; choose another output folder")
    return folder


def _finished(path: Path, metadata: Mapping[str, str], defaults: Mapping[str, Any]) -> ErasedDelta:
    """The delta of an earlier call.

    Raises:
        ErasureError: it is of another run, or changes nothing.
    """
    delta = ErasedDelta.load(path)
    check_artifact(path, delta.metadata, metadata, "give another --out, or delete it", defaults)
    _check_changed(delta, delta.origin.concepts)
    return delta


def _check_changed(delta: ErasedDelta, concepts: Sequence[ConceptSpec]) -> None:
    if not delta.count:
        titles = ", ".join(concept.target for concept in concepts)
        raise ErasureError(
            f"erasing {titles} changed no weight, so there is no delta: either its prompts "
            "are to the text encoder what their anchors' are, or the steps are too small for "
            "float32; choose another name or anchor, or raise train.lr or train.steps"
        )


def _check_settings(
    config: EraseConfig,
    settings: Any,
    folder: Path | None,
    concepts: Sequence[ConceptSpec],
    earlier: Sequence[ConceptSpec],
) -> None:
    """Refuse settings that this machine cannot train or log with, or that want retained prompts and
    there are none, before anything is loaded."""
    if isinstance(settings, TunedConfig):
        check_machine(settings, config.load.offload == "blocks")
        check_log(settings.train.log_with, folder)
        if settings.holding:
            check_held_prompts(retained_prompts(concepts, earlier), settings)


def _load_options(config: EraseConfig, settings: Any) -> LoadConfig:
    """As they are given; who offloads in training has no room for all parts before it either."""
    offload = isinstance(settings, TunedConfig) and settings.train.offload
    return replace(config.load, offload=config.load.offload or offload)


def _check_base(model: DiffusionModel, settings: Any, after: ErasedDelta | None) -> None:
    """Refuse weights that cannot be trained, or that the earlier erasure is not of, before hours
    are spent on latents."""
    params = model.parameters()
    for name, param in params.items():
        if param.dtype != torch.float32:
            raise ErasureError(
                f"{name} is {param.dtype}, but training needs float32 weights; load the model in "
                "float32, and use train.mixed_precision instead"
            )
    if isinstance(settings, TunedConfig):
        check_scope(params, settings)
    if after:
        after.check(model)


def _metadata(
    model: DiffusionModel, concepts: list[ConceptSpec], description: dict[str, str]
) -> dict[str, str]:
    """What the delta will say of its base and of its making."""
    return {
        "base_fingerprint": model.fingerprint,
        "base_id": model.name,
        **description,
        **_cut(model, concepts),
    }


def _cut(model: DiffusionModel, concepts: list[ConceptSpec]) -> dict[str, str]:
    """The prompts whose ends no text encoder sees, for the metadata."""
    prompts = [prompt for pairs in anchored_pairs(concepts) for pair in pairs for prompt in pair]
    cut = cut_prompts(
        [*prompts, *(prompt for concept in concepts for prompt in concept.retain)], model.tokens
    )
    return {"cut_prompts": json.dumps(cut, ensure_ascii=False)} if cut else {}


def describe(
    concepts: list[ConceptSpec],
    config: EraseConfig,
    settings: Any,
    after: ErasedDelta | None = None,
) -> dict[str, str]:
    """Everything that fixes the result but the base, as a delta's metadata: methods and concepts of
    an earlier erasure with those of this one, the config of this one."""
    erase = {**asdict(config), "latents": config.latents.facts, "load": config.load.facts}
    named = [asdict(concept) for concept in concepts]
    facts = {
        "method": config.method,
        "config": json.dumps({"erase": erase, "method": asdict(settings)}, sort_keys=True),
        "concepts": json.dumps(named),
        "created_with": f"concept-erasure-toolkit {VERSION}, torch {torch.__version__}",
    }
    if after is None:
        return facts
    known = {key: after.metadata[key] for key in ("license",) if key in after.metadata}
    if foreign := foreign_of(after.metadata, after.source):
        known["foreign"] = json.dumps(foreign, ensure_ascii=False)
    return {
        **facts,
        **known,
        "method": "+".join(dict.fromkeys([*after.metadata["method"].split("+"), config.method])),
        "concepts": json.dumps([*after.concepts, *named]),
        "after": after.sha256,
    }
