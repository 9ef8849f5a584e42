"""SalUn: saliency unlearning (Fan et al., ICLR 2024, https://arxiv.org/abs/2310.12508).

The weights that the forget loss is most sensitive to are found once (the mask); then only they are fine-tuned, so that the
forget prompt's prediction becomes the anchor prompt's, while retained prompts keep theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from erase.execution import running
from erase.latents import LatentSet, PromptCache, epoch_rows
from erase.losses import denoising, forgetting, guided, remap
from erase.mask import Saliency, SaliencyAccumulator, SaliencyMask
from erase.methods import Edit, Method
from erase.models import Cond, DiffusionModel
from erase.processes import found, in_shares, progress, reduce_all
from erase.scopes import select
from erase.trainable import Frozen
from erase.training import LossFn, TrainConfig, fit, gradients_on
from prompts.concepts import ConceptSpec
from prompts.errors import ErasureError, unknown

CONTROLS = ("saliency", "random", "inverted", "none")
SOURCES = ("frozen", "current")
RETAIN_TARGETS = ("frozen", "noise")


@dataclass
class SalUnConfig:
    """Settings of SalUn."""

    density: float = 0.5
    """fraction of the scope's weights that may change: the most salient ones"""
    scope: str = "full"
    """where saliency is ranked and weights may change: full, xattn, xattn_kv, selfattn, noxattn, text_encoder, or a pattern"""
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
    alpha: float = 1.0
    """weight of the retain loss"""
    anchor_from: str = "frozen"
    """weights that predict the anchor target: frozen (the base) or current (the reference)"""
    retain_target: str = "frozen"
    """what retain predictions are held to: frozen (the base's prediction) or noise (the reference)"""
    share_latents: bool = True
    """one posterior sample for the forget and the anchor prediction; False draws two, as the reference does (images only)"""
    anchor_latents: float = 0.5
    """fraction of the forget latents that show the anchor: the states that an erased model passes through, where the base would still
    steer back to the concept; 0 is the reference"""
    retain_dropout: float = 0.1
    """fraction of retain latents whose prompt is replaced by the empty one, so that classifier-free guidance keeps its null branch"""
    shuffle: bool = True
    """a new order of the forget latents in each epoch"""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=300, lr=4e-4, schedule="linear", batch_size=8))


@dataclass(frozen=True)
class Batch:
    """Forget and retain rows of one step (or of this process's part of it)."""

    forget: Tensor
    """noisy forget latents, shape (n, c, h, w)"""
    anchor: Tensor
    """what the anchor sees: the same, or noised from its own posterior sample"""
    t: Tensor
    forget_cond: Cond
    anchor_cond: Cond
    retain: Tensor
    retain_t: Tensor
    retain_cond: Cond
    retain_noise_target: Tensor
    """the denoiser's own training target for the retain rows"""
    targets: tuple[Tensor, Tensor] | None = None
    """anchor and retain targets, where they were computed beforehand"""


@dataclass(frozen=True)
class FrozenTargets:
    """What the base predicts at training points that are fixed beforehand: one row each, in the order of the latent sets."""

    anchor: Tensor
    """for the anchor prompts at the forget points"""
    retain: Tensor
    """for the retain prompts at the retain points"""


@dataclass(frozen=True)
class Job:
    """One erasure: everything that its steps draw on."""

    model: DiffusionModel
    params: Mapping[str, nn.Parameter]
    """the scope's parameters"""
    forget: LatentSet
    retain: LatentSet
    embed: PromptCache
    config: SalUnConfig
    seed: int
    accelerator: Accelerator
    targets: FrozenTargets | None = None

    def generator(self, step: int) -> torch.Generator:
        """The random stream of one step: a function of the seed and the step, so that a resumed run draws the same."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)


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


def make_job(
    model: DiffusionModel, forget: LatentSet, retain: LatentSet, config: SalUnConfig, seed: int, accelerator: Accelerator
) -> Job:
    """Check the options, choose the parameters, embed every prompt once."""
    for what, name, options in (
        ("mask", config.mask, CONTROLS),
        ("anchor_from", config.anchor_from, SOURCES),
        ("retain_target", config.retain_target, RETAIN_TARGETS),
    ):
        if name not in options:
            raise unknown(what, name, options)
    params = select(model.parameters(), config.scope)
    if any(name.startswith("text_encoder.") for name in params):
        raise ErasureError(
            "salun trains on cached text embeddings, so it cannot change the text encoder; choose a scope of the UNet"
        )
    retain = _some_dropped(retain, config.retain_dropout, seed)
    embed = PromptCache(model, ["", *forget.prompts, *(forget.anchors or ()), *retain.prompts])
    return Job(model, params, forget, retain, embed, config, seed, accelerator)


def _some_dropped(retain: LatentSet, share: float, seed: int) -> LatentSet:
    """The empty prompt in place of some: the same rows throughout the run, so that their targets can be known beforehand."""
    dropped = torch.rand(len(retain), generator=torch.Generator().manual_seed(seed)) < share
    prompts = tuple("" if drop else prompt for prompt, drop in zip(retain.prompts, dropped, strict=True))
    return replace(retain, prompts=prompts)


def choose_mask(job: Job, folder: Path | None = None) -> SaliencyMask | None:
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


def find_saliency(job: Job, folder: Path | None) -> Saliency:
    """The saliency of `saliency_file`, of an earlier start of this run, or computed."""
    kept = folder / "saliency.safetensors" if folder else None
    known = job.config.saliency_file or (kept if kept and found(kept) else None)
    if known:
        return Saliency.load(known)
    saliency = compute_saliency(job)
    if kept and job.accelerator.is_main_process:
        saliency.save(kept)
    return saliency


def compute_saliency(job: Job) -> Saliency:
    """|sum over batches of the forget loss's gradient|, one pass over the forget latents, both guidance branches live (eq. 3)."""
    accumulator, size = SaliencyAccumulator(job.params), job.config.saliency_batch_size
    workers, me = job.accelerator.num_processes, job.accelerator.process_index
    rows = job.forget.concept_rows()
    starts = range(0, len(rows), size)[me::workers]
    # in float32 whatever the training's precision: small gradients decide the ranking
    config = replace(job.config.train, mixed_precision="no", compile=False)  # a few batches do not repay compiling
    bar = progress("saliency", "batch", len(starts))
    with running(job.model, job.params, config), gradients_on(job.params), accumulator.collecting(), bar:
        for start in starts:
            forget_loss(job, rows[start : start + size], job.generator(start)).backward()
            bar.update()
    reduce_all(accumulator.sums.values(), "sum")  # signed, before the absolute value
    loss = f"forgetting, guidance {job.config.saliency_guidance:g}"
    return accumulator.saliency(
        {"base_fingerprint": job.model.fingerprint, "loss": loss, "scope": job.config.scope, "seed": str(job.seed)}
    )


def forget_loss(job: Job, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Minus the denoising error of the guided prediction on these forget rows."""
    model, device = job.model, job.model.device
    x0 = job.forget.draw(rows, generator)
    t, noise = job.forget.draw_noise(rows, model.timesteps, generator)
    x0, t, noise = x0.to(device), t.to(device), noise.to(device)
    cond = job.embed([job.forget.prompts[i] for i in rows]).cat(job.embed([""] * len(rows)))
    both = model.predict(model.add_noise(x0, noise, t).repeat(2, 1, 1, 1), t.repeat(2), cond)
    conditional, unconditional = both.chunk(2)
    return forgetting(guided(conditional, unconditional, job.config.saliency_guidance), model.target(x0, noise, t))


def make_batch(job: Job, step: int, part: int) -> Batch:
    """Rows, timesteps and noise of one part of one step, drawn for the whole step and then cut to this process and part."""
    model, forget, retain, config = job.model, job.forget, job.retain, job.config
    size, generator = config.train.batch_size, job.generator(step)
    kept = epoch_rows(len(retain), step * size, size, job.seed + 1)
    x_retain = retain.draw(kept, generator)
    t_retain, noise_retain = retain.draw_noise(kept, model.timesteps, generator)
    gone = epoch_rows(len(forget), step * size, size, job.seed, config.shuffle)
    x_forget = forget.draw(gone, generator)
    x_anchor = x_forget if config.share_latents else forget.draw(gone, generator)
    t, noise = forget.draw_noise(gone, model.timesteps, generator)

    mine = _share(size, part, config.train.accumulation, job.accelerator)
    known = (job.targets.anchor[gone[mine]], job.targets.retain[kept[mine]]) if job.targets else None
    x_retain, t_retain, noise_retain, x_forget, x_anchor, t, noise = (
        tensor[mine].to(model.device) for tensor in (x_retain, t_retain, noise_retain, x_forget, x_anchor, t, noise)
    )
    anchors = forget.anchors or forget.prompts
    return Batch(
        forget=model.add_noise(x_forget, noise, t),
        anchor=model.add_noise(x_anchor, noise, t),
        t=t,
        forget_cond=job.embed([forget.prompts[i] for i in gone[mine]]),
        anchor_cond=job.embed([anchors[i] for i in gone[mine]]),
        retain=model.add_noise(x_retain, noise_retain, t_retain),
        retain_t=t_retain,
        retain_cond=job.embed([retain.prompts[i] for i in kept[mine]]),
        retain_noise_target=model.target(x_retain, noise_retain, t_retain),
        targets=(known[0].to(model.device), known[1].to(model.device)) if known else None,
    )


@torch.no_grad()
def frozen_targets(job: Job) -> FrozenTargets | None:
    """The base's predictions at all training points, where these are fixed (trajectories) and it is the base that is asked."""
    config, forget, retain = job.config, job.forget, job.retain
    if forget.t is None or retain.t is None or not config.anchor_from == config.retain_target == "frozen":
        return None
    anchor = _predict_points(job, forget, forget.anchors or forget.prompts, "anchor targets")
    return FrozenTargets(anchor, _predict_points(job, retain, retain.prompts, "retain targets"))


def _predict_points(job: Job, points: LatentSet, prompts: tuple[str, ...], what: str) -> Tensor:
    """Predictions at the fixed points of a set, in float32 on the CPU."""
    model, generator = job.model, torch.Generator()  # of which nothing is drawn: the points have noise and timesteps of their own

    def predict(rows: range) -> Tensor:
        chosen = torch.tensor(rows)
        t, noise = (tensor.to(model.device) for tensor in points.draw_noise(chosen, model.timesteps, generator))
        xt = model.add_noise(points.latents[chosen].to(model.device), noise, t)
        return model.predict(xt, t, job.embed([prompts[row] for row in rows])).float().cpu()

    with running(job.model, job.params, replace(job.config.train, compile=False)), job.accelerator.autocast():
        return torch.cat(in_shares(len(points), 2 * job.config.train.batch_size, predict, what, "point"))


def loss_function(job: Job) -> LossFn:
    """`remap + alpha * retain` (eq. 6). Forget and retain rows go through the denoiser together; so do the teacher's."""
    model, config = job.model, job.config

    @torch.no_grad()
    def targets(batch: Batch, frozen: Frozen) -> tuple[Tensor, Tensor]:
        """Anchor and retain targets, each by the frozen base or not, as configured."""
        if batch.targets:
            return batch.targets
        if config.anchor_from == config.retain_target == "frozen":
            with frozen():
                return _predict_together(model, batch.anchor, batch.t, batch.anchor_cond, batch)
        with frozen() if config.anchor_from == "frozen" else nullcontext():
            anchor = model.predict(batch.anchor, batch.t, batch.anchor_cond)
        if config.retain_target == "noise":
            return anchor, batch.retain_noise_target
        with frozen():
            return anchor, model.predict(batch.retain, batch.retain_t, batch.retain_cond)

    def loss(batch: Batch, frozen: Frozen) -> Tensor:
        anchor, kept = targets(batch, frozen)
        forgot, retained = _predict_together(model, batch.forget, batch.t, batch.forget_cond, batch)
        return remap(forgot, anchor) + config.alpha * denoising(retained, kept)

    return loss


def _predict_together(model: DiffusionModel, xt: Tensor, t: Tensor, cond: Cond, batch: Batch) -> tuple[Tensor, Tensor]:
    """Predictions for `xt` and for the batch's retain rows, in one pass."""
    both = model.predict(torch.cat([xt, batch.retain]), torch.cat([t, batch.retain_t]), cond.cat(batch.retain_cond))
    return both[: len(xt)], both[len(xt) :]


def _share(size: int, part: int, parts: int, accelerator: Accelerator) -> slice:
    """This process's rows of this part; every share is equally long, so that means of shares average to the mean of all."""
    shares = parts * accelerator.num_processes
    if size % shares:
        raise ErasureError(
            f"batch_size {size} cannot be split evenly into {parts} accumulated parts on {accelerator.num_processes} processes"
        )
    width = size // shares
    start = (accelerator.process_index * parts + part) * width
    return slice(start, start + width)


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
