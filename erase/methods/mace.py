"""MACE: mass concept erasure (Lu et al., CVPR 2024, https://arxiv.org/abs/2403.06135).

A closed form takes the concept out of the words around it, an adapter for each concept turns
attention away from its name, and a second closed form makes one weight of all. For many concepts,
whose adapters could not simply be added up."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from math import inf

import torch
from torch import Tensor

from erase.methods import Method
from erase.objectives.closed_form import ridge_edit, text_projections
from erase.objectives.cross_attention import attention_where_seen, find_layers
from erase.objectives.null_space import confined_edit
from erase.objectives.text_inputs import following_states, retained_states, subject_states
from erase.prompts.errors import check_ranges
from erase.task import Edit, Task
from erase.training.batches import batches_of
from erase.training.config import TrainConfig, TunedConfig
from erase.training.confine import null_spaces
from erase.training.fine_tune import fine_tune
from erase.training.saliency import Objective, choose_mask

PAPER = "https://arxiv.org/abs/2403.06135"


@dataclass
class MACEConfig(TunedConfig):
    """Settings of MACE."""

    draws, one_by_one = ("n_forget",), True
    scope: str = "xattn_kv"
    """the projections of text states that are edited"""
    lora_rank: int = 1
    retain_scale: float = 1.0
    """weight of the retained prompts' states in both closed forms"""
    ridge: float = 0.1
    """weight of staying near the base in both"""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=50, lr=1e-4, batch_size=4))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"retain_scale": (0, inf), "ridge": (1e-12, inf)})


def edit(task: Task, config: MACEConfig) -> Edit:
    """1. W_r = argmin sum |W e_f - W_0 e_a|^2 + ..., e_f the states behind the concept's names, e_a
    behind the anchor in the same prompts.
    2. For each concept i, from W_r: the change D_i that minimises sum_l |A_l[t] * M_l|^2, A_l[t]
    attention to its names, M_l where the base looks at them.
    3. W = argmin sum_i sum |W e - (W_r + D_i) e|^2 + ..., e those at and behind its names.
    Both "..." are retain_scale sum |W p - W_0 p|^2 + ridge |W - W_0|^2, p of retained prompts.
    """
    find_layers(task.model)  # refuses a transformer: of a UNet, all are given the same
    (base,) = text_projections(task, config.scope).values()
    kept = config.retain_scale**0.5 * retained_states(task)
    behind = [following_states(task, concept) for concept in task.concepts]
    words, instead = (torch.cat(states) for states in zip(*behind, strict=True))
    spaces = null_spaces(task, base, config) if config.confine else {}

    def solved(name: str, inputs: Tensor, outputs: Tensor) -> Tensor:
        how = partial(confined_edit, projector=spaces[name]) if spaces else ridge_edit
        return how(base[name], inputs, outputs, kept, config.ridge)

    refined = {n: solved(n, words, instead @ weight.detach().T) for n, weight in base.items()}

    size, focus = config.train.batch_size, _focus(task.model.timesteps)
    each = [batches_of(task, concept, size, focus) for concept in task.concepts]
    loss = partial(attention_where_seen, task)
    objective = Objective(partial(loss, task.concepts), lambda i: each[i % len(each)](i))
    mask, tuned = choose_mask(task, config, objective), []
    for i, (concept, own) in enumerate(zip(task.concepts, each, strict=True)):
        turned, part = partial(loss, [concept]), f"training-{i}"
        tuned.append(fine_tune(task, turned, own, config, start=refined, mask=mask, part=part))

    named = [
        torch.cat([subject_states(task, concept)[0], states[0]])
        for concept, states in zip(task.concepts, behind, strict=True)
    ]
    inputs, values = torch.cat(named), {}
    for name, weight in base.items():
        outputs = [e @ edit.values[name].T for e, edit in zip(named, tuned, strict=True)]
        fused = solved(name, inputs, torch.cat(outputs))
        values[name] = torch.where(mask[name].to(weight.device), fused, weight) if mask else fused
    return Edit(values, list(chain.from_iterable(edit.losses for edit in tuned)), mask)


def _focus(timesteps: int) -> Tensor:
    """sigmoid((t - 200) / 20) - sigmoid((t - 400) / 20), of 1000: where objects form."""
    t = torch.arange(timesteps) * 1000 / timesteps
    return ((t - 200) / 20).sigmoid() - ((t - 400) / 20).sigmoid()


METHODS = {"mace": Method("mace", PAPER, MACEConfig(), edit)}
