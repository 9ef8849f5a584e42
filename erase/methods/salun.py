"""SalUn: saliency unlearning (Fan et al., ICLR 2024, https://arxiv.org/abs/2310.12508).

The weights that the forget loss is most sensitive to are found once (the mask); then only they are fine-tuned, so that the
forget prompt's prediction becomes the anchor prompt's, while retained prompts keep theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from erase.claims import check_artifact
from erase.latents.prepare import LatentSet
from erase.losses import forgetting, guided
from erase.mask import Saliency, SaliencyAccumulator, SaliencyMask, check_density
from erase.methods import Edit, Method
from erase.models import DiffusionModel
from erase.objectives.remap import Job, RemapConfig, frozen_targets, loss_function, make_batch, make_job
from erase.parallel.processes import exists_on_all, progress, round_robin
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import COUNT, FINITE, ErasureError, check_names, check_ranges
from erase.training.config import TrainConfig
from erase.training.loop import fit, gradients_on
from erase.training.running import running

CONTROLS = ("saliency", "random", "inverted", "none")


@dataclass
class SalUnConfig(RemapConfig):
    """Settings of SalUn."""

    density: float = 0.5
    """fraction of the scope's weights that may change: the most salient ones"""
    mask: str = "saliency"
    """which weights the mask keeps: saliency; or a control: random, inverted, none"""
    mask_file: str | None = None
    """a saved mask to use instead of computing one"""
    saliency_file: str | None = None
    """a saved saliency to cut at `density` instead of computing it again"""
    saliency_guidance: float = 7.5
    """g of (1 + g) eps_c - g eps_null in the forget loss; 7.5 is diffusers' guidance_scale 8.5"""
    saliency_batch_size: int = 8
    """forget latents per gradient of the saliency; gradients of all batches are summed"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self, {"mask": CONTROLS})
        check_ranges(self, {"saliency_batch_size": COUNT, "saliency_guidance": FINITE})
        check_ranges(self, {"saliency_guidance": (-1, 1000)})  # -1: the unconditional branch alone
        check_density(self.density)
        if self.mask_file and (self.saliency_file or self.mask != "saliency"):
            idle = "saliency_file" if self.saliency_file else f"mask {self.mask}"
            raise ErasureError(f"mask_file is taken as it is, so {idle} would do nothing; leave one of them out")
        if self.saliency_file and self.mask in ("random", "none"):
            raise ErasureError(f"mask {self.mask} needs no saliency, so saliency_file would do nothing; leave one of them out")
        for given in ("mask_file", "saliency_file"):
            if (file := getattr(self, given)) and not Path(file).is_file():
                raise ErasureError(f"{given} {file} is not there")


@dataclass
class SalUnPaperConfig(SalUnConfig):
    """Settings of SalUn as they were published; a type of their own, so that nothing else goes by their name."""

    alpha: float = 0.1
    anchor_from: str = "current"
    retain_target: str = "noise"
    share_latents: bool = False
    anchor_latents: float = 0.0
    retain_dropout: float = 0.0
    shuffle: bool = False
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=100, lr=1e-5, batch_size=8))


def compute(
    model: DiffusionModel,
    concepts: list[ConceptSpec],
    forget: LatentSet,
    retain: LatentSet,
    config: SalUnConfig,
    *,
    seed: int,
    accelerator: Accelerator,
    folder: Path | None = None,
) -> Edit:
    """Erase `concepts` from `model`, which is left as it was found.

    Raises:
        ErasureError: an unknown option, a mask of another base, a loss that is not finite.
    """
    job = make_job(model, forget, retain, config, seed, accelerator, concepts)
    mask = choose_mask(job, folder)
    job = replace(job, targets=frozen_targets(job))
    fitted = fit(
        model,
        job.params,
        lambda step, part: make_batch(job, step, part),
        loss_function(job),
        config.train,
        mask,
        accelerator=accelerator,
        checkpoint=folder / "training.pt" if folder else None,
        about=job.about,
    )
    return Edit(fitted.values, fitted.losses, mask)


def choose_mask(job: Job[SalUnConfig], folder: Path | None = None) -> SaliencyMask | None:
    """The mask that the configuration asks for; None: every weight of the scope may change.

    A saliency is as large as the weights: it is written to `folder` as soon as it is there, found again by a resumed run, and not
    kept in memory while training.
    """
    config = job.config
    if config.mask_file:
        mask = SaliencyMask.load(config.mask_file)
        _check_given(job, Path(config.mask_file), mask.metadata)
        return mask
    if config.mask == "none":
        return None
    if config.mask == "random":
        provenance = {key: job.about[key] for key in ("base_fingerprint", "concepts") if key in job.about}
        return SaliencyMask.random(job.params, config.density, job.seed, provenance)
    mask = find_saliency(job, folder).cut(config.density)
    return mask.inverted() if config.mask == "inverted" else mask


def find_saliency(job: Job[SalUnConfig], folder: Path | None) -> Saliency:
    """The saliency of `saliency_file`, of an earlier start of this run, or computed.

    Raises:
        ErasureError: a saliency of another base or concept; in `folder`, also one that this run would not compute itself.
    """
    if given := job.config.saliency_file:
        saliency = Saliency.load(given)
        _check_given(job, Path(given), saliency.metadata)
        return saliency
    kept = folder / "saliency.safetensors" if folder else None
    if kept and exists_on_all(kept):
        saliency = Saliency.load(kept)
        check_artifact(kept, saliency.metadata, _provenance(job), "delete it to compute it again")
        return saliency
    saliency = compute_saliency(job)
    if kept and job.accelerator.is_main_process:
        saliency.save(kept)
    return saliency


def _check_given(job: Job[SalUnConfig], path: Path, metadata: Mapping[str, str]) -> None:
    """Refuse a file that the user names if it is of another base or concept; of what it does not say, it may be."""
    description = {key: job.about[key] for key in ("base_fingerprint", "concepts") if key in metadata and key in job.about}
    check_artifact(path, metadata, description, "compute one for this erasure")


def _provenance(job: Job[SalUnConfig]) -> dict[str, str]:
    """Everything that a saliency depends on."""
    config = job.config
    return {
        **{key: job.about[key] for key in ("base_fingerprint", "seed", "concepts", "forget") if key in job.about},
        "loss": f"forgetting, guidance {config.saliency_guidance:g}",
        "scope": config.scope,
        "saliency_batch_size": str(config.saliency_batch_size),
    }


def compute_saliency(job: Job[SalUnConfig]) -> Saliency:
    """|sum over batches of the forget loss's gradient|, one pass over the forget latents, both guidance branches live (eq. 3)."""
    rows, size = job.forget.concept_rows(), job.config.saliency_batch_size
    # in float32 whatever the training's precision: small gradients decide the ranking
    config = replace(job.config.train, mixed_precision="no", compile=False)  # a few batches do not repay compiling
    with running(job.model, job.params, config) as active:
        accumulator = SaliencyAccumulator(active.params, active.layout)
        mine = round_robin(range(0, len(rows), size), active.layout.collective_forward)
        with gradients_on(active.params), accumulator.collecting(), progress("saliency", "batch", len(mine)) as bar:
            for start, counts in mine:
                loss = forget_loss(job, rows[start : start + size], job.generator(start))
                (loss if counts else 0 * loss).backward()
                bar.update()
        active.layout.add_up(accumulator.sums.values())  # signed, before the absolute value
        return accumulator.saliency(_provenance(job))


def forget_loss(job: Job[SalUnConfig], rows: Tensor, generator: torch.Generator) -> Tensor:
    """Minus the denoising error of the guided prediction on these forget rows."""
    model, device = job.model, job.model.device
    x0 = job.forget.draw(rows, generator)
    t, noise = job.forget.draw_noise(rows, model.timesteps, generator)
    x0, t, noise = x0.to(device), t.to(device), noise.to(device)
    cond = job.embed([job.forget.prompts[i] for i in rows]).cat(job.embed([""] * len(rows)))
    both = model.predict(model.add_noise(x0, noise, t).repeat(2, 1, 1, 1), t.repeat(2), cond)
    conditional, unconditional = both.chunk(2)
    return forgetting(guided(conditional, unconditional, job.config.saliency_guidance), model.target(x0, noise, t))


PAPER = "https://arxiv.org/abs/2310.12508"
METHODS = {
    "salun": Method("salun", PAPER, SalUnConfig(), compute),
    "salun-paper": Method("salun-paper", PAPER, SalUnPaperConfig(), compute),
}
