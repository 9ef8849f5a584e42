"""A method of another package; tests/test_plugins.py copies the file into such a one."""

from __future__ import annotations

from dataclasses import dataclass

from erase.methods import Method
from erase.prompts.errors import FRACTION, check_ranges
from erase.task import Edit, Task


@dataclass
class FadeConfig:
    """Settings of fade."""

    strength: float = 0.5
    """share of the cross-attention's values that is taken away"""

    def __post_init__(self) -> None:
        check_ranges(self, {"strength": FRACTION})


def edit(task: Task, config: FadeConfig) -> Edit:
    """Make the cross-attention's values smaller, whatever the concept."""
    chosen = task.weights(r"attn2\.to_v\.weight")
    return Edit({name: param.detach() * (1 - config.strength) for name, param in chosen.items()})


FADE = Method("fade", "https://example.org/fade", FadeConfig(), edit)
