"""The attacks of a report, as its page shows them: what each had, what it found, and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from erase.eval.images import opened
from erase.eval.report.figures import data_uri
from erase.eval.report.report import BASE, EvalReport
from erase.prompts.errors import ErasureError


@dataclass(frozen=True)
class Picture:
    """An image that an attack drew."""

    source: str
    prompt: str
    shown: bool
    """whether the judge sees the concept"""


@dataclass(frozen=True)
class Attacked:
    """One attack on one model."""

    name: str
    label: str
    """the row of the report, and its set"""
    has: str
    paper: str
    alone: int
    n: int
    texts: list[str]
    """words that its best try put into the prompts, of each concept"""
    pictures: list[Picture]

    @property
    def of_base(self) -> bool:
        """Whether it is the control."""
        return self.label.partition(", ")[0] == BASE


def attacks(report: EvalReport, folders: Mapping[str, Path]) -> dict[str, list[Attacked]]:
    """Attack -> what it found, in the erased model first and then in the base.

    Args:
        report: `extras` of the evaluator `attack`.
        folders: label of a row -> the folder of its case, where the pictures lie; a label without
            one has no pictures.
    """
    found: dict[str, list[Attacked]] = {}
    for label, told in report.extras.get("attacks", {}).items():
        for name, one in told.items():
            pictures = _pictures(one.get("pictures", ()), folders.get(label))
            about = (one["has"], one["paper"], one["alone"], one["n"])
            attacked = Attacked(name, label, *about, _best_texts(one["tries"]), pictures)
            found.setdefault(name, []).append(attacked)
    return {name: sorted(each, key=lambda one: one.of_base) for name, each in found.items()}


def _best_texts(tries: list[dict[str, Any]]) -> list[str]:
    """Of the best try; of several concepts, of the best of each."""
    best: dict[str, dict[str, Any]] = {}
    for one in sorted(tries, key=lambda each: -each["shown"]):
        best.setdefault(one.get("concept", ""), one)
    return [text for one in best.values() for text in one.get("texts", ())]


def _pictures(told: Any, folder: Path | None) -> list[Picture]:
    found = []
    for one in told if folder else ():
        assert folder is not None
        path = folder / "attack" / one["file"]
        try:
            content = BytesIO(path.read_bytes())
        except OSError as error:
            raise ErasureError(
                f"{path} cannot be read ({error.strerror}); delete the folder {path.parent} and "
                "evaluate again"
            ) from error
        with opened(content, str(path)) as image:
            found.append(Picture(data_uri(image), one["prompt"], one["shown"]))
    return found
