"""Rows of prompts, one for each image to draw, and how a CSV or a YAML file is read into them."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from string import Formatter

from erase.prompts.errors import ErasureError
from erase.prompts.reading import as_mapping, as_text, as_texts, read_text, read_yaml

# The field's names for one thing, in order of preference: I2P and Imagenette as CSV, I2P on the
# hub.
SEED = ("seed", "evaluation_seed", "sd_seed")
GUIDANCE = ("guidance", "evaluation_guidance", "sd_guidance_scale")
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
    """Whether a row's labels or its prompt hold one of these names, whatever their case."""
    lowered = {name.lower() for name in names}
    return not lowered.isdisjoint(label.lower() for label in labels.values()) or any(
        re.search(rf"\b{re.escape(name)}\b", prompt.lower()) for name in lowered
    )


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


# ---- CSV -----------------------------------------------------------------------------------------


def csv_rows(path: str | Path) -> tuple[PromptRow, ...]:
    """The rows of a CSV file (see `PromptSet.from_csv`)."""
    header, *body = _table(path)
    columns = _columns(header.cells, path)
    cells = (dict(zip(columns.names, line.cells, strict=True)) for line in body)
    rows = tuple(
        _row(row, columns, i, line.where)
        for i, (row, line) in enumerate(zip(cells, body, strict=True))
    )
    check_rows(rows, str(path))
    return rows


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
    parts = ("prompt", "case_number", *SEED, *GUIDANCE)
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
    labels = [name for name in named if name not in ("prompt", seed, guidance, case)]
    return _Columns(names, seed, guidance, case, labels)


def _row(cells: Mapping[str, str], columns: _Columns, index: int, where: str) -> PromptRow:
    case = _integer(cells[columns.case], f"{where}: the {columns.case}") if columns.case else index
    seed = _integer(cells[columns.seed], f"{where}: the {columns.seed}")
    guidance = (
        _guidance(cells[columns.guidance], where)
        if columns.guidance and cells[columns.guidance].strip()
        else None
    )
    prompt = cells["prompt"] or LOST.get(cells.get("lexica_url", ""), "")
    try:
        return PromptRow(
            case, prompt, seed, guidance, {name: cells[name] for name in columns.labels}
        )
    except ErasureError as error:
        raise ErasureError(f"{where}: {error}") from error


def _integer(text: str, where: str) -> int:
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


def _guidance(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ErasureError(f"{where}: the guidance {text[:40]!r} is not a number, such as 7.5")
    return number


# ---- YAML ----------------------------------------------------------------------------------------


def yaml_rows(path: str | Path) -> tuple[PromptRow, ...]:
    """The product of a YAML file's lists (see `PromptSet.from_yaml`)."""
    raw = read_yaml(path)
    templates = (
        as_texts(raw.get("templates", ()), f"{path}: templates") if isinstance(raw, Mapping) else ()
    )
    parts = [_parse(template, path) for template in templates]
    slots = {slot: None for template in parts for _, slot in template if slot}
    data = as_mapping(raw, ("templates", "seeds", "guidance", *slots), path)
    for name in ("templates", "seeds", *slots):
        if not data.get(name):
            raise ErasureError(f"{path} needs a list `{name}: […]` with something in it")
    lists = {name: as_texts(data[name], f"{path}: {name}") for name in ("seeds", *slots)}
    seeds = [
        _integer(seed, f"{path}: seeds, item {i},") for i, seed in enumerate(lists["seeds"], 1)
    ]
    guidance = (
        _guidance(as_text(data["guidance"], f"{path}: guidance"), str(path))
        if "guidance" in data
        else None
    )
    _check_product(path, parts, lists)
    rows: list[PromptRow] = []
    for template in parts:
        named = dict.fromkeys(slot for _, slot in template if slot)
        for values, seed in product(product(*(lists[slot] for slot in named)), seeds):
            words = dict(zip(named, values, strict=True))
            prompt = "".join(text + words.get(slot, "") for text, slot in template)
            rows.append(PromptRow(len(rows), prompt, seed, guidance, words))
    return tuple(rows)


def _parse(template: str, path: str | Path) -> list[tuple[str, str]]:
    """A template as (text, name of the slot after it or "")."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ErasureError(
            f"{path}: the template {template!r} has an unmatched brace; write {{{{ for a plain one"
        ) from error
    for _, slot, spec, conversion in parts:
        if slot == "" or spec or conversion:
            raise ErasureError(
                f"{path}: the template {template!r} has a slot that is not a plain name, such as "
                f"{{object}}"
            )
    return [(text, slot or "") for text, slot, _, _ in parts]


def _check_product(
    path: str | Path, templates: Sequence[list[tuple[str, str]]], lists: Mapping[str, Sequence[str]]
) -> None:
    """Refuse more rows, or longer ones, than anybody could draw, before they are made."""
    rows = characters = 0
    for template in templates:
        named = {slot for _, slot in template if slot}
        count = math.prod(len(lists[slot]) for slot in (*named, "seeds"))
        rows += count
        characters += count * sum(
            len(text) + (max(map(len, lists[slot])) if slot else 0) for text, slot in template
        )
    if rows > MOST_ROWS or characters > MOST_CHARACTERS:
        raise ErasureError(
            f"{path} would be {rows:,} prompts of {characters // rows:,} characters, and "
            f"{MOST_ROWS:,} prompts or {MOST_CHARACTERS:,} characters in all are the most; shorten "
            "its lists, or make several sets"
        )
