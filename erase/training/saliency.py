"""The mask of an erasure: computed from gradients by a rule, read from a file, or a control."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erase.claims import check_artifact
from erase.latents.batches import draw_rows
from erase.latents.latent_set import texts_of
from erase.losses import denoising, forgetting, guided
from erase.mask import Saliency, SaliencyMask
from erase.parallel.layout import ActiveWeights
from erase.parallel.processes import exists_on_all, processes, progress, round_robin
from erase.task import Task, describe
from erase.tensor_files import load_metadata
from erase.training.batches import PromptedRows, row_batches
from erase.training.config import MaskConfig, TunedConfig
from erase.training.loop import Batches, LossFn
from erase.training.rules import RULES, find_density, overlap, scores
from erase.training.running import running
from erase.training.shares import cut
from erase.training.statistics import (
    AGAIN,
    Accumulator,
    Statistics,
    Zeros,
    beside,
    in_memory,
    on_disk,
)
from erase.training.trainable import gradients_on


@dataclass(frozen=True)
class Objective:
    """The training objective of a method: the gradients of its forget term tell how training will
    change each weight. The latents that it uses are made by now."""

    loss: LossFn
    batches: Batches


def choose_mask(
    task: Task, config: TunedConfig, objective: Objective | None = None
) -> SaliencyMask | None:
    """The mask that the configuration asks for; None: every weight of the scope may change.

    Statistics are as large as the weights. They are written to the task's folder as soon as they
    are there, found again by a resumed run, and not kept in memory while training.

    Args:
        task: the erasure.
        config: its `mask`.
        objective: of the method, for the rules that look at it.

    Raises:
        ErasureError: a file of another base or concept, or one that lacks what the rule needs.
    """
    mask = config.mask
    if mask.file:
        given = SaliencyMask.load(mask.file)
        _check_given(task, Path(mask.file), given.metadata)
        return given
    if mask.rule == "none" or mask.density == 1:
        return None

    weights = task.weights(config.scope)
    if mask.rule == "random":
        about = describe(task)
        provenance = {key: about[key] for key in ("base_fingerprint", "concepts")}
        return SaliencyMask.random(
            weights, float(mask.density), task.seed, provenance, mask.allocation
        )

    rule = ranking_of(mask)
    statistics = find_statistics(task, config, RULES[rule].needs, objective)
    density = mask.density
    if density == "auto":
        density = find_density(statistics, mask.allocation)
    saliency = scores(statistics, rule, weights)
    shared = overlap(statistics, density)
    if shared is not None:
        saliency.metadata["overlap"] = repr(round(shared, 4))
    return _cut(saliency, mask, density, task.seed)


def _cut(saliency: Saliency, mask: MaskConfig, density: float, seed: int) -> SaliencyMask:
    """The mask of a rule, or of a control that goes by one."""
    if mask.rule == "lowest":
        return saliency.lowest(density, mask.allocation)
    salient = saliency.cut(density, mask.allocation)
    if mask.rule == "matched-random":
        return salient.matched_random(seed)
    return salient.inverted() if mask.rule == "inverted" else salient


def ranking_of(mask: MaskConfig) -> str:
    """The rule that ranks weights: that of the mask, or the one that a control goes by."""
    return mask.rule if mask.rule in RULES else mask.like


def compute_saliency(
    task: Task, config: TunedConfig, objective: Objective | None = None
) -> Saliency:
    """The score of every weight of the scope by the mask's rule, computed anew."""
    rule = ranking_of(config.mask)
    statistics = compute_statistics(task, config, RULES[rule].needs, objective)
    return scores(statistics, rule, task.weights(config.scope))


def find_statistics(
    task: Task, config: TunedConfig, names: tuple[str, ...], objective: Objective | None = None
) -> Statistics:
    """The statistics of `mask.saliency`, of an earlier start of this run, or computed.

    Raises:
        ErasureError: those of another base or concept, or that do not cover the scope; in the
            task's folder, also ones that this run would not compute itself.
    """
    if config.mask.saliency:
        return _given(task, config)
    path = task.folder / "saliency.safetensors" if task.folder else None
    if path and exists_on_all(path):
        statistics = Statistics.load(path)
        check_artifact(path, statistics.metadata, _provenance(task, config, names), AGAIN)
        return statistics
    computed = compute_statistics(task, config, names, objective)
    if path and processes().is_main_process:
        computed.save(path)
    return computed


def compute_statistics(
    task: Task, config: TunedConfig, names: tuple[str, ...], objective: Objective | None = None
) -> Statistics:
    """Statistics of the weights of the scope, at the base.

    In float32 whatever the training's precision, for small gradients decide the ranking.

    Args:
        task: the erasure.
        config: scope, batches, and how the model is run.
        names: the statistics, of those that `erase.training.statistics` lists.
        objective: for `objective.*`.
    """
    params = task.weights(config.scope)
    # embeds all prompts, which running() would do in another way
    provenance = _provenance(task, config, names)
    # compiling does not pay for a few batches
    plain = replace(config.train, mixed_precision="no", compile=False)
    values: dict[str, Mapping[str, Tensor]] = {}
    with running(task.model, params, plain) as active:
        for source in dict.fromkeys(name.partition(".")[0] for name in names):
            kinds = tuple(kind for kind in ("sum", "square") if f"{source}.{kind}" in names)
            work = _pass_of(source, task, config, objective, active.layout.collective_forward)
            totals = _accumulate(active, work, kinds, source, _zeros(task, config))
            values |= {f"{source}.{kind}": total for kind, total in totals.items()}
    return Statistics(values, provenance)


@dataclass(frozen=True)
class _Pass:
    """Batches whose gradients make the statistics of one source."""

    count: int
    """batches"""
    loss: Callable[[int, int], Tensor]
    """(batch, part of it) -> the part's share of the batch's loss"""
    parts: int = 1
    """into which each batch is split to save memory"""
    joint: bool = False
    """whether all processes take their rows of every batch, instead of whole batches in turn"""


@dataclass(frozen=True)
class _Alone:
    """A process that cuts batches for itself."""

    device: torch.device
    num_processes: int = 1
    process_index: int = 0


def _zeros(task: Task, config: TunedConfig) -> Zeros:
    """Where the totals lie; of several processes beside the weights, for there they are added
    up."""
    if config.mask.on_disk:
        return on_disk(task.folder)
    return in_memory if config.train.offload and processes().num_processes == 1 else beside


def _forget_pass(task: Task, mask: MaskConfig) -> _Pass:
    """One pass over the concept's latents (SalUn, eq. 3)."""
    rows, size = task.forget().concept_rows(), mask.batch_size

    def loss(batch: int, part: int) -> Tensor:
        start = batch * size
        generator = task.generator(start)
        return forget_loss(task, rows[start : start + size], mask.guidance, generator)

    return _Pass(-(-len(rows) // size), loss)


def _training_pass(
    task: Task, config: TunedConfig, batches: Batches, loss: Callable[[Any], Tensor], joint: bool
) -> _Pass:
    """The first batches that training will see, in as small parts as there, as far as they have
    rows for them.

    `joint`: under shards, which average the gradients of all processes before they can be squared;
    of rows that do not split evenly each process takes all.
    """
    size, shares = config.train.batch_size, config.train.accumulation * processes().num_processes
    split = joint and size % shares == 0
    whose: Any = processes() if split else _Alone(task.model.device)
    parts = config.train.accumulation if split else math.gcd(size, shares)
    drawn = lru_cache(maxsize=1)(batches)  # the parts of one batch come one after the other

    def part_loss(batch: int, part: int) -> Tensor:
        return loss(cut(drawn(batch), part, parts, whose)) / parts

    return _Pass(config.mask.batches, part_loss, parts, joint)


def _pass_of(
    source: str, task: Task, config: TunedConfig, objective: Objective | None, joint: bool
) -> _Pass:
    """The pass of a source: `forget`, `objective` or `retain`."""
    if source == "forget":
        return _forget_pass(task, config.mask)
    if source == "retain":
        size, seed = config.train.batch_size, task.seed + 1
        batches = row_batches(task, task.retain(), size, seed)
        return _training_pass(task, config, batches, lambda batch: _retain_loss(task, batch), joint)

    if objective is None:
        raise ValueError("statistics of the objective need one")
    loss = objective.loss
    return _training_pass(
        task, config, objective.batches, lambda batch: loss(batch, torch.no_grad)["forget"], joint
    )


def _retain_loss(task: Task, batch: PromptedRows) -> Tensor:
    rows, prompts = batch
    return denoising(task.predict(rows, prompts), rows.target)


def _accumulate(
    active: ActiveWeights, work: _Pass, kinds: tuple[str, ...], source: str, zeros: Zeros
) -> dict[str, dict[str, Tensor]]:
    """Gradients of all batches, shared by the processes."""
    totals = Accumulator(active.params, active.layout, kinds, zeros)
    every = range(work.count)
    mine = [(batch, True) for batch in every]
    if not work.joint:
        mine = round_robin(every, active.layout.collective_forward)

    what = f"{source} saliency" if source != "forget" else "saliency"
    with (
        torch.random.fork_rng(devices=[]),
        gradients_on(active.params),
        # of a batch in parts, the gradient is summed up before it is squared
        totals.collecting() if work.parts == 1 else nullcontext(),
        progress(what, "batch", len(mine)) as bar,
    ):
        for batch, counts in mine:
            torch.manual_seed(batch)
            for part in range(work.parts):
                loss = work.loss(batch, part)
                (loss if counts else 0 * loss).backward()
            totals.add()
            bar.update()
    return totals.finish(shared=not work.joint)


def _given(task: Task, config: TunedConfig) -> Statistics:
    """What the statistics of `mask.saliency` hold of the scope."""
    path = Path(str(config.mask.saliency))
    given = Statistics.load(path)
    _check_given(task, path, given.metadata)
    return given.within(config.scope, list(task.weights(config.scope)), path)


def check_files(task: Task, config: TunedConfig) -> None:
    """Refuse, before latents are made, a mask or statistics that the user names and that are not of
    this erasure; of statistics, which are as large as the weights, the header alone is read."""
    for path, kind in ((config.mask.file, "mask"), (config.mask.saliency, "saliency")):
        if path:
            _check_given(task, Path(path), load_metadata(path, kind))


def _check_given(task: Task, path: Path, metadata: Mapping[str, str]) -> None:
    """Refuse a file that the user names if it is of another base or concept; of what it does not
    say, it may be."""
    about = describe(task)
    known = {key: about[key] for key in ("base_fingerprint", "concepts") if key in metadata}
    check_artifact(path, metadata, known, "compute one for this erasure")


def _provenance(task: Task, config: TunedConfig, names: tuple[str, ...]) -> dict[str, str]:
    """Everything that these statistics depend on."""
    sources = {name.partition(".")[0] for name in names}
    if "forget" in sources:
        task.forget()
    if "retain" in sources:
        task.retain()
    about = {"scope": config.scope, "saliency": ", ".join(names)}
    if "forget" in sources:
        about |= {
            "loss": f"forgetting, guidance {config.mask.guidance:g}",
            "saliency_batch_size": str(config.mask.batch_size),
        }
    if sources & {"objective", "retain"}:
        about["batches"] = f"{config.mask.batches} of {config.train.batch_size}"
    if "objective" in sources:
        settings = asdict(config)
        del settings["train"], settings["mask"]
        about["objective"] = json.dumps({"kind": type(config).__name__, **settings}, sort_keys=True)
    known = describe(task)
    used = {"forget": bool(sources & {"forget", "objective"}), "retain": "retain" in sources}
    return {key: value for key, value in known.items() if used.get(key, True)} | about


def forget_loss(task: Task, rows: Tensor, guidance: float, generator: torch.Generator) -> Tensor:
    """Minus the denoising error of the guided prediction on these forget rows."""
    forget = task.forget()
    seen = draw_rows(task.model, forget, rows, generator)
    prompts = texts_of(forget.prompts, rows) + [""] * len(rows)
    conditional, unconditional = task.predict(seen.cat(seen), prompts).chunk(2)
    return forgetting(guided(conditional, unconditional, guidance), seen.target)
