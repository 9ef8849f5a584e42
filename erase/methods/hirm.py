"""HiRM: high-level representation misdirection (ICLR 2026, https://arxiv.org/abs/2602.19631).

The first layer of a CLIP is trained until the last one's attention says noise in the concept's
place. In seconds, for every denoiser that reads it; not beside a T5 (SD 3, FLUX.1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from erase.latents.latent_set import epoch_rows, in_turn, texts_of
from erase.losses import denoising
from erase.methods import Method
from erase.models import DiffusionModel
from erase.models.pipelines import text_encoders
from erase.prompts.errors import POSITIVE, ErasureError, check_ranges
from erase.prompts.several import retained_prompts
from erase.task import Edit, Task
from erase.training.config import TrainConfig, TunedConfig
from erase.training.fine_tune import fine_tune
from erase.training.trainable import Base

PAPER, SPEAKS = "https://arxiv.org/abs/2602.19631", "self_attn.out_proj"


@dataclass
class HiRMConfig(TunedConfig):
    """Settings of HiRM."""

    draws = ()
    scope: str = r"^text_encoder(_\d)?\..*\blayers\.0\.(self_attn|mlp)\."
    strength: float = 20.0
    """root mean square of the direction's values; the paper's norm of 5000 over 77 tokens of width
    768 is 20.6"""
    alpha: float = 0.0
    """weight of the text states of retained prompts, pooled ones too, keeping to the base's; 0 is
    the paper"""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=50, lr=1e-4, batch_size=8, optimizer="AdamW")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"strength": POSITIVE, "alpha": (0, 1e6)})


@contextmanager
def last_attention(model: DiffusionModel) -> Iterator[list[Tensor]]:
    """Within the block, what each CLIP's last attention says is added to the list, each shape
    (n, tokens, width)."""
    said, speaking = list[Tensor](), list[nn.Module]()
    for encoder in text_encoders(model.pipeline()).values():
        own = [part for name, part in encoder.named_modules() if name.endswith(SPEAKS)]
        speaking += own[-1:]  # a T5 has none
    if not speaking:
        raise ErasureError(f"hirm turns a CLIP's last attention, and {model.name} has no CLIP")
    with ExitStack() as hooks:
        for part in speaking:
            hooks.callback(part.register_forward_hook(lambda *given: said.append(given[2])).remove)
        yield said


def edit(task: Task, config: HiRMConfig) -> Edit:
    """Minimise |h(c) - s u|^2: h what the last attention says at each token but the first, which is
    the same of every prompt, and u normal noise that never changes."""
    if other := [name for name in task.weights(config.scope) if not name.startswith("text_")]:
        held = f"scope {config.scope!r} holds {other[0]}"
        raise ErasureError(f"hirm trains text encoders, and {held}; take scope text_encoder")
    forget = [list(dict(concept.pairs())) for concept in task.concepts]
    retain, size = [*retained_prompts(task.concepts, task.earlier)] or [""], config.train.batch_size

    def batches(step: int) -> tuple[list[str], list[str]]:
        kept = epoch_rows(len(retain), step * size, size, task.seed)
        return in_turn(forget, step * size, size, task.seed), texts_of(retain, kept)

    def misdirected(said: Tensor) -> Tensor:
        u = torch.randn(said.shape[1:], generator=task.generator(0)).to(said)
        return denoising(said[:, 1:], (config.strength * u).expand_as(said)[:, 1:])

    def loss(batch: tuple[list[str], list[str]], base: Base) -> dict[str, Tensor]:
        prompts, kept = batch
        with last_attention(task.model) as found:
            task.cond(prompts)
        terms = {"forget": torch.stack([*map(misdirected, found)]).mean()}
        if config.alpha:
            with base():
                wanted = task.cond(kept).tensors()
            apart = map(denoising, task.cond(kept).tensors(), wanted)
            terms["retain"] = config.alpha * torch.stack([*apart]).sum()
        return terms

    return fine_tune(task, loss, batches, config)


METHODS = {"hirm": Method("hirm", PAPER, HiRMConfig(), edit)}
