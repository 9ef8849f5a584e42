"""A method of another package; tests/test_plugins.py copies the file into such a one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from erase.latents.prepare import LatentSet
from erase.methods import Edit, Method
from erase.models import DiffusionModel
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import FRACTION, check_ranges


@dataclass
class FadeConfig:
    """Settings of fade."""

    strength: float = 0.5
    """share of the cross-attention's values that is taken away"""

    def __post_init__(self) -> None:
        check_ranges(self, {"strength": FRACTION})


def edit(
    model: DiffusionModel,  # seam
    concepts: list[ConceptSpec],  # seam
    forget: LatentSet,  # seam
    retain: LatentSet,  # seam
    config: FadeConfig,
    *,
    seed: int,  # seam
    accelerator: Accelerator,  # seam
    folder: Path | None = None,  # seam
) -> Edit:
    """Make the cross-attention's values smaller, whatever the concept."""
    params = model.parameters()
    chosen = [name for name in params if name.endswith("attn2.to_v.weight")]
    return Edit({name: params[name].detach() * (1 - config.strength) for name in chosen}, [])


FADE = Method("fade", "https://example.org/fade", FadeConfig(), edit)
