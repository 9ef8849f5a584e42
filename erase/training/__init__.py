"""Masked fine-tuning: the loop, the weights that it may change, how the model runs meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["fit", "make_accelerator"]

if TYPE_CHECKING:
    from erase.training.loop import fit, make_accelerator
else:

    def __getattr__(name: str) -> Any:
        """The loop's functions, imported when asked for: it imports `erase.parallel`, which imports this package."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

        from erase.training import loop

        return getattr(loop, name)
