"""HiRM: high-level representation misdirection (ICLR 2026, https://arxiv.org/abs/2602.19631).

The first layer of the text encoder is trained until the last one's attention says, in the place of
the concept, a direction that means nothing. In seconds, and the encoder serves every denoiser that
reads it; not where the denoiser reads others beside it (T5), which still say the concept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from erase.latents.latent_set import epoch_rows, texts_of
from erase.methods import Method
from erase.models import DiffusionModel
from erase.models.pipelines import text_encoders
from erase.prompts.errors import POSITIVE, check_ranges
from erase.task import Edit, Task
from erase.training.config import TrainConfig, TunedConfig
from erase.training.fine_tune import fine_tune
from erase.training.trainable import Base

PAPER = "https://arxiv.org/abs/2602.19631"


@dataclass
class HiRMConfig(TunedConfig):
    """Settings of HiRM."""

    scope: str = r"^text_encoder(_\d)?\..*\.layers\.0\.(self_attn|mlp)\."
    strength: float = 5000.0
    """length of the direction"""
    alpha: float = 0.0
    """weight of the retained prompts' text states keeping to the base's; 0 is the paper"""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=50, lr=1e-4, batch_size=8, optimizer="AdamW", optimizer_args={"weight_decay": 0.0}
        )
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"strength": POSITIVE, "alpha": (0, 1e6)})


@contextmanager
def last_attention(model: DiffusionModel) -> Iterator[list[Tensor]]:
    """Within the block, the outputs of the last self-attention of each CLIP text encoder that runs,
    each of shape (n, tokens, width), are added to the list."""
    outputs: list[Tensor] = []
    hooks = []
    for encoder in text_encoders(model.pipeline()).values():
        found = [
            part for name, part in encoder.named_modules() if name.endswith("self_attn.out_proj")
        ]
        for part in found[-1:]:  # a T5 has none
            hooks.append(part.register_forward_hook(lambda _, __, output: outputs.append(output)))
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def edit(task: Task, config: HiRMConfig) -> Edit:
    """Minimise |h(c) - strength * u|^2 over the first layer: h the last attention's output at every
    token of the concept's prompt, u a random unit vector that never changes."""
    forget = [prompt for concept in task.concepts for prompt, _ in concept.pairs()]
    retain = [prompt for concept in task.concepts for prompt in concept.retain] or [""]
    size = config.train.batch_size

    def batches(step: int) -> tuple[list[str], list[str]]:
        rows = [epoch_rows(len(texts), step * size, size, task.seed) for texts in (forget, retain)]
        return texts_of(forget, rows[0]), texts_of(retain, rows[1])

    def loss(batch: tuple[list[str], list[str]], base: Base) -> dict[str, Tensor]:
        with last_attention(task.model) as found:
            task.cond(batch[0])
        terms = {"forget": torch.stack([misdirected(output) for output in found]).mean()}
        if config.alpha:
            with base():
                wanted = task.cond(batch[1]).embeddings
            terms["retain"] = config.alpha * F.mse_loss(task.cond(batch[1]).embeddings, wanted)
        return terms

    def misdirected(output: Tensor) -> Tensor:
        u = F.normalize(torch.randn(output.shape[-1], generator=task.generator(0)), dim=0)
        return F.mse_loss(output.float(), (config.strength * u).to(output).expand_as(output))

    return fine_tune(task, loss, batches, config)


METHODS = {"hirm": Method("hirm", PAPER, HiRMConfig(), edit)}
