"""SalUn: saliency unlearning (Fan et al., ICLR 2024, https://arxiv.org/abs/2310.12508).

The weights that the forget loss is most sensitive to are found once (the mask); only they are then
tuned: the forget prompt's prediction becomes the anchor's, retained prompts keep theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from erase.latents.config import LatentConfig
from erase.methods import Method
from erase.objectives.remap import RemapConfig, trained
from erase.task import Edit, Task
from erase.training.config import MaskConfig, TrainConfig

PAPER = "https://arxiv.org/abs/2310.12508"
_no_mask = partial(MaskConfig, density=1.0)
_small_steps = partial(TrainConfig, steps=144, lr=1e-3, schedule="linear", warmup=8, batch_size=2)
_large_batches = partial(TrainConfig, batch_size=8)
_many_steps = partial(_large_batches, steps=300, lr=4e-4, schedule="linear")
_many_latents = LatentConfig(n_forget=96, n_retain=192, steps=10)


@dataclass
class SalUnConfig(RemapConfig):
    """Settings of SalUn, as they measure best here.
    Few weights, chosen by benefit, in many small steps to a target a little beyond the anchor."""

    alpha: float = 5.0
    beyond: float = 1.0
    beyond_limit: float | None = 0.02
    noise_power: float = 2.0
    mask: MaskConfig = field(default_factory=partial(MaskConfig, "benefit", 0.04, batches=8))
    train: TrainConfig = field(default_factory=_small_steps)


@dataclass
class SalUnTextConfig(SalUnConfig):
    """What is given the text states, drawn back as retained prompts notice; no mask, long steps."""

    scope: str = "text_in"
    prox_text: float = 2.0
    mask: MaskConfig = field(default_factory=_no_mask)
    train: TrainConfig = field(default_factory=partial(_small_steps, lr=3e-3))


@dataclass
class SalUnTwofoldConfig(SalUnConfig):
    """Taken out twice within the mask: in the cross-attention, and outside of it.
    What is retained weighs twice as much, for it bears both."""

    alpha: float = 10.0
    twofold: bool = True


@dataclass
class SalUnHalfConfig(RemapConfig):
    """The paper's mask, half of the weights, under our objective: to the anchor and no further."""

    mask: MaskConfig = field(default_factory=MaskConfig)
    train: TrainConfig = field(default_factory=_many_steps)


@dataclass
class SalUnPaperConfig(SalUnHalfConfig):
    """Settings of the reference (https://github.com/OPTML-Group/Unlearn-Saliency), for nudity."""

    alpha: float = 0.1
    anchor_from: str = "current"
    retain_target: str = "noise"
    share_latents: bool = False
    anchor_latents: float = 0.0
    retain_dropout: float = 0.0
    shuffle: bool = False
    train: TrainConfig = field(default_factory=partial(_large_batches, steps=100, lr=1e-5))


@dataclass
class SalUnSoftConfig(SalUnHalfConfig):
    """SalUn-soft: no mask beforehand; small changes go back to the base's bits at each step."""

    mask: MaskConfig = field(default_factory=_no_mask)
    prox_l1: float = 0.1


def edit(task: Task, config: RemapConfig) -> Edit:
    """Erase the task's concepts."""
    return trained(task, config)


METHODS = {
    "salun": Method("salun", PAPER, SalUnConfig(), edit),
    "salun-text": Method("salun-text", PAPER, SalUnTextConfig(), edit),
    "salun-twofold": Method("salun-twofold", PAPER, SalUnTwofoldConfig(), edit),
    "salun-half": Method("salun-half", PAPER, SalUnHalfConfig(), edit, _many_latents),
    "salun-soft": Method("salun-soft", PAPER, SalUnSoftConfig(), edit),
    "salun-paper": Method("salun-paper", PAPER, SalUnPaperConfig(), edit, _many_latents),
}
