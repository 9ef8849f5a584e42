"""STEREO: search thoroughly enough, robustly erase once (Srivatsan et al., CVPR 2025,
https://arxiv.org/abs/2408.16807).

The concept is erased and found again by textual inversion, round after round; then the base forgets
it and all that was found at once. Against who may choose embeddings; a round costs an attack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from erase.attacks.pseudo_token import PseudoTokenConfig, find_each
from erase.attacks.relearning import changed_to
from erase.losses import denoising
from erase.mask import SaliencyMask
from erase.methods import Method
from erase.objectives.negative_guidance import Ask, AwayConfig, away, away_loss, forget_set
from erase.prompts.errors import COUNT, POSITIVE, check_ranges
from erase.task import Edit, Task
from erase.training.batches import PromptedRows, row_batches
from erase.training.config import MOST_STEPS, TrainConfig
from erase.training.fine_tune import fine_tune
from erase.training.loop import Batches
from erase.training.saliency import Objective, choose_mask
from erase.training.trainable import Base

PAPER = "https://arxiv.org/abs/2408.16807"
Batch = tuple[PromptedRows, list[str], Tensor]
"""forget rows, their anchor prompts, and of each the same number: which prompt they are under"""


@dataclass
class STEREOConfig(AwayConfig):
    """Settings of STEREO."""

    scope: str = "noxattn"
    rounds: int = 4
    """of erasing and finding again; fewer than train.steps, where all that was found takes turns"""
    search_steps: int = 200
    """of the erasure in a round; those of the last erasure are in `train`"""
    search_lr: float = 5e-6
    attack: PseudoTokenConfig = PseudoTokenConfig(vectors=1, steps=3000, lr=5e-3, batch_size=1)
    """how the concept is found again"""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(200, lr=2e-5, batch_size=1))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"rounds": COUNT, "search_steps": COUNT, "search_lr": POSITIVE})


def search(
    task: Task, config: STEREOConfig, mask: SaliencyMask | None, batches: Batches
) -> list[Ask]:
    """How p_0, the concept's name, and p_1 ... p_K are asked for: in round k the model of the round
    before forgets p_(k-1), as ESD would; then p_k = argmin_p |eps(x_t, p) - noise|^2, from a start
    that no later attack of the same seed has."""
    train = replace(config.train, steps=config.search_steps, lr=config.search_lr)
    quick = replace(config, train=train)
    values: Mapping[str, Tensor] = {}
    asks: list[Ask] = [task.predict]
    for i in range(config.rounds):
        loss, part = away_loss(task, config.guidance, asks[-1]), f"training-{i}"
        with changed_to(task.model, values):
            values = fine_tune(task, loss, batches, quick, mask=mask, part=part).values
        with changed_to(task.model, values):
            asks.append(find_each(task, config.attack, restart=-1 - i))
    return asks


def edit(task: Task, config: STEREOConfig) -> Edit:
    """Minimise |eps(x_t, p_k) - [eps_0(x_t) + eta (eps_0(x_t, a) - eps_0(x_t))
    - eta mean_j (eps_0(x_t, p_j) - eps_0(x_t))]|^2: k = 0 ... K in turn, a the anchor's prompt."""
    check_ranges(config.train, {"steps": (config.rounds + 1, MOST_STEPS)}, "train")
    forget = forget_set(task, config.prompts)
    size, eta = config.train.batch_size, config.guidance
    named = row_batches(task, forget, size)
    anchored = row_batches(task, replace(forget, prompts=forget.anchors or forget.prompts), size)
    mask = choose_mask(task, config, Objective(away_loss(task, eta), named))
    asks = search(task, config, mask, named)

    def batches(step: int) -> Batch:
        return named(step), anchored(step)[1], torch.full((size,), step % len(asks))

    def loss(batch: Batch, base: Base) -> dict[str, Tensor]:
        (rows, prompts), anchors, k = batch
        with base():
            null, anchor = (task.predict(rows, texts) for texts in ([""] * len(rows), anchors))
            known = torch.stack([ask(rows, prompts) for ask in asks]).mean(dim=0)
        target = away(null, known, eta) + eta * (anchor - null)
        return {"forget": denoising(asks[int(k[0])](rows, prompts), target)}

    return fine_tune(task, loss, batches, config, mask=mask)


METHODS = {"stereo": Method("stereo", PAPER, STEREOConfig(), edit)}
