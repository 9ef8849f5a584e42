"""The mask of an erasure: computed from the concept's own gradients, read from a file, or a control."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from erase.claims import check_artifact
from erase.latents.batches import noised
from erase.losses import forgetting, guided
from erase.mask import Saliency, SaliencyAccumulator, SaliencyMask
from erase.parallel.processes import exists_on_all, processes, progress, round_robin
from erase.task import Task, describe
from erase.training.config import TunedConfig
from erase.training.running import running
from erase.training.trainable import gradients_on


def choose_mask(task: Task, config: TunedConfig) -> SaliencyMask | None:
    """The mask that the configuration asks for; None: every weight of the scope may change.

    A saliency is as large as the weights: it is written to the task's folder as soon as it is there, found again by a
    resumed run, and not kept in memory while training.

    Raises:
        ErasureError: a file of another base or concept.
    """
    mask = config.mask
    if mask.file:
        given = SaliencyMask.load(mask.file)
        _check_given(task, Path(mask.file), given.metadata)
        return given
    if mask.rule == "none" or (mask.density == 1 and mask.rule != "inverted"):
        return None
    if mask.rule == "random":
        about = describe(task)
        provenance = {key: about[key] for key in ("base_fingerprint", "concepts")}
        return SaliencyMask.random(task.weights(config.scope), mask.density, task.seed, provenance)
    cut = find_saliency(task, config).cut(mask.density)
    return cut.inverted() if mask.rule == "inverted" else cut


def find_saliency(task: Task, config: TunedConfig) -> Saliency:
    """The saliency of `mask.saliency`, of an earlier start of this run, or computed.

    Raises:
        ErasureError: a saliency of another base or concept; in the task's folder, also one that this run would not compute itself.
    """
    if config.mask.saliency:
        saliency = Saliency.load(config.mask.saliency)
        _check_given(task, Path(config.mask.saliency), saliency.metadata)
        return saliency
    kept = task.folder / "saliency.safetensors" if task.folder else None
    if kept and exists_on_all(kept):
        saliency = Saliency.load(kept)
        check_artifact(kept, saliency.metadata, _provenance(task, config), "delete it to compute it again")
        return saliency
    saliency = compute_saliency(task, config)
    if kept and processes().is_main_process:
        saliency.save(kept)
    return saliency


def _check_given(task: Task, path: Path, metadata: Mapping[str, str]) -> None:
    """Refuse a file that the user names if it is of another base or concept; of what it does not say, it may be."""
    about = describe(task)
    known = {key: about[key] for key in ("base_fingerprint", "concepts") if key in metadata}
    check_artifact(path, metadata, known, "compute one for this erasure")


def _provenance(task: Task, config: TunedConfig) -> dict[str, str]:
    """Everything that a saliency depends on."""
    task.forget()
    about = describe(task)
    return {
        **{key: about[key] for key in ("base_fingerprint", "seed", "concepts", "forget")},
        "loss": f"forgetting, guidance {config.mask.guidance:g}",
        "scope": config.scope,
        "saliency_batch_size": str(config.mask.batch_size),
    }


def compute_saliency(task: Task, config: TunedConfig) -> Saliency:
    """|sum over batches of the forget loss's gradient|, one pass over the forget latents, both guidance branches live (eq. 3)."""
    params, rows, size = task.weights(config.scope), task.forget().concept_rows(), config.mask.batch_size
    # in float32 whatever the training's precision, for small gradients decide the ranking; and compiling does not pay for a few batches
    plain = replace(config.train, mixed_precision="no", compile=False)
    with running(task.model, params, plain) as active:
        accumulator = SaliencyAccumulator(active.params, active.layout)
        mine = round_robin(range(0, len(rows), size), active.layout.collective_forward)
        with gradients_on(active.params), accumulator.collecting(), progress("saliency", "batch", len(mine)) as bar:
            for start, counts in mine:
                loss = forget_loss(task, rows[start : start + size], config.mask.guidance, task.generator(start))
                (loss if counts else 0 * loss).backward()
                bar.update()
        active.layout.add_up(accumulator.sums.values())  # signed, before the absolute value
        return accumulator.saliency(_provenance(task, config))


def forget_loss(task: Task, rows: Tensor, guidance: float, generator: torch.Generator) -> Tensor:
    """Minus the denoising error of the guided prediction on these forget rows."""
    forget = task.forget()
    latents = forget.draw(rows, generator)
    t, noise = forget.draw_noise(rows, task.model.timesteps, generator)
    seen = noised(task.model, latents, noise, t)
    prompts = [forget.prompts[row] for row in rows.tolist()] + [""] * len(rows)
    conditional, unconditional = task.predict(seen.cat(seen), prompts).chunk(2)
    return forgetting(guided(conditional, unconditional, guidance), seen.target)
