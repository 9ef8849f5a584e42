"""What learns beside the model and is thrown away afterwards: a critic, say, that tells its answers
from others."""

from __future__ import annotations

from typing import Any, Protocol

from erase.training.trainable import Base


class Opponent(Protocol):
    """It takes one step before each step of the model, which finds it still; its state is kept with
    that of the training."""

    def learn(self, batch: Any, base: Base) -> None:
        """One step, the same in all processes.

        Args:
            batch: this process's share of the batch that the model will see.
            base: within its block the model holds its base weights.
        """

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs: nested mappings of tensors and numbers."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from such a state."""
