"""The file of a training state: whole or absent, of one run alone, with a checksum; nothing in it
is executed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from erase.claims import check_artifact
from erase.files import atomic_write, errors_named
from erase.prompts.errors import ErasureError, reason
from erase.tensors import sha256_of

ENTRIES = (
    *("mask", "values", "optimizer", "scaler", "average", "losses", "opponent"),
    *("about", "sha256"),
)
RESTART = "delete it to start the training again"


@dataclass(frozen=True)
class Checkpoint:
    """Where a training state is kept, and whose it is."""

    path: Path
    about: Mapping[str, str]
    """the run, as `erase.claims` compares it"""

    def write(self, state: Mapping[str, Any]) -> None:
        """Write a state in the place of an earlier one.

        Raises:
            ErasureError: it cannot be written, for example since the disk is full.
        """
        state = {**state, "about": dict(self.about)}
        state["sha256"] = sha256_of(state)
        with atomic_write(self.path) as aside:
            try:
                torch.save(state, aside)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # how torch's writer says that the disk is full
                raise ErasureError(
                    f"cannot write {self.path}: the disk is full, or fails ({reason(error)}); free "
                    "some space, or choose another output folder"
                ) from error

    def read(self, mask: str) -> dict[str, Any]:
        """The state that is there; torch's weights-only reader runs no pickled code.

        Args:
            mask: digest of the mask that it must be of.

        Raises:
            ErasureError: it is damaged, or of another run or mask.
        """
        state = self._load()
        with errors_named(self.path, RESTART):
            if state["mask"] != mask:
                raise ErasureError(
                    f"the training state {self.path} is of another mask; go on with that, or "
                    f"{RESTART}"
                )
            entries = {name: state[name] for name in ENTRIES}
            check_artifact(self.path, entries["about"], self.about, RESTART)
            if entries.pop("sha256") != sha256_of(entries):
                raise ErasureError(
                    f"{self.path} is damaged: it holds other values than were written; {RESTART}"
                )
        return entries

    def _load(self) -> Any:
        try:
            return torch.load(self.path, weights_only=True, map_location="cpu", mmap=True)
        except Exception as error:  # torch's own words are paragraphs, on how to run the code in it
            fault = (
                error.strerror
                if isinstance(error, OSError)
                else "it is damaged, or holds other things than tensors and numbers"
            )
            raise ErasureError(
                f"cannot read the training state {self.path}: {fault}; {RESTART}"
            ) from error
