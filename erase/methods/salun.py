"""SalUn: saliency unlearning (Fan et al., ICLR 2024, https://arxiv.org/abs/2310.12508).

The weights that the forget loss is most sensitive to are found once (the mask); then only they are fine-tuned, so that the
forget prompt's prediction becomes the anchor prompt's, while retained prompts keep theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from erase.execution import running
from erase.latents import LatentSet
from erase.losses import forgetting, guided
from erase.mask import Saliency, SaliencyAccumulator, SaliencyMask, check_density
from erase.methods import Edit, Method
from erase.models import DiffusionModel
from erase.processes import found, progress, turns
from erase.remapping import Job, RemapConfig, frozen_targets, loss_function, make_batch, make_job
from erase.train_config import TrainConfig
from erase.training import fit, gradients_on
from prompts.concepts import ConceptSpec
from prompts.errors import COUNT, FINITE, ErasureError, check_names, check_ranges

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
        check_density(self.density)
        if self.mask_file and (self.saliency_file or self.mask != "saliency"):
            idle = "saliency_file" if self.saliency_file else f"mask {self.mask}"
            raise ErasureError(f"mask_file is taken as it is, so {idle} would do nothing; leave one of them out")
        if self.saliency_file and self.mask in ("random", "none"):
            raise ErasureError(f"mask {self.mask} needs no saliency, so saliency_file would do nothing; leave one of them out")
        for given in ("mask_file", "saliency_file"):
            if (file := getattr(self, given)) and not Path(file).is_file():
                raise ErasureError(f"{given} {file} is not there")


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
    job = make_job(model, forget, retain, config, seed, accelerator)
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
    )
    return Edit(fitted.values, fitted.losses, mask)


def choose_mask(job: Job[SalUnConfig], folder: Path | None = None) -> SaliencyMask | None:
    """The mask that the configuration asks for; None: every weight of the scope may change.

    A saliency is as large as the weights: it is written to `folder` as soon as it is there, found again by a resumed run, and not
    kept in memory while training.
    """
    config = job.config
    if config.mask_file:
        return SaliencyMask.load(config.mask_file)
    if config.mask == "none":
        return None
    if config.mask == "random":
        provenance = {"base_fingerprint": job.model.fingerprint}
        return SaliencyMask.random(job.params, config.density, job.seed, provenance)
    mask = find_saliency(job, folder).cut(config.density)
    return mask.inverted() if config.mask == "inverted" else mask


def find_saliency(job: Job[SalUnConfig], folder: Path | None) -> Saliency:
    """The saliency of `saliency_file`, of an earlier start of this run, or computed."""
    kept = folder / "saliency.safetensors" if folder else None
    known = job.config.saliency_file or (kept if kept and found(kept) else None)
    if known:
        return Saliency.load(known)
    saliency = compute_saliency(job)
    if kept and job.accelerator.is_main_process:
        saliency.save(kept)
    return saliency


def compute_saliency(job: Job[SalUnConfig]) -> Saliency:
    """|sum over batches of the forget loss's gradient|, one pass over the forget latents, both guidance branches live (eq. 3)."""
    rows, size = job.forget.concept_rows(), job.config.saliency_batch_size
    # in float32 whatever the training's precision: small gradients decide the ranking
    config = replace(job.config.train, mixed_precision="no", compile=False)  # a few batches do not repay compiling
    about = f"forgetting, guidance {job.config.saliency_guidance:g}"
    with running(job.model, job.params, config) as standing:
        accumulator = SaliencyAccumulator(standing.params, standing.layout)
        mine = turns(range(0, len(rows), size), standing.layout.in_step)
        with gradients_on(standing.params), accumulator.collecting(), progress("saliency", "batch", len(mine)) as bar:
            for start, counts in mine:
                loss = forget_loss(job, rows[start : start + size], job.generator(start))
                (loss if counts else 0 * loss).backward()
                bar.update()
        standing.layout.add_up(accumulator.sums.values())  # signed, before the absolute value
        return accumulator.saliency(
            {"base_fingerprint": job.model.fingerprint, "loss": about, "scope": job.config.scope, "seed": str(job.seed)}
        )


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
    "salun-paper": Method(
        "salun-paper",
        PAPER,
        SalUnConfig(
            alpha=0.1,
            anchor_from="current",
            retain_target="noise",
            share_latents=False,
            anchor_latents=0.0,
            retain_dropout=0.0,
            shuffle=False,
            train=TrainConfig(steps=100, lr=1e-5, batch_size=8),
        ),
        compute,
    ),
}
