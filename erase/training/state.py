"""The state of a training: everything that a resumed one needs, whole on disk, in parts in the
processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from erase.files import errors_named
from erase.parallel.processes import exists_on_all, processes
from erase.prompts.errors import ErasureError
from erase.training.checkpoint import RESTART, Checkpoint
from erase.training.config import TrainConfig
from erase.training.opponent import Opponent
from erase.training.optimizers import make_optimizer
from erase.training.trainable import Trainable

Gather = Callable[[Tensor], Tensor]
log = logging.getLogger("erase")


class Run:
    """A training in progress, and everything that a resumed one needs: values, optimizer,
    loss-scaler and opponent state, average, losses."""

    def __init__(
        self,
        trainable: Trainable,
        optimizer: Any,
        scaler: Any,
        ema: float | None,
        kept: Checkpoint | None,
        opponent: Opponent | None,
    ) -> None:
        self.trainable, self.optimizer, self.opponent = trainable, optimizer, opponent
        self._scaler, self._ema, self._kept = scaler, ema, kept
        self.average = (
            {}
            if ema is None
            else {name: value.detach().clone() for name, value in trainable.values.items()}
        )
        self.losses: list[float] = []

    @classmethod
    def start(
        cls,
        trainable: Trainable,
        config: TrainConfig,
        accelerator: Accelerator,
        kept: Checkpoint | None,
        opponent: Opponent | None = None,
    ) -> Run:
        """A new run, or the one that was kept."""
        # its loss scaler has a way of its own through fused steps
        fuse = config.mixed_precision != "fp16"
        optimizer = make_optimizer(
            list(trainable.values.values()),
            config.optimizer,
            config.lr,
            config.optimizer_args,
            fuse,
        )
        # its state is still empty, and its values are where they belong
        optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)
        run = cls(trainable, optimizer, accelerator.scaler, config.ema, kept, opponent)
        if kept and exists_on_all(kept.path):
            run._take(kept)
            if run.step > config.steps:
                raise ErasureError(
                    f"the training state {kept.path} is of step {run.step}, beyond the "
                    f"{config.steps} that are asked for; raise train.steps, or {RESTART}"
                )
            log.info(
                "going on from step %d of %d, which %s holds", run.step, config.steps, kept.path
            )
        return run

    @property
    def step(self) -> int:
        return len(self.losses)

    @torch.no_grad()
    def advance(self, loss: float) -> None:
        for name, value in self.average.items():
            value.lerp_(self.trainable.values[name], 1 - (self._ema or 0))
        self.losses.append(loss)

    @torch.no_grad()
    def outcome(self, sparse: bool) -> Mapping[str, Tensor]:
        """The compact values that the training has come to: the last ones, or their average.
        `sparse`: the average stands at the base's bits where the last ones do."""
        if not self.average:
            return self.trainable.values
        if not sparse:
            return self.average
        values = {}
        for name, mean in self.average.items():
            base = self.trainable.base_values(name)
            values[name] = torch.where(self.trainable.values[name] == base, base, mean)
        return values

    def save(self) -> None:
        """Keep the training state, where a file for it was given: gathered from all processes,
        which must all ask, by the main one."""
        if not self._kept:
            return
        main, gather = processes().is_main_process, self.trainable.layout.gather
        state = {
            "mask": self.trainable.mask_sha256,
            "values": gathered(
                {name: value.detach() for name, value in self.trainable.values.items()},
                gather,
                main,
            ),
            "optimizer": gather_state(self.optimizer, gather, main),
            "scaler": self._scaler.state_dict() if self._scaler else {},
            "average": gathered(self.average, gather, main),
            "losses": self.losses,
            "opponent": self.opponent.state() if self.opponent else {},
        }
        if main:
            self._kept.write(state)

    @torch.no_grad()
    def _take(self, checkpoint: Checkpoint) -> None:
        """Go on from a saved state of the same run and mask."""
        state = checkpoint.read(self.trainable.mask_sha256)
        with errors_named(checkpoint.path, RESTART):
            for name, value in self.trainable.values.items():
                value.copy_(self.trainable.local_part(name, state["values"][name]))
            self.trainable.put()
            self.optimizer.load_state_dict(
                scatter_state(
                    state["optimizer"], list(self.trainable.values), self.trainable.local_part
                )
            )
            if self._scaler:
                self._scaler.load_state_dict(state["scaler"])
            for name, mean in self.average.items():
                mean.copy_(self.trainable.local_part(name, state["average"][name]))
            if self.opponent:
                self.opponent.restore(state["opponent"])
            self.losses = list(state["losses"])


def gathered(parts: Mapping[Any, Any], gather: Gather, keep: bool) -> dict[Any, Any]:
    """The parts of all processes, concatenated in the same order everywhere; an entry that is no
    tensor, or a single number, stays as it is."""
    whole = {}
    for name, part in parts.items():
        value = gather(part) if torch.is_tensor(part) and part.dim() else part
        if keep:
            whole[name] = value
    return whole


def gather_state(prepared: AcceleratedOptimizer, gather: Gather, keep: bool) -> dict[str, Any]:
    """The state of all values, as an unsplit optimizer has it; every process must ask.

    Args:
        prepared: the optimizer.
        gather: makes a whole of what each process holds of a tensor with an entry per value.
        keep: whether this process, the main one, is to be told.
    """
    state = prepared.state_dict()
    return state | {
        "state": {
            index: gathered(of_value, gather, keep) for index, of_value in state["state"].items()
        }
    }  # type: ignore[no-any-return]


def scatter_state(
    whole: Mapping[str, Any], names: list[str], part: Callable[[str, Tensor], Tensor]
) -> dict[str, Any]:
    """This process's part of a whole state, whose values have these names in this order."""

    def each(name: str, of_value: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: part(name, entry) if torch.is_tensor(entry) else entry
            for key, entry in of_value.items()
        }

    return {
        **whole,
        "state": {
            index: each(names[index], of_value) for index, of_value in whole["state"].items()
        },
    }
