"""The remap objective: a forget prompt's prediction becomes its anchor's, retained prompts keep
theirs (SalUn, Fan et al., ICLR 2024, eq. 6)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from erase.latents.batches import Rows, draw_rows, noised
from erase.latents.latent_set import LatentSet, epoch_rows, texts_of
from erase.losses import denoising, remap
from erase.parallel.processes import in_shares
from erase.prompts.errors import FRACTION, ErasureError, check_names, check_ranges
from erase.task import Edit, Task
from erase.training.config import TunedConfig
from erase.training.fine_tune import fine_tune
from erase.training.trainable import Base

SOURCES = ("frozen", "current")
RETAIN_TARGETS = ("frozen", "noise")
AT_ONCE = 16
"""rows, at least, that the base is asked about together where it is asked beforehand"""


@dataclass
class RemapConfig(TunedConfig):
    """Settings of training by the remap objective."""

    alpha: float = 1.0
    """weight of the retain loss; 0: no retained image is drawn or seen (prox_text can hold retained
    prompts without)"""
    anchor_from: str = "frozen"
    """weights that predict the anchor target: frozen (the base) or current (the reference)"""
    retain_target: str = "frozen"
    """what retain predictions are held to: frozen (the base's prediction) or noise (the
    reference)"""
    share_latents: bool = True
    """one posterior sample for the forget and the anchor prediction; False draws two, as the
    reference does (images only)"""
    anchor_latents: float = 0.5
    """fraction of the forget latents that show the anchor: the states that an erased model passes
    through, where the base would still steer back to the concept; 0 is the reference. Images of a
    folder all show the concept"""
    retain_dropout: float = 0.1
    """fraction of retain latents whose prompt is replaced by the empty one, so that classifier-free
    guidance keeps its null branch"""
    shuffle: bool = True
    """a new order of the forget latents in each epoch"""
    beyond: float = 0.0
    """eta: how far beyond the anchor, away from the concept: the target is the anchor's prediction
    + eta (the anchor's - the concept's), both the base's, as a negative prompt would lead"""
    beyond_limit: float | None = None
    """the largest root mean square of that move, where the noise's is 1: concepts that change the
    whole picture (colours) are pushed no further than small ones. None: no limit"""
    hold: float = 0.0
    """weight of holding the anchor, as a multiple of alpha: on the forget rows its own prompt keeps
    the base's prediction, so that what stands in the concept's place is not moved along with it"""
    noise_power: float = 1.0
    """how often training looks at each noise level. 1: at all equally often; 2: at noisier ones
    more, at nearly pure noise twice as often as with 1 (sampling decides an image's layout there,
    and the mean squared error hardly sees it); p: a share (t / T)^p of timesteps lies below t"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self, {"anchor_from": SOURCES, "retain_target": RETAIN_TARGETS})
        for name in ("beyond", "hold"):
            if getattr(self, name) and self.anchor_from != "frozen":
                raise ErasureError(
                    f"{name} {getattr(self, name):g} asks the base about the anchor, and "
                    f"anchor_from {self.anchor_from} does not ask the base; set anchor_from frozen"
                )
        if self.hold and not self.alpha:
            raise ErasureError(
                f"hold {self.hold:g} is a multiple of alpha, which is 0; raise alpha, or leave "
                "hold out"
            )
        check_ranges(
            self,
            {
                "alpha": (0, 1e6),
                "anchor_latents": FRACTION,
                "retain_dropout": FRACTION,
                "beyond": (0, 100),
                "beyond_limit": (1e-6, 100),
                "hold": (0, 1e6),
                "noise_power": (0.1, 10),
            },
        )


@dataclass(frozen=True)
class RemapBatch:
    """Forget and retain rows of one step (or of this process's part of it), and which of their sets
    they are."""

    forget: Rows
    anchor: Rows
    """what the anchor sees: the same, or noised from its own posterior sample"""
    retain: Rows
    forget_rows: Tensor
    retain_rows: Tensor


@dataclass(frozen=True)
class _Targets:
    """Predictions that training aims at, each of shape (n, c, h, w)."""

    forget: Tensor
    """for the concept's prompts at the forget rows"""
    anchor: Tensor
    """the anchor's own, there"""
    retain: Tensor


class Remap:
    """Batches and loss of one erasure by this objective: `remap + alpha * (retain + hold *
    anchor)`; at alpha 0 batches have no retain rows."""

    def __init__(self, task: Task, config: RemapConfig) -> None:
        self.task, self.config = task, config
        if config.alpha and not any(concept.retain for concept in task.concepts):
            # refused, unless images bring prompts, before the forget latents are sampled
            task.retain(config.noise_power)
        self.forget_set = task.forget(config.anchor_latents, config.noise_power)
        self.retain_set = self.forget_set.at(torch.empty(0, dtype=torch.long))
        if config.alpha:
            retain = task.retain(config.noise_power)
            self.retain_set = _some_dropped(retain, config.retain_dropout, task.seed)
        self._known: _Targets | None = None

    def batches(self, step: int) -> RemapBatch:
        """Rows, timesteps and noise of one step."""
        model, config = self.task.model, self.config
        forget, retain = self.forget_set, self.retain_set
        generator, (forget_rows, retain_rows) = self.task.generator(step), self._rows(step, 1)
        retained = draw_rows(model, retain, retain_rows, generator, config.noise_power)
        x_forget = forget.draw(forget_rows, generator)
        x_anchor = x_forget if config.share_latents else forget.draw(forget_rows, generator)
        t, noise = forget.draw_noise(forget_rows, model.timesteps, generator, config.noise_power)

        seen = noised(model, x_forget, noise, t)
        anchor = seen if config.share_latents else noised(model, x_anchor, noise, t)
        return RemapBatch(seen, anchor, retained, forget_rows, retain_rows)

    def _rows(self, step: int, count: int) -> tuple[Tensor, Tensor]:
        """Which forget and which retain rows `count` steps see."""
        size, seed = self.config.train.batch_size, self.task.seed
        start, count = step * size, count * size
        forget = epoch_rows(len(self.forget_set), start, count, seed, self.config.shuffle)
        if not self.config.alpha:
            return forget, torch.empty(0, dtype=torch.long)
        return forget, epoch_rows(len(self.retain_set), start, count, seed + 1)

    def loss(self, batch: RemapBatch, base: Base) -> dict[str, Tensor]:
        """Forget and retain rows go through the denoiser together; so do the teacher's."""
        config, count = self.config, len(batch.forget)
        targets = self._targets(batch, base)
        rows, prompts = batch.forget, texts_of(self.forget_set.prompts, batch.forget_rows)
        if config.hold:
            rows = rows.cat(batch.anchor)
            prompts += texts_of(_anchors(self.forget_set), batch.forget_rows)

        answers, retained = self._together(rows, prompts, batch)
        forgot = remap(answers[:count], targets.forget)
        if not config.alpha:
            return {"forget": forgot}
        kept = denoising(retained, targets.retain)
        if config.hold:
            kept = kept + config.hold * denoising(answers[count:], targets.anchor)
        return {"forget": forgot, "retain": config.alpha * kept}

    def _targets(self, batch: RemapBatch, base: Base) -> _Targets:
        """Each by the frozen base or not, as configured."""
        config = self.config
        if config.anchor_from == config.retain_target == "frozen":
            if base is not torch.no_grad and _fixed(self.forget_set) and _fixed(self.retain_set):
                return self._known_targets(batch, base)
            with base():
                answers, reference = self._together(*self._asked(batch), batch)
                return self._of_answers(answers, reference)

        with torch.no_grad(), base() if config.anchor_from == "frozen" else nullcontext():
            answers = self.task.predict(*self._asked(batch))
        if config.retain_target == "noise" or not config.alpha:
            return self._of_answers(answers, batch.retain.target)
        with base():
            prompts = texts_of(self.retain_set.prompts, batch.retain_rows)
            return self._of_answers(answers, self.task.predict(batch.retain, prompts))

    def _asked(self, batch: RemapBatch) -> tuple[Rows, list[str]]:
        """What the target of the forget rows is made of: the anchor, and the concept at the same
        rows if the target lies beyond."""
        rows, prompts = batch.anchor, texts_of(_anchors(self.forget_set), batch.forget_rows)
        if not self.config.beyond:
            return rows, prompts
        return rows.cat(rows), prompts + texts_of(self.forget_set.prompts, batch.forget_rows)

    def _of_answers(self, answers: Tensor, retain: Tensor) -> _Targets:
        """Targets from the answers to what was asked: forget rows are moved away from the
        concept's."""
        if not self.config.beyond:
            return _Targets(answers, answers, retain)
        anchor, concept = answers.chunk(2)
        return _Targets(anchor + self._move(anchor - concept), anchor, retain)

    def _move(self, away: Tensor) -> Tensor:
        """How far beyond the anchor, of the way from the concept to it."""
        config, axes = self.config, tuple(range(1, away.dim()))
        move = config.beyond * away
        if config.beyond_limit is None:
            return move
        size = move.square().mean(axes, keepdim=True).sqrt()
        return move / (size / config.beyond_limit).clamp_min(1)

    def _known_targets(self, batch: RemapBatch, base: Base) -> _Targets:
        """Of points that are fixed beforehand (trajectories): the base is asked once about all of
        them that training will see."""
        forget, retain = self.forget_set, self.retain_set
        if self._known is None:
            seen, kept = (rows.unique() for rows in self._rows(0, self.config.train.steps))
            with base():
                answers = self._predict_at(seen, forget, _anchors(forget), "anchor targets")
                if self.config.beyond:
                    concept = self._predict_at(seen, forget, forget.prompts, "concept targets")
                    answers = torch.cat([answers, concept])
                reference = self._predict_at(kept, retain, retain.prompts, "retain targets")
            self._known = self._of_answers(answers, reference)

        known, device = self._known, batch.forget.noisy.device
        of_forget, of_retain = batch.forget_rows.cpu(), batch.retain_rows.cpu()
        return _Targets(
            known.forget[of_forget].to(device),
            known.anchor[of_forget].to(device),
            known.retain[of_retain].to(device),
        )

    def _predict_at(
        self, places: Tensor, points: LatentSet, prompts: Sequence[str], what: str
    ) -> Tensor:
        """Predictions at these of the fixed points of a set, in float32 on the CPU; NaN at the
        others, which no step may see."""
        model = self.task.model
        generator = torch.Generator()  # nothing is drawn: the points have noise and timesteps
        size = max(AT_ONCE, 2 * self.config.train.batch_size)

        def predict(rows: range) -> Tensor:
            indices = places[rows.start : rows.stop]
            t, noise = points.draw_noise(indices, model.timesteps, generator)
            seen = noised(model, points.latents[indices], noise, t)
            return self.task.predict(seen, texts_of(prompts, indices)).float().cpu()

        known = torch.full_like(points.latents, torch.nan)
        if not len(places):
            return known
        # as many for every process: under FSDP each prediction is an effort of all
        answers = in_shares(len(places), size, predict, what, "point", pad=True)
        return known.index_copy_(0, places, torch.cat(answers))

    def _together(self, rows: Rows, prompts: list[str], batch: RemapBatch) -> tuple[Tensor, Tensor]:
        """Predictions for these rows and for the batch's retain rows, in one pass."""
        retain_prompts = texts_of(self.retain_set.prompts, batch.retain_rows)
        both = self.task.predict(rows.cat(batch.retain), prompts + retain_prompts)
        return both[: len(rows)], both[len(rows) :]


def trained(task: Task, config: RemapConfig) -> Edit:
    """Fine-tune by this objective and nothing else."""
    remap = Remap(task, config)
    return fine_tune(task, remap.loss, remap.batches, config)


def _anchors(forget: LatentSet) -> tuple[str, ...]:
    return forget.anchors or forget.prompts


def _fixed(points: LatentSet) -> bool:
    return points.t is not None


def _some_dropped(retain: LatentSet, share: float, seed: int) -> LatentSet:
    """The empty prompt in place of some: the same rows throughout the run, so that their targets
    can be known beforehand."""
    dropped = torch.rand(len(retain), generator=torch.Generator().manual_seed(seed)) < share
    prompts = tuple(
        "" if drop else prompt for prompt, drop in zip(retain.prompts, dropped, strict=True)
    )
    return replace(retain, prompts=prompts)
