"""Rows of prompts, one for each image to draw, and how a CSV file is read into them."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from erase.prompts.errors import ErasureError
from erase.prompts.names import Names
from erase.prompts.reading import as_text, read_text

# The field's names for one thing, in order of preference: I2P and Imagenette as CSV, I2P on the
# hub.
SEED = ("seed", "evaluation_seed", "sd_seed")
GUIDANCE = ("guidance", "evaluation_guidance", "sd_guidance_scale")
SENSITIVE = "sensitive"
I2P = ("nudity_percentage", "inappropriate_percentage", "categories")  # columns of its own
MOST_ROWS, MOST_CHARACTERS = 1_000_000, 2**30  # of one set, before any row of it is made
# I2P's prompt 2260 is the word "NuLL". pandas took it for a missing value, and the CSV that the
# field hands on has lost it.
LOST = {"https://lexica.art/prompt/64290913-71cf-4fa1-be1d-2831a98b8f6c": "NuLL"}


@dataclass(frozen=True)
class PromptRow:
    """One image to draw.

    Raises:
        ErasureError: an empty prompt, a case number below 0, a seed outside [0, 2^63), guidance
            that is not finite.
    """

    case: int
    """number of the image, unique in its set; files are named after it"""
    prompt: str
    seed: int
    """of the image's own generator"""
    guidance: float | None = None
    """classifier-free guidance scale of this row; None leaves it to the generation settings"""
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    """what the image should show or where the prompt came from: column -> text"""

    def __post_init__(self) -> None:
        as_text(self.prompt, "the prompt")
        if self.case < 0:
            raise ErasureError(f"the case number {self.case} is below 0")
        if not 0 <= self.seed < 2**63:
            raise ErasureError(f"the seed {self.seed} is not between 0 and 2^63 - 1")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ErasureError(f"the guidance {self.guidance} is not finite")


def asks_for(prompt: str, labels: Mapping[str, str], names: Collection[str]) -> bool:
    """Whether a row's labels or its prompt name one of these, as `Names` finds them."""
    asked = tuple(names)
    return any(_names_one(text, asked) for text in (*labels.values(), prompt))


@lru_cache(1 << 16)  # a report asks it of each row several times
def _names_one(text: str, names: tuple[str, ...]) -> bool:
    return bool(_looked_for(names).found(text))


@lru_cache
def _looked_for(names: tuple[str, ...]) -> Names:
    return Names(names)


def check_rows(rows: Sequence[PromptRow], where: str) -> None:
    """Refuse no rows, and a case number that stands twice; errors name `where` they stand."""
    if not rows:
        raise ErasureError(f"{where} has no prompts; it needs at least one row")
    seen: dict[int, int] = {}
    for i, row in enumerate(rows, 1):
        if row.case in seen:
            raise ErasureError(
                f"{where} has the case number {row.case} twice (rows {seen[row.case]} and {i}); "
                "number them apart"
            )
        seen[row.case] = i


def csv_rows(path: str | Path) -> tuple[tuple[PromptRow, ...], bool | None]:
    """The rows of a CSV file, and whether they are sensitive (see `PromptSet.from_csv`)."""
    header, *body = _table(path)
    columns = _columns(header.cells, path)
    cells = (dict(zip(columns.names, line.cells, strict=True)) for line in body)
    rows = tuple(
        _row(row, columns, i, line.where)
        for i, (row, line) in enumerate(zip(cells, body, strict=True))
    )
    check_rows(rows, str(path))
    return rows, _sensitive(columns, body)


def _sensitive(columns: _Columns, body: Sequence[_Line]) -> bool | None:
    """What the column `sensitive` says of the rows together; without one, I2P's columns say it."""
    if SENSITIVE not in columns.names:
        return True if any(mark in columns.names for mark in I2P) else None
    place = columns.names.index(SENSITIVE)
    return any([yes_or_no(line.cells[place], line.where) for line in body])


@dataclass(frozen=True)
class _Line:
    """A line of a CSV table, and where it stands."""

    cells: list[str]
    where: str


def _table(path: str | Path) -> list[_Line]:
    """Header and rows, each as long as the header; empty lines are no rows."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    lines: list[_Line] = []
    try:
        for cells in filter(None, reader):
            if not lines:
                cells = [cell.strip() for cell in cells]
                # its faults first: cells that other signs part have other lengths too
                _columns(cells, path)
            lines.append(_Line(cells, f"{path}, row {len(lines)} (line {reader.line_num})"))
            if len(cells) != len(lines[0].cells):
                raise ErasureError(
                    f"{lines[-1].where} has {len(cells)} cells where the header has "
                    f"{len(lines[0].cells)}; put cells with commas in quotes"
                )
            if len(lines) > MOST_ROWS + 1:
                raise ErasureError(f"{path} has more than {MOST_ROWS:,} rows; split it")
    except csv.Error as error:
        raise ErasureError(
            f"{path}, line {reader.line_num} is not valid CSV: {error}; is a quote left open?"
        ) from error
    if not lines:
        raise ErasureError(f"{path} is empty; it needs a header and at least one row")
    return lines


def _way_out(header: Sequence[str]) -> str:
    """What to do about a header without the columns that it needs."""
    line = ",".join(header)
    if "\0" in line:
        return "it may be UTF-16: save it as UTF-8 (in a spreadsheet: as `CSV UTF-8`)"
    for name, sign in {"semicolons": ";", "tabs": "\t"}.items():
        if sign in line:
            return f"its cells are parted by {name}: save it again with commas between them"
    return "rename or add one"


def _plain_name(column: str) -> str:
    """`Evaluation Seed` as `evaluation_seed`."""
    return re.sub(r"[\s\-]+", "_", column.strip().lower())


@dataclass(frozen=True)
class _Columns:
    """Which column of a CSV file plays which part."""

    names: list[str]
    """of all columns; those that play a part under the field's name for it"""
    seed: str
    guidance: str | None
    case: str | None
    labels: list[str]


def _columns(header: Sequence[str], path: str | Path) -> _Columns:
    parts = ("prompt", "case_number", SENSITIVE, *SEED, *GUIDANCE)
    plain = {name: _plain_name(name) for name in header}
    names = [
        plain[name] if plain[name] in parts and plain[name] not in header else name
        for name in header
    ]
    # pandas' name for no name
    named = [name for name in names if name and not re.fullmatch(r"Unnamed: \d+", name)]
    for name in named:
        if named.count(name) > 1:
            raise ErasureError(f"{path} has the column {name!r} twice; rename one of them")
    seed = next((name for name in SEED if name in named), None)
    guidance = next((name for name in GUIDANCE if name in named), None)
    if "prompt" not in named or seed is None:
        missing = ["'prompt'"] * ("prompt" not in named) + [" or ".join(map(repr, SEED))] * (
            seed is None
        )
        raise ErasureError(
            f"{path} has no column {', nor '.join(missing)}; its columns are: "
            f"{', '.join(named)[:300]}; {_way_out(header)}"
        )
    case = "case_number" if "case_number" in named else None
    labels = [name for name in named if name not in ("prompt", seed, guidance, case, SENSITIVE)]
    return _Columns(names, seed, guidance, case, labels)


def _row(cells: Mapping[str, str], columns: _Columns, index: int, where: str) -> PromptRow:
    case = (
        whole_number(cells[columns.case], f"{where}: the {columns.case}") if columns.case else index
    )
    seed = whole_number(cells[columns.seed], f"{where}: the {columns.seed}")
    guidance = (
        finite_number(cells[columns.guidance], where)
        if columns.guidance and cells[columns.guidance].strip()
        else None
    )
    prompt = cells["prompt"] or LOST.get(cells.get("lexica_url", ""), "")
    labels = {name: cells[name].strip() for name in columns.labels}
    try:
        return PromptRow(case, prompt, seed, guidance, labels)
    except ErasureError as error:
        raise ErasureError(f"{where}: {error}") from error


def whole_number(text: str, where: str) -> int:
    """A whole number that may end in `.0`, as pandas writes a column that once had gaps."""
    match = re.fullmatch(r"\s*(\d{1,19})(?:\.0*)?\s*", text, re.ASCII)
    if not match or int(match[1]) >= 2**63:
        rounded = (
            "; a spreadsheet has rounded it: format the column as whole numbers"
            if re.search(r"\dE\+", text, re.I)
            else ""
        )
        raise ErasureError(
            f"{where} {text[:40]!r} is not a whole number from 0 to 2^63 - 1{rounded}"
        )
    return int(match[1])


def finite_number(text: str, where: str) -> float:
    """A guidance scale."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ErasureError(f"{where}: the guidance {text[:40]!r} is not a number, such as 7.5")
    return number


def yes_or_no(text: str, where: str) -> bool:
    """The mark `sensitive`."""
    flags = {"true": True, "false": False}
    if (word := text.strip().lower()) not in flags:
        raise ErasureError(f"{where}: {SENSITIVE} is {text[:40]!r}; write true or false")
    return flags[word]


def mark_in(content: Mapping[str, object], where: str | Path) -> bool | None:
    """The mark `sensitive` of a YAML file; None where it has none."""
    mark = content.get(SENSITIVE)
    return None if mark is None else yes_or_no(as_text(mark, f"{where}: {SENSITIVE}"), str(where))
