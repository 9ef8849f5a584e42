"""The remap loss: a forget prompt's prediction becomes its anchor's, retained prompts keep theirs (SalUn, Fan et al., ICLR 2024, eq. 6).

What one erasure by it needs: its settings, the rows of each step, their targets, the loss. Which weights may change is the method's affair.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Generic, TypeVar

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn

from erase.checksum import sha256_of
from erase.claims import flat
from erase.latents.prepare import LatentSet, PromptCache, epoch_rows
from erase.losses import denoising, remap
from erase.models import Cond, DiffusionModel
from erase.models.scopes import select_trainable
from erase.parallel.processes import in_shares
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import FRACTION, check_names, check_ranges
from erase.training.config import TrainConfig
from erase.training.loop import LossFn
from erase.training.running import running
from erase.training.trainable import Frozen

SOURCES = ("frozen", "current")
RETAIN_TARGETS = ("frozen", "noise")


@dataclass
class RemapConfig:
    """Settings of training by the remap loss."""

    scope: str = "full"
    """where saliency is ranked and weights may change: full (the whole denoiser), xattn, xattn_kv, selfattn, noxattn, or a pattern of names"""
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
    steer back to the concept; 0 is the reference. Images of a folder all show the concept"""
    retain_dropout: float = 0.1
    """fraction of retain latents whose prompt is replaced by the empty one, so that classifier-free guidance keeps its null branch"""
    shuffle: bool = True
    """a new order of the forget latents in each epoch"""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=300, lr=4e-4, schedule="linear", batch_size=8))

    def __post_init__(self) -> None:
        check_names(self, {"anchor_from": SOURCES, "retain_target": RETAIN_TARGETS})
        check_ranges(self, {"alpha": (0, 1e6), "anchor_latents": FRACTION, "retain_dropout": FRACTION})


C = TypeVar("C", bound=RemapConfig)


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
class Job(Generic[C]):
    """One erasure: everything that its steps draw on."""

    model: DiffusionModel
    params: Mapping[str, nn.Parameter]
    """the scope's parameters"""
    forget: LatentSet
    retain: LatentSet
    embed: PromptCache
    config: C
    seed: int
    accelerator: Accelerator
    targets: FrozenTargets | None = None
    about: Mapping[str, str] = field(default_factory=dict)
    """what its artifacts must agree on: base, seed, concepts, configuration, and digests of the forget and retain latents"""

    def generator(self, step: int) -> torch.Generator:
        """The random stream of one step: a function of the seed and the step, so that a resumed run draws the same."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)


def make_job(
    model: DiffusionModel,
    forget: LatentSet,
    retain: LatentSet,
    config: C,
    seed: int,
    accelerator: Accelerator,
    concepts: Sequence[ConceptSpec] = (),
) -> Job[C]:
    """Choose the parameters, drop some retain prompts, embed every prompt once."""
    params = select_trainable(model.parameters(), config.scope)
    retain = _some_dropped(retain, config.retain_dropout, seed)
    embed = PromptCache(model, ["", *forget.prompts, *(forget.anchors or ()), *retain.prompts])
    about = _describe(model, forget, retain, config, seed, concepts)
    return Job(model, params, forget, retain, embed, config, seed, accelerator, about=about)


def _describe(
    model: DiffusionModel, forget: LatentSet, retain: LatentSet, config: C, seed: int, concepts: Sequence[ConceptSpec]
) -> dict[str, str]:
    """What a job's artifacts are compared by (`erase.claims`): departures from the defaults; concepts only where they are known."""
    usual = flat(asdict(type(config)()))
    departures = {name: value for name, value in flat(asdict(config)).items() if usual.get(name) != value}
    return {
        "base_fingerprint": model.fingerprint,
        **({"concepts": json.dumps([{"target": concept.target} for concept in concepts])} if concepts else {}),
        "seed": str(seed),
        "settings": type(config).__name__,
        "config": json.dumps({"method": departures}),
        "forget": sha256_of(vars(forget)),
        "retain": sha256_of(vars(retain)),
    }


def _some_dropped(retain: LatentSet, share: float, seed: int) -> LatentSet:
    """The empty prompt in place of some: the same rows throughout the run, so that their targets can be known beforehand."""
    dropped = torch.rand(len(retain), generator=torch.Generator().manual_seed(seed)) < share
    prompts = tuple("" if drop else prompt for prompt, drop in zip(retain.prompts, dropped, strict=True))
    return replace(retain, prompts=prompts)


def make_batch(job: Job[C], step: int, part: int) -> Batch:
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

    mine = share(size, part, config.train.accumulation, job.accelerator)
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
def frozen_targets(job: Job[C]) -> FrozenTargets | None:
    """The base's predictions at all training points, where these are fixed (trajectories) and it is the base that is asked."""
    config, forget, retain = job.config, job.forget, job.retain
    if forget.t is None or retain.t is None or not config.anchor_from == config.retain_target == "frozen":
        return None
    with running(job.model, job.params, replace(config.train, compile=False)) as active, job.accelerator.autocast():
        collective_forward = active.layout.collective_forward
        anchor = _predict_points(job, forget, forget.anchors or forget.prompts, "anchor targets", collective_forward)
        return FrozenTargets(anchor, _predict_points(job, retain, retain.prompts, "retain targets", collective_forward))


def _predict_points(job: Job[C], points: LatentSet, prompts: tuple[str, ...], what: str, collective_forward: bool) -> Tensor:
    """Predictions at the fixed points of a set, in float32 on the CPU."""
    model, generator = job.model, torch.Generator()  # of which nothing is drawn: the points have noise and timesteps of their own

    def predict(rows: range) -> Tensor:
        chosen = torch.tensor(rows)
        t, noise = (tensor.to(model.device) for tensor in points.draw_noise(chosen, model.timesteps, generator))
        xt = model.add_noise(points.latents[chosen].to(model.device), noise, t)
        return model.predict(xt, t, job.embed([prompts[row] for row in rows])).float().cpu()

    return torch.cat(in_shares(len(points), 2 * job.config.train.batch_size, predict, what, "point", collective_forward))


def loss_function(job: Job[C]) -> LossFn:
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


def share(size: int, part: int, parts: int, among: Accelerator | PartialState) -> slice:
    """This process's rows of this part of a batch.

    Every share is equally long, so that means of shares average to the mean of all.

    Args:
        size: of the whole batch.
        part: of the step.
        parts: per step.
        among: says how many processes there are, and which this is.
    """
    shares = parts * among.num_processes
    assert not size % shares, "which make_accelerator has refused"
    width = size // shares
    start = (among.process_index * parts + part) * width
    return slice(start, start + width)
