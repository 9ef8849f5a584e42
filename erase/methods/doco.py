"""DoCo: domain correction (Wu et al., AAAI 2025, https://arxiv.org/abs/2405.15304).

A critic learns to tell the clean images that the model sees under the concept from those that the
base sees under the anchor; the model learns to deceive it. Where the concept varies more than its
prompts say; the critic costs a third of the time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from erase.latents.batches import clean
from erase.latents.latent_set import texts_of
from erase.losses import denoising
from erase.methods import Method
from erase.objectives.critic import Critic
from erase.objectives.remap import Remap, RemapBatch, RemapConfig
from erase.prompts.errors import FRACTION, POSITIVE, check_ranges
from erase.task import Edit, Task
from erase.training.config import TrainConfig, TunedConfig
from erase.training.fine_tune import fine_tune
from erase.training.trainable import Base

PAPER = "https://arxiv.org/abs/2405.15304"


@dataclass
class DoCoConfig(TunedConfig):
    """Settings of DoCo."""

    scope: str = "xattn_kv"
    alpha: float = 1.0
    """weight of the denoising error of retained latents"""
    anchor_latents: float = 0.9
    """fraction of the latents that show the anchor; the paper's images all do"""
    critic_steps: int = 1000
    """steps of the critic before the first of the model"""
    critic_lr: float = 1e-3
    """learning rate of the critic; 5e-4 for styles"""
    combine: str = "surgery"
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=1000, lr=5e-5, batch_size=8, optimizer="AdamW")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"alpha": (0, 1e6), "anchor_latents": FRACTION, "critic_lr": POSITIVE})
        check_ranges(self, {"critic_steps": (0, 10**6)})


class Adversary:
    """DoCo's critic, and the losses of both sides."""

    def __init__(self, task: Task, config: DoCoConfig) -> None:
        self.task, self.config = task, config
        drawn = RemapConfig(train=config.train, anchor_latents=config.anchor_latents)
        self.remap = Remap(task, replace(drawn, retain_dropout=0.0))
        channels = task.model.latent_shape[0]
        self.critic = Critic(channels, config.critic_lr, task.seed, task.model.device)
        self.state, self.restore = self.critic.state, self.critic.restore

    def learn(self, batch: RemapBatch, base: Base) -> None:
        """The critic's step: what the base sees under the anchor is 0, the model's concept 1."""
        forget = self.remap.forget_set
        with torch.no_grad():
            targets = self._seen(batch, forget.prompts)
        with base():
            anchors = self._seen(batch, forget.anchors or forget.prompts)
        self.critic.learn_from(anchors, targets)

    def loss(self, batch: RemapBatch, base: Base) -> dict[str, Tensor]:
        """The model's: what it sees under the concept is to be called the anchor."""
        forget, retain = self.remap.forget_set, self.remap.retain_set
        kept = self.task.predict(batch.retain, texts_of(retain.prompts, batch.retain_rows))
        return {
            "forget": self.critic.verdict(self._seen(batch, forget.prompts), 0.0),
            "retain": self.config.alpha * denoising(kept, batch.retain.target),
        }

    def _seen(self, batch: RemapBatch, prompts: tuple[str, ...]) -> Tensor:
        """The clean latents that the model sees in the forget rows under these prompts."""
        told = texts_of(prompts, batch.forget_rows)
        return clean(self.task.model, batch.forget, self.task.predict(batch.forget, told))


def edit(task: Task, config: DoCoConfig) -> Edit:
    """min_D BCE(D(x_0(eps_0(x_t, a))), 0) + BCE(D(x_0(eps(x_t, c))), 1) against
    min_eps BCE(D(x_0(eps(x_t, c))), 0) + alpha |eps(x_t, c_r) - noise|^2, in turns, by surgery."""
    adversary = Adversary(task, config)
    batches = adversary.remap.batches
    for step in range(config.critic_steps):
        adversary.learn(batches(step), torch.no_grad)
    return fine_tune(task, adversary.loss, batches, config, opponent=adversary)


METHODS = {"doco": Method("doco", PAPER, DoCoConfig(), edit)}
