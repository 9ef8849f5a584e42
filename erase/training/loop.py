"""The one training loop. It alone applies the mask, and it can be stopped at any step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from erase.mask import SaliencyMask
from erase.models import autocast
from erase.parallel.fsdp import check_sharded
from erase.parallel.layout import ActiveWeights
from erase.parallel.processes import processes
from erase.parallel.progress import bar
from erase.prompts.errors import ErasureError, check_names
from erase.training.checkpoint import Checkpoint
from erase.training.config import TrainConfig, TunedConfig
from erase.training.confine import Restraint
from erase.training.gradients import Gradients, check_terms, restrain, soften, step_gradients
from erase.training.low_rank import LowRank
from erase.training.opponent import Opponent
from erase.training.optimizers import try_optimizer
from erase.training.running import check_attention
from erase.training.shares import Batch, cut
from erase.training.state import Run
from erase.training.trackers import check_tracker, logging_to, tracked
from erase.training.trainable import Base, Trainable

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
}
"""name -> fraction of the learning rate at this fraction of the steps; a function of the step
alone, so a resumed run goes on with it"""
SHARE_STRIDE = 1_000_003
"""between the seeds of a step's shares; of a seed torch takes the lower 32 bits alone"""
LossFn = Callable[[Batch, Base], Mapping[str, Tensor]]
"""(batch or part of one, the base weights as a context) -> terms by name, `forget` and `retain`,
whose sum is minimised: scalars with graph, means over their rows"""
Batches = Callable[[int], Batch]
"""step -> the whole batch of that step. A function of nothing else: so a resumed run sees what it
would have seen."""


@dataclass
class Fitted:
    """The result of a training."""

    values: Mapping[str, Tensor]
    """parameter name -> trained values"""
    losses: list[float]
    """one per optimizer step"""


def make_accelerator(config: TrainConfig, folder: Path | None = None) -> Accelerator:
    """An Accelerator for this precision, which logs into a run's folder where `log_with` says so.
    Other faults of the settings are refused here too, before hours are spent on latents.

    Raises:
        ErasureError: an unknown precision, schedule, attention or optimizer, fp16 without a GPU, a
            batch that does not split evenly, or what FSDP cannot do where the launch asks for it.
    """
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ErasureError("train.mixed_precision fp16 needs a GPU; use bf16 or no on this machine")
    autocast(processes().device, config.mixed_precision)  # refuses an unknown name
    check_sharded(config)
    if config.batch_size % (config.accumulation * processes().num_processes):
        raise ErasureError(
            f"batch_size {config.batch_size} cannot be split evenly into {config.accumulation} "
            f"accumulated parts on {processes().num_processes} processes"
        )
    check_names(config, {"schedule": SCHEDULES})
    check_tracker(config.log_with)
    check_attention(config.attention, processes().device)
    try_optimizer(
        config.optimizer,
        config.lr,
        config.optimizer_args,
        config.mixed_precision != "fp16",
        processes().device,
    )
    if (
        AcceleratorState._shared_state
        and AcceleratorState().mixed_precision != config.mixed_precision
    ):
        # Accelerate keeps one precision per process; a library caller may well erase twice with
        # different ones
        AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=processes().device.type == "cpu",
        **logging_to(config.log_with, folder),
    )


def fit(
    params: Mapping[str, nn.Parameter],
    loss: LossFn,
    batches: Batches,
    config: TunedConfig,
    mask: SaliencyMask | None = None,
    *,
    active: ActiveWeights | None = None,
    seed: int = 0,
    start: Mapping[str, Tensor] | None = None,
    accelerator: Accelerator | None = None,
    checkpoint: Checkpoint | None = None,
    opponent: Opponent | None = None,
    restraints: Mapping[str, Restraint] | None = None,
) -> Fitted:
    """Take `config.train.steps` optimizer steps on parameters of any module, and leave them as they
    were found.

    The mask acts on the update: the optimizer sees compact copies of the weights inside it and
    nothing else (`Trainable`), so weight decay and momentum cannot move the others. An optimizer
    that looks at whole matrices (Adafactor) sees flat values under a mask.

    Args:
        params: what may change, before the mask.
        loss: terms of one batch, given the batch and `base`.
        batches: step -> the whole batch: tensors, lists of texts, and tuples or dataclasses of
            those, which the loop cuts by rows to process and part.
        config: steps, optimizer, precision, options.
        mask: where weights may change; None: everywhere.
        active: what stands in the place of `params` while the model runs (`running`); None: they
            themselves.
        seed: of what the options draw.
        start: values to begin at instead of the base's, as whole parameters by name.
        accelerator: made from `config.train` where none is given.
        checkpoint: where the training state is kept, and whose it is; found, it is resumed from;
            the caller removes it.
        opponent: what learns beside the model, a step before each of its steps.
        restraints: parameter name -> what a step leaves of its change (`erase.training.confine`).

    Raises:
        ErasureError: a loss that is not finite, an unknown optimizer or argument, rows that do not
            split evenly, a mask under which nothing may change.
    """
    # refuses a launch, too, that this loop does not fit
    check_sharded(config.train, config.lora_rank)
    folder = checkpoint.path.parent if checkpoint else None
    accelerator = accelerator or make_accelerator(config.train, folder)
    trainable = _trainable(params, mask, active or ActiveWeights(params), config.lora_rank, seed)
    try:
        if not trainable.values:
            what = "matrix, which lora_rank factors," if config.lora_rank else "weight of the scope"
            raise ErasureError(f"the mask lets no {what} change; widen the mask or the scope")
        if start:
            trainable.start_from(start)
        run = Run.start(trainable, config.train, accelerator, checkpoint, opponent)
        steps = _Steps(run, loss, batches, config, accelerator, seed, restraints or {})
        _train(run, steps, checkpoint.path if checkpoint else None)
        return Fitted(trainable.result(run.outcome(bool(config.prox_l1))), run.losses)
    finally:
        trainable.close()
        # it keeps the optimizer: room that the model's own weights may need to come back
        accelerator.free_memory()


def _trainable(
    params: Mapping[str, nn.Parameter],
    mask: SaliencyMask | None,
    active: ActiveWeights,
    rank: int,
    seed: int,
) -> Trainable:
    """What the optimizer sees: the values themselves, or factors of their change."""
    if rank:
        return LowRank(params, mask, active, rank, seed)
    return Trainable(params, mask, active)


@dataclass(frozen=True)
class _Steps:
    """The inputs of every step of a training."""

    run: Run
    loss: LossFn
    batches: Batches
    config: TunedConfig
    accelerator: Accelerator
    seed: int
    restraints: Mapping[str, Restraint]

    def take(self) -> dict[str, float]:
        """One optimizer step over all parts of one batch; returns its loss and learning rate and,
        where they are logged, the loss's terms."""
        run, train = self.run, self.config.train
        rise = min(1.0, (run.step + 1) / (train.warmup + 1))
        lr = train.lr * rise * SCHEDULES[train.schedule](run.step / train.steps)
        for group in run.optimizer.param_groups:
            group["lr"] = lr

        total, terms, gradients = self._gradients()
        if not math.isfinite(total):
            raise ErasureError(
                f"the loss is {total} at step {run.step}; lower the learning rate ({train.lr:g}), "
                "set max_grad_norm, or train in float32"
            )
        for name, value in run.trainable.values.items():
            value.grad = gradients.get(name)
        if train.max_grad_norm is not None:
            self._clip(train.max_grad_norm)
        run.optimizer.step()
        soften(run.trainable, lr * self.config.prox_l1, lr * self.config.prox_l2)
        restrain(run.trainable, self.restraints, lr)
        run.trainable.put()
        run.advance(total)
        return {"loss": total, **terms, "lr": lr}

    def _gradients(self) -> tuple[float, dict[str, float], Gradients]:
        """The step's loss at the values as they are, its terms where they are logged, and its
        gradient."""
        losses: dict[str, Tensor] = {}
        batch = self.batches(self.run.step)
        if self.run.opponent:
            mine = cut(batch, 0, 1, self.accelerator)
            with self.accelerator.autocast():
                self.run.opponent.learn(mine, self.run.trainable.base)

        def take(names: tuple[str, ...] | None) -> Gradients:
            gradients, terms = self._take(batch, names)
            for name, term in terms.items():
                # the first: at the values themselves, but under smoothing
                losses.setdefault(name, term)
            return gradients

        # not the seed of the batch (`Task.generator`): displacements are not to follow its noise
        generator = torch.Generator().manual_seed(~(self.seed * 1_000_003 + self.run.step))
        gradients = step_gradients(self.run.trainable, take, self.config, generator)
        total = self.accelerator.reduce(sum(losses.values()), reduction="mean")
        terms: dict[str, float] = {}
        for name, term in losses.items() if self.config.train.log_with else ():
            terms[f"loss/{name}"] = float(self.accelerator.reduce(term, reduction="mean"))
        return float(total), terms, gradients

    def _take(
        self, batch: Batch, names: tuple[str, ...] | None
    ) -> tuple[Gradients, dict[str, Tensor]]:
        """Gradient and value of some terms, over all parts of a batch."""
        trainable, parts = self.run.trainable, self.config.train.accumulation
        losses: dict[str, Tensor] = {}
        self.run.optimizer.zero_grad()
        for part in range(parts):
            # whatever draws from the global stream draws the same after a resume, and something
            # else in every part and process
            place = self.accelerator.process_index * parts + part
            torch.manual_seed(self.run.step + SHARE_STRIDE * place)
            share = cut(batch, part, parts, self.accelerator)
            with self.accelerator.autocast():
                terms = self.loss(share, trainable.base)
                check_terms(terms, self.config.combine)
                wanted = {
                    name: term / parts
                    for name, term in terms.items()
                    if names is None or name in names
                }
                whole = sum(wanted.values())
            if torch.is_tensor(whole):
                self.accelerator.backward(whole)
            for name, term in wanted.items():
                losses[name] = losses.get(name, 0) + term.detach().float()
        gradients = {
            name: value.grad for name, value in trainable.values.items() if value.grad is not None
        }
        trainable.layout.average(gradients.values())
        return gradients, losses

    def _clip(self, limit: float) -> None:
        self.accelerator.unscale_gradients()
        values = self.run.trainable.values.values()
        local = get_total_norm([value.grad for value in values if value.grad is not None])
        clip_grads_with_norm_(values, limit, self.run.trainable.layout.norm(local))


def _train(run: Run, steps: _Steps, state: Path | None) -> None:
    """All steps that are left, with a training state saved now and then; bar and log bear the
    state's name."""
    accelerator, train = steps.accelerator, steps.config.train
    what, _, part = state.stem.partition("-") if state else ("training", "", "")
    name = "erasing" if what == "training" else what
    if part:
        name = f"{name} ({part})"
    if accelerator.num_processes > 1:
        how = "in shards on" if run.trainable.layout.collective_forward else "on"
        name = f"{name} {how} {accelerator.num_processes} processes"
    with (
        tracked(accelerator, train.log_with, train, state, run.step) as track,
        torch.random.fork_rng(devices=[]),
        bar(name, "step", train.steps, run.step, accelerator.is_main_process) as progress_bar,
    ):
        while run.step < train.steps:
            told = steps.take()
            track({**told, "rows": train.batch_size}, run.step)
            progress_bar.set_postfix(loss=f"{told['loss']:.4f}", refresh=False)
            progress_bar.update()
            if run.step % train.checkpoint_every == 0:
                run.save()
