"""outcomes.json, beside report.json: each judgement behind its scores, which pair two runs.

It also says where the images lie, so that runs can be looked at beside each other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from erase.eval.images import ImageSet
from erase.eval.report.report import EvalReport
from erase.eval.scores import Outcomes, Score
from erase.files import atomic_write, errors_named
from erase.prompts.errors import ErasureError

FILE, SCHEMA_VERSION = "outcomes.json", 1
AGAIN = "evaluate again to make it anew, or delete it to compare without pairs"


@dataclass(frozen=True)
class KeptOutcomes:
    """What a report leaves out: the outcomes of its scores, and what was asked in each case."""

    outcomes: dict[str, dict[str, Outcomes]]
    """row -> score -> case and value of each judgement; only of scores that know them"""
    asked: dict[int, str]
    """case -> digest of its prompt and seed"""
    images: dict[str, str]
    """row -> folder of its images, as seen from the report's"""
    base_sha256: str
    """of the base's images, all together"""

    @classmethod
    def of(cls, report: EvalReport, images: Mapping[str, ImageSet], folder: Path) -> KeptOutcomes:
        """Those of a report that will lie in `folder`; `images`: row -> its images,
        the base's first."""
        outcomes: dict[str, dict[str, Outcomes]] = {}
        for row, scores in report.rows.items():
            outcomes[row] = {score.name: score.outcomes for score in scores if score.outcomes}
        base = next(iter(images.values()))
        return cls(
            outcomes,
            {row.case: _digest([row.prompt, row.seed]) for row in base.rows},
            {row: _seen_from(folder, own.folder) for row, own in images.items()},
            _digest([row.sha256 for row in base.rows]),
        )

    def save(self, folder: Path) -> None:
        """Write the file."""
        rows: dict[str, Any] = {}
        for row, scores in self.outcomes.items():
            rows[row] = {name: _columns(outcomes) for name, outcomes in scores.items()}
        content = {"schema_version": SCHEMA_VERSION, "base_sha256": self.base_sha256}
        content |= {"images": self.images, "asked": self.asked, "rows": rows}
        with atomic_write(folder / FILE) as aside:
            aside.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> KeptOutcomes | None:
        """Those beside a report; None where there are none.

        Raises:
            ErasureError: the file is damaged, or of another schema.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        with errors_named(path, AGAIN):
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema {content['schema_version']}, not {SCHEMA_VERSION}")
            outcomes: dict[str, dict[str, Outcomes]] = {}
            for row, scores in content["rows"].items():
                outcomes[row] = {name: _outcomes(columns) for name, columns in scores.items()}
            asked = {int(case): str(digest) for case, digest in content["asked"].items()}
            images = {str(row): str(place) for row, place in content["images"].items()}
            return cls(outcomes, asked, images, str(content["base_sha256"]))

    def scored(self, row: str, score: Score, where: Path) -> Score:
        """The score with its outcomes, where it has any.

        Raises:
            ErasureError: they are of another evaluation; `where` names the folder.
        """
        try:
            return replace(score, outcomes=self.outcomes.get(row, {}).get(score.name, ()))
        except ErasureError as error:
            raise ErasureError(
                f"{where / FILE} is of another evaluation than the report beside it ({error}); "
                f"{AGAIN}"
            ) from error

    def questions(self, score: Score) -> list[str]:
        """What was asked in each of its outcomes."""
        return [self.asked.get(case, "") for case, _ in score.outcomes]


def _columns(outcomes: Outcomes) -> dict[str, list[float]]:
    return {"cases": [case for case, _ in outcomes], "values": [value for _, value in outcomes]}


def _outcomes(columns: dict[str, Any]) -> Outcomes:
    cases, values = map(int, columns["cases"]), map(float, columns["values"])
    return tuple(zip(cases, values, strict=True))


def _seen_from(folder: Path, place: Path) -> str:
    """The way from one folder to another; on another drive there is none but the whole path."""
    try:
        return Path(os.path.relpath(place, folder)).as_posix()
    except ValueError:
        return place.absolute().as_posix()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:16]
