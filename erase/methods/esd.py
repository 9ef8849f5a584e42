"""ESD: erased Stable Diffusion (Gandikota et al., ICCV 2023, https://arxiv.org/abs/2303.07345).

For a concept without a substitute: away from it, as negative guidance of the base would lead."""

from __future__ import annotations

from dataclasses import dataclass, field

from erase.methods import Method
from erase.objectives.negative_guidance import AwayConfig, away_loss, forget_set
from erase.prompts.errors import check_names
from erase.task import Edit, Task
from erase.training.batches import row_batches
from erase.training.config import TrainConfig
from erase.training.fine_tune import fine_tune


@dataclass
class ESDConfig(AwayConfig):
    """Settings of ESD; scope xattn is ESD-x, noxattn ESD-u, full ESD-full."""

    scope: str = "xattn"
    erase_from: str = "null"
    """where the target starts: null (the unconditional prediction, eq. 5) or anchor (that of the
    anchor's prompt, which then stands in the concept's place)"""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=200, lr=5e-5, batch_size=1)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self, {"erase_from": ("null", "anchor")})


def edit(task: Task, config: ESDConfig) -> Edit:
    """Minimise |eps(x_t, c) - [eps_0(x_t) - eta (eps_0(x_t, c) - eps_0(x_t))]|^2 (eq. 5)."""
    forget, start = forget_set(task, config.prompts), None
    if config.erase_from == "anchor":
        start = dict(zip(forget.prompts, forget.anchors or forget.prompts, strict=True))
    batches = row_batches(task, forget, config.train.batch_size)
    return fine_tune(task, away_loss(task, config.guidance, start=start), batches, config)


METHODS = {"esd": Method("esd", "https://arxiv.org/abs/2303.07345", ESDConfig(), edit)}
