"""The door to gradient steps: every method that takes them comes in here, with a loss and batches
of its own."""

from __future__ import annotations

import json
import re
from collections import ChainMap
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from typing import cast

from torch import Tensor, nn

from erase.claims import flat
from erase.mask import SaliencyMask, kept_count
from erase.models.scopes import SCOPES, select
from erase.parallel.fsdp import check_parts, check_sharded
from erase.parallel.processes import processes
from erase.prompts.errors import ErasureError
from erase.task import Edit, Task, describe
from erase.training.checkpoint import Checkpoint
from erase.training.config import TunedConfig
from erase.training.confine import held_matrices, restraints
from erase.training.loop import Batches, LossFn, fit, make_accelerator
from erase.training.low_rank import matrices
from erase.training.opponent import Opponent
from erase.training.rules import LADDER
from erase.training.running import check_by_block, running
from erase.training.saliency import Objective, choose_mask


def fine_tune(
    task: Task,
    loss: LossFn,
    batches: Batches,
    config: TunedConfig,
    *,
    start: Mapping[str, Tensor] | None = None,
    mask: SaliencyMask | None = None,
    part: str = "training",
    opponent: Opponent | None = None,
) -> Edit:
    """Minimise a loss over the weights of `config.scope`, under its mask and options; the model is
    left as it was found.

    Args:
        task: the erasure.
        loss: (batch, base) -> terms by name, `forget` and `retain`; `with base():` gives the base's
            weights without gradient.
        batches: step -> the whole batch; the loop cuts it to process and part.
        config: the method's configuration.
        start: values to begin at instead of the base's, as whole parameters by name.
        mask: of a method that trains several times and chooses it itself; None: chosen here.
        part: names the training state, of which each training has its own.
        opponent: what learns beside the model.

    Raises:
        ErasureError: settings that this machine cannot train with, a mask of another base or
            concept, `twofold` with nothing on one side, or a loss that is not finite.
    """
    params, accelerator = task.weights(config.scope), make_accelerator(config.train, task.folder)
    if mask is None:
        mask = choose_mask(task, config, Objective(loss, batches))
    if mask is not None:
        mask.check(params, task.model.fingerprint)
    if config.twofold:
        _check_sides(_trained(params, config), mask)
        alone = replace(config, twofold=False)
        train = partial(fine_tune, task, loss, batches, alone, start=start, opponent=opponent)
        return _twice(train, params, mask, task, part, opponent)
    checkpoint = (
        Checkpoint(task.folder / f"{part}.pt", {**describe(task), **_settings(config)})
        if task.folder
        else None
    )

    restrained = restraints(task, params, config)
    with running(task.model, params, config.train) as active:
        fitted = fit(
            params,
            loss,
            batches,
            config,
            mask,
            active=active,
            seed=task.seed,
            start=start,
            accelerator=accelerator,
            checkpoint=checkpoint,
            opponent=opponent,
            restraints=restrained,
        )
    return Edit(fitted.values, fitted.losses, mask)


def _twice(
    train: Callable[..., Edit],
    params: Mapping[str, nn.Parameter],
    mask: SaliencyMask | None,
    task: Task,
    part: str,
    opponent: Opponent | None,
) -> Edit:
    """Two trainings from the base, of what the mask holds in the cross-attention and outside of it;
    no tensor is changed by both."""
    sides = _sides(params)
    every = mask or SaliencyMask.whole(params, {"base_fingerprint": task.model.fingerprint})
    masks = {where: every.within(names) for where, names in sides.items()}
    begun = deepcopy(opponent.state()) if opponent else {}
    first = train(mask=masks["in it"], part=f"{part}-text")
    if opponent:
        opponent.restore(begun)
    second = train(mask=masks["outside"], part=f"{part}-rest")
    changed = {name: first.values[name] for name in first.values if name in sides["in it"]}
    # the others are put together when they are asked for
    values = ChainMap(changed, cast("dict[str, Tensor]", second.values))
    return Edit(values, [*first.losses, *second.losses], mask)


def _sides(params: Mapping[str, nn.Parameter]) -> dict[str, set[str]]:
    text = {name for name in params if re.search(SCOPES["xattn"], name)}
    return {"in it": text, "outside": params.keys() - text}


def _trained(params: Mapping[str, nn.Parameter], config: TunedConfig) -> Mapping[str, nn.Parameter]:
    """Those of a scope whose values training may change."""
    return matrices(params) if config.lora_rank else params


def _check_sides(trained: Mapping[str, nn.Parameter], mask: SaliencyMask | None = None) -> None:
    for where, names in _sides(trained).items():
        if not names or (mask and not mask.within(names).count()):
            raise ErasureError(
                "twofold trains what may change in the cross-attention, and by itself what may "
                f"change outside of it, with lora_rank matrices alone: {where} there is nothing; "
                "widen the scope or the mask, or leave twofold out"
            )


def _settings(config: TunedConfig) -> dict[str, str]:
    """The settings that a training state must share: the kind of configuration, and the departures
    from its defaults.

    The number of steps is none of them where the rate is constant: a longer run begins as a shorter
    one does, so it goes on from there.
    """
    usual = flat(asdict(type(config)()))
    idle = {"train.steps"} if config.train.schedule == "constant" else set()
    departures = {
        name: value
        for name, value in flat(asdict(config)).items()
        if usual.get(name) != value and name not in idle
    }
    return {"settings": type(config).__name__, "config": json.dumps({"method": departures})}


def check_machine(config: TunedConfig, by_block: bool = False) -> None:
    """Refuse settings that this machine or launch cannot train with, before anything is loaded; see
    `make_accelerator`, and `check_by_block` where weights come to the device block by block."""
    make_accelerator(config.train)
    check_sharded(config.train, config.lora_rank)
    if config.mask.on_disk and processes().num_processes > 1:
        raise ErasureError(
            "mask.on_disk is for one process: several hold the sums beside their weights, where "
            "they are added up; leave it out, or launch one"
        )
    if by_block:
        check_by_block(config.train)


def check_scope(params: Mapping[str, nn.Parameter], config: TunedConfig) -> None:
    """Refuse, before hours are spent on latents, a scope or a density that leaves nothing to train,
    or nothing that shards can."""
    selected = select(params, config.scope)
    check_parts(selected)
    trained = _trained(selected, config)
    if config.twofold:
        _check_sides(trained)
    if config.holding:
        held_matrices(selected, config)
    density = config.mask.density if config.mask.density != "auto" else LADDER[0]
    kept_count(density, sum(param.numel() for param in selected.values()))
