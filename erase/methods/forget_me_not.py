"""Forget-Me-Not (Zhang et al., CVPR workshops 2024, https://arxiv.org/abs/2303.17591).

Attention resteering: no part of the image looks at the concept's name any more. Quick, and needs no
anchor; what other words of the prompt tell about the concept is still looked at."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from erase.methods import Method
from erase.objectives.cross_attention import attended, attention_to, find_layers, name_places
from erase.prompts.errors import check_ranges
from erase.task import Edit, Task
from erase.training.batches import PromptedRows, retain_terms, weighed_batches
from erase.training.config import TrainConfig, TunedConfig
from erase.training.fine_tune import fine_tune
from erase.training.trainable import Base

PAPER = "https://arxiv.org/abs/2303.17591"


@dataclass
class ForgetMeNotConfig(TunedConfig):
    """Settings of Forget-Me-Not."""

    draws = ("n_forget",)
    scope: str = "xattn"
    alpha: float = 0.0
    """weight of the denoising error of retained latents; the paper has none"""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=35, lr=2e-6, batch_size=4, optimizer="AdamW")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"alpha": (0, 1e6)})


def edit(task: Task, config: ForgetMeNotConfig) -> Edit:
    """Minimise sum_l sum_t |A_l[t]|^2 + alpha |eps(x_t, c_r) - noise|^2: A_l[t] the attention maps
    of layer l to the tokens t of the concept's names, mean over heads."""
    find_layers(task.model)  # refused, where there are none, before latents are sampled
    captions = list(dict.fromkeys(task.forget().prompts))
    states = task.cond(captions[:1]).embeddings.shape[1]
    name_places(task, task.concepts, captions, states)  # refuses one without a name

    def loss(batch: tuple[PromptedRows, ...], base: Base) -> dict[str, Tensor]:
        (rows, prompts), *retained = batch
        looked_at = attention_to(*attended(task, task.concepts, rows, prompts))
        return {"forget": looked_at, **retain_terms(task, config.alpha, retained)}

    batches = weighed_batches(task, config.train.batch_size, config.alpha)
    return fine_tune(task, loss, batches, config)


METHODS = {"forget-me-not": Method("forget-me-not", PAPER, ForgetMeNotConfig(), edit)}
