"""Concept ablation (Kumari et al., ICCV 2023, https://arxiv.org/abs/2303.13516), its model-based
form.

On images of the anchor, the concept's prediction becomes the anchor's. Gentle, on the projections
of text states alone; for concepts with a near anchor ("Grumpy cat", "cat")."""

from __future__ import annotations

from dataclasses import dataclass, field

from erase.methods import Method
from erase.objectives.remap import RemapConfig, trained
from erase.task import Edit, Task
from erase.training.config import TrainConfig

PAPER = "https://arxiv.org/abs/2303.13516"


@dataclass
class ConceptAblationConfig(RemapConfig):
    """Settings of concept ablation."""

    scope: str = "xattn_kv"
    anchor_from: str = "current"
    retain_target: str = "noise"
    anchor_latents: float = 0.9
    retain_dropout: float = 0.0
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=100, lr=1.6e-5, batch_size=8, optimizer="AdamW")
    )


def edit(task: Task, config: ConceptAblationConfig) -> Edit:
    """Minimise |eps(x_t, c*) - sg eps(x_t, c)|^2 + alpha |eps(x_t, c_r) - noise|^2: c*
    the concept's prompt, c the anchor's, x_t of images of the anchor."""
    return trained(task, config)


METHODS = {
    "concept-ablation": Method("concept-ablation", PAPER, ConceptAblationConfig(), edit),
}
