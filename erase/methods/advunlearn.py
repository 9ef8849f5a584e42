"""AdvUnlearn: adversarial training of the text encoder (Zhang et al., NeurIPS 2024,
https://arxiv.org/abs/2405.15234).

The encoder forgets the concept behind what an attack finds in each step, and serves every denoiser
that reads it. Where an attacker may choose prompts; many times as long as ESD."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from erase.attacks.descent import step_down
from erase.attacks.words import words_of
from erase.losses import denoising
from erase.methods import Method
from erase.objectives.negative_guidance import AwayConfig, away, check_attacked, forget_set
from erase.prompts.errors import COUNT, POSITIVE, check_ranges
from erase.task import Edit, Task
from erase.training.batches import PromptedRows, weighed_batches
from erase.training.config import MOST_STEPS, TrainConfig, TunedConfig
from erase.training.fine_tune import fine_tune
from erase.training.trainable import Base

PAPER = "https://arxiv.org/abs/2405.15234"
Batch = tuple[tuple[PromptedRows, ...], Mapping[str, Tensor] | None]
"""forget and retain rows, the attack's start by text encoder; None: no attack yet"""


@dataclass
class AdvUnlearnConfig(AwayConfig):
    """Settings of AdvUnlearn."""

    draws = TunedConfig.draws
    scope: str = r"^text_encoder(_\d)?\.(?!.*(embed|shared))"
    alpha: float = 0.3
    """gamma: weight of the retained prompts' predictions keeping to the base's"""
    vectors: int = 1
    """embeddings that the attack puts before each prompt"""
    attack_steps: int = 30
    """of Adam, in each step of training"""
    attack_lr: float = 1e-3
    attack_from: int = 200
    """the first step with an attack, below train.steps; before: ESD, and the retain term"""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(1000, lr=1e-5, batch_size=4))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"vectors": COUNT, "attack_steps": COUNT, "attack_lr": POSITIVE})
        check_ranges(self, {"alpha": (0, 1e6), "attack_from": (0, MOST_STEPS)})
        check_attacked(self.attack_from, self.train.steps)


def attack(
    task: Task, asked: PromptedRows, start: Mapping[str, Tensor], config: AdvUnlearnConfig
) -> dict[str, Tensor]:
    """delta = argmin |eps(x_t, delta + c) - target|^2, one for each row."""
    found = {name: vectors.clone().requires_grad_() for name, vectors in start.items()}
    adam = torch.optim.Adam(list(found.values()), lr=config.attack_lr)
    for _ in range(config.attack_steps):
        step_down(task, asked, lambda _: found, adam)
    return {name: vectors.detach() for name, vectors in found.items()}


def edit(task: Task, config: AdvUnlearnConfig) -> Edit:
    """Minimise |eps(x_t, delta + c) - [eps_0(x_t) - eta (eps_0(x_t, c) - eps_0(x_t))]|^2
    + gamma |eps(x_t, c_r) - eps_0(x_t, c_r)|^2; delta makes the encoder answer eps_0(x_t, c)."""
    size = config.train.batch_size
    rows_of = weighed_batches(task, size, config.alpha, forget_set(task, config.prompts))
    words = words_of(task.model)

    def batches(step: int) -> Batch:
        if step < config.attack_from:
            return rows_of(step), None
        stream = task.generator(~step)
        chosen = torch.randint(len(words), (size, config.vectors), generator=stream)
        return rows_of(step), words.embedded(chosen)

    def loss(batch: Batch, base: Base) -> dict[str, Tensor]:
        ((forget, prompts), *retained), start = batch
        rows, texts = forget.cat(forget), [""] * len(forget) + prompts
        for retain, kept in retained:
            rows, texts = rows.cat(retain), texts + kept
        with base():
            known = task.predict(rows, texts)
        null, concept, *references = known.split(len(forget))
        asked = replace(forget, target=concept), prompts
        found = None if start is None else attack(task, asked, start, config)
        forgot = task.model.predict(forget.noisy, forget.t, task.cond(prompts, found))
        terms = {"forget": denoising(forgot, away(null, concept, config.guidance))}
        for (retain, kept), reference in zip(retained, references, strict=True):
            terms["retain"] = config.alpha * denoising(task.predict(retain, kept), reference)
        return terms

    return fine_tune(task, loss, batches, config)


METHODS = {"advunlearn": Method("advunlearn", PAPER, AdvUnlearnConfig(), edit)}
