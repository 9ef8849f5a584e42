"""The mask of an erasure: computed from gradients by a rule, read from a file, or a control."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erase.claims import check_artifact
from erase.latents.batches import Rows, draw_rows
from erase.latents.latent_set import epoch_rows
from erase.losses import denoising, forgetting, guided
from erase.mask import Saliency, SaliencyMask
from erase.parallel.layout import ActiveWeights
from erase.parallel.processes import exists_on_all, processes, progress, round_robin
from erase.task import Task, describe
from erase.training.config import MaskConfig, TunedConfig
from erase.training.loop import Batches, LossFn, cut
from erase.training.rules import RULES, scores
from erase.training.running import running
from erase.training.statistics import AGAIN, Accumulator, Statistics
from erase.training.trainable import gradients_on


@dataclass(frozen=True)
class Objective:
    """The training objective of a method: the gradients of its forget term tell how training will
    change each weight."""

    loss: LossFn
    batches: Batches


def choose_mask(
    task: Task, config: TunedConfig, objective: Objective | None = None
) -> SaliencyMask | None:
    """The mask that the configuration asks for; None: every weight of the scope may change.

    Statistics are as large as the weights: they are written to the task's folder as soon as they
        are there, found again by a
    resumed run, and not kept in memory while training.

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
    if mask.rule == "none" or (mask.density == 1 and mask.rule != "inverted"):
        return None

    weights = task.weights(config.scope)
    if mask.rule == "random":
        about = describe(task)
        provenance = {key: about[key] for key in ("base_fingerprint", "concepts")}
        return SaliencyMask.random(weights, mask.density, task.seed, provenance)

    rule = ranking_of(mask)
    saliency = scores(find_statistics(task, config, RULES[rule].needs, objective), rule, weights)
    if mask.rule == "lowest":
        return saliency.lowest(mask.density)
    salient = saliency.cut(mask.density, mask.allocation)
    if mask.rule == "matched-random":
        return salient.matched_random(task.seed)
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
        ErasureError: those of another base or concept; in the task's folder, also ones that this
            run would not compute itself.
    """
    if config.mask.saliency:
        given = Statistics.load(config.mask.saliency)
        _check_given(task, Path(config.mask.saliency), given.metadata)
        return given
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
            steps = _steps_of(source, task, config, objective, active.layout.collective_forward)
            totals = _accumulate(
                active, steps, Accumulator(active.params, active.layout, kinds), source
            )
            values |= {f"{source}.{kind}": total for kind, total in totals.items()}
    return Statistics(values, provenance)


class _Steps:
    """Losses of one source, batch by batch, each in parts."""

    parts = 1
    joint = False
    """whether all processes take their rows of every batch, instead of whole batches in turn"""

    def __len__(self) -> int:
        raise NotImplementedError

    def loss(self, index: int, part: int) -> Tensor:
        raise NotImplementedError


class _Forget(_Steps):
    """Minus the denoising error of the guided prediction, one pass over the concept's latents, both
    branches live (SalUn, eq. 3)."""

    def __init__(self, task: Task, config: TunedConfig) -> None:
        self.task, self.config, self.rows = task, config.mask, task.forget().concept_rows()

    def __len__(self) -> int:
        return -(-len(self.rows) // self.config.batch_size)

    def loss(self, index: int, part: int) -> Tensor:
        start = index * self.config.batch_size
        rows = self.rows[start : start + self.config.batch_size]
        return forget_loss(self.task, rows, self.config.guidance, self.task.generator(start))


class _Trained(_Steps):
    """The objective's forget term on the first batches of training, or the denoising loss on retain
    latents drawn likewise."""

    def __init__(
        self, task: Task, config: TunedConfig, objective: Objective | None, joint: bool
    ) -> None:
        """`joint`: under shards, which average the gradients of all processes before they can be
        squared."""
        self.task, self.config, self.objective, self.joint = task, config, objective, joint
        self._shares: Any = processes() if joint else _Alone(task.model.device)
        self.parts = config.train.accumulation  # as few rows at a time as in training
        if not joint:
            self.parts *= processes().num_processes
        self._batch: tuple[int, object] = (-1, None)

    def __len__(self) -> int:
        return self.config.mask.batches

    def loss(self, index: int, part: int) -> Tensor:
        if self._batch[0] != index:
            drawn = self.objective.batches(index) if self.objective else self._retained(index)
            self._batch = index, drawn
        share = cut(self._batch[1], part, self.parts, self._shares)
        if self.objective:
            return self.objective.loss(share, torch.no_grad)["forget"] / self.parts
        rows, prompts = share
        return denoising(self.task.predict(rows, prompts), rows.target) / self.parts

    def _retained(self, index: int) -> tuple[Rows, list[str]]:
        retain, size = self.task.retain(), self.config.train.batch_size
        rows, generator = (
            epoch_rows(len(retain), index * size, size, self.task.seed + 1),
            self.task.generator(index),
        )
        return draw_rows(self.task.model, retain, rows, generator), [
            retain.prompts[row] for row in rows.tolist()
        ]


@dataclass(frozen=True)
class _Alone:
    """A process that cuts batches for itself."""

    device: torch.device
    num_processes: int = 1
    process_index: int = 0


def _steps_of(
    source: str, task: Task, config: TunedConfig, objective: Objective | None, joint: bool
) -> _Steps:
    if source == "forget":
        return _Forget(task, config)
    if source == "objective" and objective is None:
        raise ValueError("statistics of the objective need one")
    return _Trained(task, config, objective if source == "objective" else None, joint)


def _accumulate(
    active: ActiveWeights, steps: _Steps, totals: Accumulator, source: str
) -> dict[str, dict[str, Tensor]]:
    """Gradients of all batches, shared by the processes."""
    every = range(len(steps))
    mine = (
        [(index, True) for index in every]
        if steps.joint
        else round_robin(every, active.layout.collective_forward)
    )
    what = f"{source} saliency" if source != "forget" else "saliency"
    with (
        torch.random.fork_rng(devices=[]),
        gradients_on(active.params),
        progress(what, "batch", len(mine)) as bar,
    ):
        for index, counts in mine:
            torch.manual_seed(index)
            _add_batch(steps, index, 1.0 if counts else 0.0, totals)
            bar.update()
    return totals.finish(shared=not steps.joint)


def _add_batch(steps: _Steps, index: int, factor: float, totals: Accumulator) -> None:
    """One batch's gradient. Of a batch in parts it is summed up before it is squared."""
    if steps.parts == 1:
        with totals.collecting():
            _scaled(steps.loss(index, 0), factor).backward()
        return
    for part in range(steps.parts):
        _scaled(steps.loss(index, part), factor).backward()
    totals.add()


def _scaled(loss: Tensor, factor: float) -> Tensor:
    return loss if factor == 1 else factor * loss


def _check_given(task: Task, path: Path, metadata: Mapping[str, str]) -> None:
    """Refuse a file that the user names if it is of another base or concept; of what it does not
    say, it may be."""
    about = describe(task)
    known = {key: about[key] for key in ("base_fingerprint", "concepts") if key in metadata}
    check_artifact(path, metadata, known, "compute one for this erasure")


def _provenance(task: Task, config: TunedConfig, names: tuple[str, ...]) -> dict[str, str]:
    """Everything that these statistics depend on."""
    sources = {name.partition(".")[0] for name in names}
    if sources & {"forget", "objective"}:
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
    prompts = [forget.prompts[row] for row in rows.tolist()] + [""] * len(rows)
    conditional, unconditional = task.predict(seen.cat(seen), prompts).chunk(2)
    return forgetting(guided(conditional, unconditional, guidance), seen.target)
