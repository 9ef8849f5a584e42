"""The one training loop. It alone applies the mask, and it can be stopped at any step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from erase.files import errors_named
from erase.mask import SaliencyMask
from erase.models import DiffusionModel, autocast
from erase.parallel.fsdp import check_sharded
from erase.parallel.processes import exists_on_all, processes
from erase.parallel.progress import bar
from erase.parallel.sharding import gather_state, gathered, scatter_state
from erase.prompts.errors import ErasureError, check_names
from erase.training.checkpoint import RESTART, Checkpoint
from erase.training.config import TrainConfig
from erase.training.optimizers import make_optimizer, try_optimizer
from erase.training.running import check_attention, running
from erase.training.trainable import Frozen, Trainable

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
}
"""name -> fraction of the learning rate at this fraction of the steps; a function of the step alone, so a resumed run goes on with it"""
SHARE_STRIDE = 1_000_003
"""between the seeds of a step's shares; of a seed torch takes the lower 32 bits alone"""
Batch = Any
LossFn = Callable[[Batch, Frozen], Tensor]
"""(batch or part of one, the base weights as a context) -> a scalar with graph, a mean over its rows"""
Batches = Callable[[int, int], Batch]
"""(step, part) -> what the loss function takes. A function of nothing else: so a resumed run sees what it would have seen."""
log = logging.getLogger("erase")


@dataclass
class Fitted:
    """What training gives back."""

    values: Mapping[str, Tensor]
    """parameter name -> trained values"""
    losses: list[float]
    """one per optimizer step"""


def make_accelerator(config: TrainConfig) -> Accelerator:
    """An Accelerator for this precision; what else is wrong with the settings is said too, before hours are spent on latents.

    Raises:
        ErasureError: an unknown precision, schedule, attention or optimizer, fp16 without a GPU, a batch that does not split evenly, or what
            FSDP cannot do where the launch asks for it.
    """
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ErasureError("mixed_precision fp16 needs a GPU; use bf16 or no on this machine")
    autocast(processes().device, config.mixed_precision)  # refuses an unknown name
    check_sharded(config)
    if config.batch_size % (config.accumulation * processes().num_processes):
        raise ErasureError(
            f"batch_size {config.batch_size} cannot be split evenly into {config.accumulation} accumulated parts on "
            f"{processes().num_processes} processes"
        )
    check_names(config, {"schedule": SCHEDULES})
    check_attention(config.attention, processes().device)
    try_optimizer(config.optimizer, config.lr, config.optimizer_args, config.mixed_precision != "fp16", processes().device)
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != config.mixed_precision:
        # Accelerate keeps one precision per process; a library caller may well erase twice with different ones
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=config.mixed_precision, cpu=processes().device.type == "cpu")


def fit(
    model: DiffusionModel,
    params: Mapping[str, nn.Parameter],
    batches: Batches,
    loss_fn: LossFn,
    config: TrainConfig,
    mask: SaliencyMask | None = None,
    *,
    accelerator: Accelerator | None = None,
    checkpoint: Path | None = None,
    about: Mapping[str, str] | None = None,
) -> Fitted:
    """Take `config.steps` optimizer steps on `params` and leave the model as it was found.

    The mask acts on the update: the optimizer sees compact copies of the weights inside it and nothing else (`Trainable`), so weight
    decay and momentum cannot move the others. A loss function gets the base weights as a context, `with frozen():`, for its teacher.
    An optimizer that looks at whole matrices (Adafactor) sees flat values under a mask.

    Args:
        model: whose weights `params` are.
        params: what may change, before the mask.
        batches: batch of a step and part; every process asks for the same and takes its own share within the loss function's data.
        loss_fn: scalar loss of one batch, given the batch and `frozen`.
        config: steps, optimizer, precision.
        mask: where weights may change; None: everywhere.
        accelerator: made from `config` where none is given.
        checkpoint: file of the training state; found, it is resumed from; the caller removes it.
        about: the run that it belongs to (`erase.claims`): a state of another one is refused.

    Raises:
        ErasureError: a loss that is not finite, an unknown optimizer or argument, a mask of another base, a training state that is
            damaged or of another run.
    """
    processes()  # refuses a launch that this loop does not fit
    check_names(config, {"schedule": SCHEDULES})
    accelerator = accelerator or make_accelerator(config)
    if mask is not None:
        mask.check(params, model.fingerprint)
    kept = Checkpoint(checkpoint, {"base_fingerprint": model.fingerprint, **(about or {})}) if checkpoint else None
    with running(model, params, config) as active:
        try:
            return _fitted(Trainable(params, mask, active), batches, loss_fn, config, accelerator, kept)
        finally:
            accelerator.free_memory()  # it keeps the optimizer: room that the model's own weights may need to come back


def _fitted(
    trainable: Trainable,
    batches: Batches,
    loss_fn: LossFn,
    config: TrainConfig,
    accelerator: Accelerator,
    checkpoint: Checkpoint | None,
) -> Fitted:
    """All of the training that happens while the model is run as asked."""
    try:
        run = _Run.start(trainable, config, accelerator, checkpoint)
        _train(run, batches, loss_fn, config, accelerator)
        return Fitted(trainable.result(run.average or trainable.values), run.losses)
    finally:
        trainable.close()


def _train(run: _Run, batches: Batches, loss_fn: LossFn, config: TrainConfig, accelerator: Accelerator) -> None:
    """All steps that are left, with a training state saved now and then."""
    how = "in shards on" if run.trainable.layout.collective_forward else "on"
    name = "erasing" if accelerator.num_processes == 1 else f"erasing {how} {accelerator.num_processes} processes"
    with (
        torch.random.fork_rng(devices=[]),
        bar(name, "step", config.steps, run.step, accelerator.is_main_process) as shown,
    ):
        while run.step < config.steps:
            loss = _step(run, batches, loss_fn, config, accelerator)
            shown.set_postfix(loss=f"{loss:.4f}", refresh=False)
            shown.update()
            if run.step % config.checkpoint_every == 0:
                run.save()


def _step(run: _Run, batches: Batches, loss_fn: LossFn, config: TrainConfig, accelerator: Accelerator) -> float:
    """One optimizer step over all parts of one batch; returns its loss."""
    run.optimizer.zero_grad()
    for group in run.optimizer.param_groups:
        group["lr"] = config.lr * SCHEDULES[config.schedule](run.step / config.steps)
    total = torch.zeros((), device=accelerator.device)
    for part in range(config.accumulation):
        # whatever draws from the global stream draws the same after a resume, and something else in every part and process
        torch.manual_seed(run.step + SHARE_STRIDE * (accelerator.process_index * config.accumulation + part))
        with accelerator.autocast():
            loss = loss_fn(batches(run.step, part), run.trainable.frozen) / config.accumulation
        accelerator.backward(loss)
        total += loss.detach().float()
    total = accelerator.reduce(total, reduction="mean")
    if not total.isfinite():
        raise ErasureError(
            f"the loss is {total.item()} at step {run.step}; lower the learning rate ({config.lr:g}), set max_grad_norm, or train in float32"
        )
    gradients = [value.grad for value in run.trainable.values.values() if value.grad is not None]
    run.trainable.layout.average(gradients)
    if config.max_grad_norm is not None:
        accelerator.unscale_gradients()
        norm = run.trainable.layout.norm(get_total_norm(gradients))
        clip_grads_with_norm_(run.trainable.values.values(), config.max_grad_norm, norm)
    run.optimizer.step()
    run.trainable.put()
    run.advance(total.item())
    return total.item()


@contextmanager
def gradients_on(params: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Gradients on for these parameters alone; afterwards off and cleared."""
    for param in params.values():
        param.requires_grad_(True)
    try:
        yield
    finally:
        for param in params.values():
            param.requires_grad_(False)
            param.grad = None


class _Run:
    """A training in progress, and everything that a resumed one needs: values, optimizer and loss-scaler state, average, losses."""

    def __init__(self, trainable: Trainable, optimizer: Any, scaler: Any, ema: float | None, kept: Checkpoint | None) -> None:
        self.trainable, self.optimizer = trainable, optimizer
        self._scaler, self._ema, self._kept = scaler, ema, kept
        self.average = {} if ema is None else {name: value.detach().clone() for name, value in trainable.values.items()}
        self.losses: list[float] = []

    @classmethod
    def start(cls, trainable: Trainable, config: TrainConfig, accelerator: Accelerator, kept: Checkpoint | None) -> _Run:
        """A new run, or the one that was kept."""
        fuse = config.mixed_precision != "fp16"  # its loss scaler has a way of its own through fused steps
        optimizer = make_optimizer(
            list(trainable.values.values()),
            config.optimizer,
            config.lr,
            config.optimizer_args,
            fuse,
            shard=config.shard_optimizer and not trainable.layout.collective_forward,  # of shards there is nothing left to split
        )
        # its state is still empty, and its values are where they belong
        optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)
        run = cls(trainable, optimizer, accelerator.scaler, config.ema, kept)
        if kept and exists_on_all(kept.path):
            run._take(kept)
            log.info("going on from step %d of %d, which %s holds", run.step, config.steps, kept.path)
        return run

    @property
    def step(self) -> int:
        return len(self.losses)

    @torch.no_grad()
    def advance(self, loss: float) -> None:
        for name, value in self.average.items():
            value.lerp_(self.trainable.values[name], 1 - (self._ema or 0))
        self.losses.append(loss)

    def save(self) -> None:
        """Keep the training state, where a file for it was given: gathered from all processes, which must all ask, by the main one."""
        if not self._kept:
            return
        main, gather = processes().is_main_process, self.trainable.layout.gather
        state = {
            "mask": self.trainable.mask_sha256,
            "values": gathered({name: value.detach() for name, value in self.trainable.values.items()}, gather, main),
            "optimizer": gather_state(self.optimizer, gather, main),
            "scaler": self._scaler.state_dict() if self._scaler else {},
            "average": gathered(self.average, gather, main),
            "losses": self.losses,
        }
        if main:
            self._kept.write(state)

    @torch.no_grad()
    def _take(self, kept: Checkpoint) -> None:
        """Go on from a saved state of the same run and mask."""
        state = kept.read(self.trainable.mask_sha256)
        with errors_named(kept.path, RESTART):
            for name, value in self.trainable.values.items():
                value.copy_(self.trainable.local_part(name, state["values"][name]))
            self.trainable.put()
            self.optimizer.load_state_dict(
                scatter_state(state["optimizer"], list(self.trainable.values), self.trainable.local_part)
            )
            if self._scaler:
                self._scaler.load_state_dict(state["scaler"])
            for name, mean in self.average.items():
                mean.copy_(self.trainable.local_part(name, state["average"][name]))
            self.losses = list(state["losses"])
