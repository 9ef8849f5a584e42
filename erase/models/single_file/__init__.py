"""Single-file checkpoints: their formats, what they hold, and the way into stock pipelines and
back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["load_single_file", "write_single_file"]

if TYPE_CHECKING:
    from erase.models.single_file.conversion import load_single_file, write_single_file
else:

    def __getattr__(name: str) -> Any:
        """The two ways, imported when asked for: they take seconds, and import modules that import
        this package."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

        from erase.models.single_file import conversion

        return getattr(conversion, name)
