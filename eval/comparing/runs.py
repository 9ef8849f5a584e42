"""The runs that are compared: reports of one base, under names that tell them apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from erase.eval.images import ImageSet
from erase.eval.outcomes import KeptOutcomes
from erase.eval.report.report import BASE, ERASED, EvalReport, words
from erase.eval.scores import Score
from erase.prompts.errors import ErasureError

REPORT = "report.json"
GENERIC = ("report", "reports", "eval", "evaluation")
"""names of folders that tell nothing of the run"""


@dataclass(frozen=True)
class Run:
    """One evaluation: its report, and what lies beside it."""

    name: str
    folder: Path
    report: EvalReport
    kept: KeptOutcomes | None
    base_folder: Path | None = None
    """of the base's images, where the user names it"""

    @property
    def base(self) -> str:
        """The base's fingerprint; empty where only its images are known."""
        return str(self.report.provenance.get("base_fingerprint") or "")

    @property
    def forgot(self) -> list[str]:
        """The targets."""
        return words(self.report.concept, "target")

    @property
    def base_name(self) -> str:
        """For a sentence: `canvas (6e31c05c)`."""
        name = self.report.provenance.get("base_id") or "a base that it does not name"
        return f"{name} ({self.base[:8]})" if self.base else str(name)

    def score(self, row: str, name: str) -> Score | None:
        """A score with its outcomes, where they are known."""
        score = self.report.score(row, name)
        if score is None or self.kept is None:
            return score
        return self.kept.scored(row, score, self.folder)

    @cached_property
    def images(self) -> dict[str, ImageSet]:
        """Row -> its images, of those whose folder is still there and whole."""
        found = {row: self._images(row) for row in (BASE, ERASED)}
        return {row: images for row, images in found.items() if images}

    def _images(self, row: str) -> ImageSet | None:
        told = self.kept.images.get(row) if self.kept else None
        places = [self.folder / told] if told else [self.folder / row, self.folder.parent / row]
        if row == BASE and self.base_folder:
            places = [self.base_folder]
        for place in places:
            if place.is_dir():
                # finished images of another program have no manifest
                try:
                    return ImageSet.open(place)
                except ErasureError:
                    continue
        return None


def load_runs(
    paths: Sequence[str | Path],
    names: Sequence[str] = (),
    base_images: str | Path | None = None,
) -> list[Run]:
    """The runs at these paths, all of one base.

    Args:
        paths: each a report.json, the folder that holds it, or a run's folder with it in `report`.
        names: one for each; by default the part of its path that tells it from the others.
        base_images: where the base's images lie, for reports that do not say it.

    Raises:
        ErasureError: fewer than two; a report is missing or damaged, or of another base than the
            first; names that do not pair.
    """
    files = [_report_at(Path(path)) for path in paths]
    if len(files) < 2:
        raise ErasureError("two runs at least are compared; name one more report")
    if names and len(names) != len(files):
        raise ErasureError(f"{len(files)} runs but {len(names)} names; give one --name for each")
    folder = None if base_images is None else Path(base_images)
    runs = [
        Run(name, file.parent, EvalReport.load(file), KeptOutcomes.load(file.parent), folder)
        for name, file in zip(names or names_of(files), files, strict=True)
    ]
    _check_names([run.name for run in runs])
    for run in runs[1:]:
        _check_base(runs[0], run)
    return runs


def names_of(files: Sequence[Path]) -> list[str]:
    """Of each report its folder's name, with as many parents as tell all of them apart."""
    parts = [_telling(file) for file in files]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{part[-1]} ({place})" for place, part in enumerate(parts, 1)]


def _telling(file: Path) -> list[str]:
    parts = list(file.absolute().parent.parts[1:])
    while len(parts) > 1 and parts[-1].lower() in GENERIC:
        parts.pop()
    return parts or [file.stem]


def _report_at(path: Path) -> Path:
    for file in (path, path / REPORT, path / "report" / REPORT):
        if file.is_file():
            return file
    raise ErasureError(
        f"{path} holds no {REPORT}; name what erase-evaluate wrote, its folder or the file itself"
    )


def _check_names(names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1 or name == BASE:
            raise ErasureError(
                f"the name {name!r} is {'given twice' if count > 1 else 'that of the base'}; give "
                "each run another with --name"
            )


def _check_base(first: Run, other: Run) -> None:
    """Refuse two runs of different bases, or of bases that cannot be told to be the same."""
    if first.base and other.base:
        same = first.base == other.base
    else:
        drawn = [run.kept.base_sha256 if run.kept else "" for run in (first, other)]
        same = bool(drawn[0]) and drawn[0] == drawn[1]
    if not same:
        raise ErasureError(
            f"{other.name} is of the base {other.base_name}, and {first.name} of "
            f"{first.base_name}; only runs of one base can be compared: leave one out, or evaluate "
            "it again on the other's base and prompts"
        )
