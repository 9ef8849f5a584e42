"""The other files of a run folder, as far as a report tells them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from erase.delta import ErasedDelta
from erase.files import errors_named
from erase.mask import SaliencyMask
from erase.prompts.errors import ErasureError


@dataclass
class Evidence:
    """The other files of a run folder, beside its delta, for the report."""

    losses: list[float] = field(default_factory=list)
    mask: SaliencyMask | None = None
    overlap: float | None = None
    """of the weights that forgetting and retaining look at, where the mask tells it"""

    @classmethod
    def of(cls, folder: Path, delta: ErasedDelta | None = None) -> Evidence:
        """Losses and mask of an erasure's folder, as far as they are there.

        Args:
            folder: of a run.
            delta: the delta that they must be of; None: not compared.

        Raises:
            ErasureError: they are damaged, or of another delta.
        """
        training, mask = folder / "training.json", folder / "mask.safetensors"
        record: dict[str, Any] = {"losses": []}
        with errors_named(training, "delete it to report without the losses, or erase again"):
            if training.exists():
                record = json.loads(training.read_text(encoding="utf-8"))
            losses = list(map(float, record["losses"]))
        evidence = cls(losses, SaliencyMask.load(mask) if mask.exists() else None)
        if evidence.mask and "overlap" in evidence.mask.metadata:
            with errors_named(mask, "delete it to report without the mask, or erase again"):
                evidence.overlap = float(evidence.mask.metadata["overlap"])

        if delta and (losses or evidence.mask):
            _check_run(folder / "run.json", delta)
            if record.get("delta_sha256", delta.sha256) != delta.sha256:
                raise _of_another(training, delta)
            if evidence.mask and not _may_change(evidence.mask, delta):
                raise _of_another(mask, delta)
        return evidence


def _check_run(path: Path, delta: ErasedDelta) -> None:
    """Refuse the folder of a run of another base, method or concept than the delta's."""
    if not path.exists():
        return
    with errors_named(path, "evaluate the delta in a folder of its own"):
        run = dict(json.loads(path.read_text(encoding="utf-8")))
        facts = [run.get(key) for key in ("base_fingerprint", "method")]
        concepts = json.loads(run.get("concepts", "[]"))
    own = [delta.metadata.get(key) for key in ("base_fingerprint", "method")]
    if facts != own or concepts != delta.concepts:
        raise _of_another(path, delta)


def _may_change(mask: SaliencyMask, delta: ErasedDelta) -> bool:
    """Whether the mask is of the weights that the delta began from and lets every weight change
    that it changed; of the last request, where others came before: theirs may lie elsewhere."""
    if requests := delta.requests:
        return mask.metadata.get("base_fingerprint") == requests[-1]["start"]
    if mask.metadata.get("base_fingerprint") != delta.metadata.get("base_fingerprint"):
        return False
    pairs = [(bits, mask.bits.get(name)) for name, bits in delta.bits.items()]
    return all(
        own is not None and own.shape == bits.shape and not (bits & ~own).any()
        for bits, own in pairs
    )


def _of_another(path: Path, delta: ErasedDelta) -> ErasureError:
    return ErasureError(
        f"{path} is of another delta than {delta.source}; name the delta of that run, or move this "
        "one into a folder of its own"
    )
