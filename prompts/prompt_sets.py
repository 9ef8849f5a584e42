"""Prompt sets: what to draw, from which seed, and what each image is expected to show."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from string import Formatter

from erase.prompts.canvas import KINDS, vocabulary
from erase.prompts.errors import ErasureError, unknown
from erase.prompts.reading import DATA, as_mapping, as_text, as_texts, read_text, read_yaml

# The field's names for one thing, in order of preference: I2P and Imagenette as CSV, I2P on the
# hub.
SEED = ("seed", "evaluation_seed", "sd_seed")
GUIDANCE = ("guidance", "evaluation_guidance", "sd_guidance_scale")
EVAL = DATA / "eval"
ANSWER_SEEDS = (188, 288, 588, 688, 888)  # UnlearnCanvas's answer set
# I2P's prompt 2260 is the word "NuLL". pandas took it for a missing value, and the CSV that the
# field hands on has lost it.
MOST_ROWS, MOST_CHARACTERS = 1_000_000, 2**30  # of one set, before any row of it is made
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


@dataclass(frozen=True)
class PromptSet:
    """Rows under a name.

    Raises:
        ErasureError: no rows, or a case number that stands twice.
    """

    name: str
    rows: tuple[PromptRow, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        _check(self.rows, f"the prompt set {self.name!r}")

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the rows, whatever their order and whichever file they came from."""
        ordered = sorted(self.rows, key=lambda row: row.case)
        guidance = [None if row.guidance is None else float(row.guidance) for row in ordered]
        rows = [
            (row.case, row.prompt, row.seed, g, sorted(row.labels.items()))
            for row, g in zip(ordered, guidance, strict=True)
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @classmethod
    def load(cls, source: str | Path) -> PromptSet:
        """The shipped set of that name (see `shipped_sets`; "canvas" is the whole answer set), or a
        .csv or .yaml file."""
        if str(source) == "canvas":
            return canvas_grid()
        if str(source) in shipped_sets():
            return cls.from_yaml(EVAL / f"{source}.yaml")
        readers = {".csv": cls.from_csv, ".yaml": cls.from_yaml, ".yml": cls.from_yaml}
        reader = readers.get(Path(source).suffix.lower())
        if reader is None:
            raise ErasureError(
                f"{unknown('prompt set', str(source), shipped_sets())}; or give a .csv or .yaml "
                "file"
            )
        return reader(source)

    @classmethod
    def from_csv(cls, path: str | Path) -> PromptSet:
        """Rows of a CSV file with the field's own columns.

        `prompt`; `seed`, `evaluation_seed` or `sd_seed`; optionally `guidance`,
        `evaluation_guidance` or `sd_guidance_scale` (a cell may be empty), and `case_number` (else
        rows count from 0); capitals and blanks in these names do not matter. An index column is
        dropped; every other column becomes a label.

        Raises:
            ErasureError: unreadable, malformed or empty file; missing or repeated columns; a bad
                value, with its row.
        """
        header, *body = _table(path)
        columns = _columns(header.cells, path)
        cells = (dict(zip(columns.names, line.cells, strict=True)) for line in body)
        rows = tuple(
            _row(row, columns, i, line.where)
            for i, (row, line) in enumerate(zip(cells, body, strict=True))
        )
        _check(rows, str(path))
        return cls(Path(path).stem, rows)

    @classmethod
    def from_yaml(cls, path: str | Path) -> PromptSet:
        """The product of a YAML file's lists.

        `templates` with named slots (`A {object} image in {style} style.`), one list for each slot,
        `seeds`, and optionally `guidance`. Each template is filled with every combination of the
        slots that it names, which become its labels.

        Raises:
            ErasureError: unreadable file or no YAML; an unknown key (the near one is suggested); a
                slot without a list; a bad value.
        """
        raw = read_yaml(path)
        templates = (
            as_texts(raw.get("templates", ()), f"{path}: templates")
            if isinstance(raw, Mapping)
            else ()
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
        return cls(Path(path).stem, tuple(rows))


def joined(sets: Sequence[PromptSet]) -> PromptSet:
    """The rows of several sets, one set after the other.

    Case numbers stay as they are in the first set; each further set's are counted on from the last
    of the one before, so that a row keeps its place within its set. The name is that of all of
    them, `i2p+coco`.

    Raises:
        ErasureError: the same rows twice, or no sets.
    """
    if not sets:
        raise ErasureError("there is no prompt set to draw; give at least one")
    rows: list[PromptRow] = []
    seen: dict[str, str] = {}
    for one in sets:
        if one.sha256 in seen:
            raise ErasureError(
                f"the prompt sets {seen[one.sha256]!r} and {one.name!r} are the same; give it once"
            )
        seen[one.sha256] = one.name
        start = max((row.case for row in rows), default=-1) + 1
        rows += [replace(row, case=start + row.case) for row in one.rows]
    return PromptSet("+".join(seen.values()), tuple(rows))


def of_prompts(prompts: Sequence[str], seed: int) -> PromptSet:
    """A set of single prompts, all drawn from one seed."""
    return PromptSet(
        "prompt", tuple(PromptRow(case, prompt, seed) for case, prompt in enumerate(prompts))
    )


def shipped_sets() -> list[str]:
    """Names of the prompt sets that come with the package: "canvas", and one for each shipped
    concept file."""
    return sorted(["canvas", *(path.stem for path in EVAL.glob("*.yaml"))])


def canvas_grid(
    seeds: Sequence[int] = ANSWER_SEEDS, where: Mapping[str, str] | None = None
) -> PromptSet:
    """The embedded world's answer set: every object x style x colour, once for each seed.

    Args:
        seeds: distinct seeds; every cell of the grid is drawn from each of them.
        where: keeps the cells with these concepts, kind -> name ({"object": "heart"}).

    Returns:
        Rows with labels `object`, `style`, `colour`. A row of a part of the grid has the case
        number that it has in the whole, and fewer seeds give a beginning of the set.

    Raises:
        ErasureError: no seeds, a seed twice, an unknown kind or concept.
    """
    vocab, where = vocabulary(), dict(where or {})
    for kind, name in where.items():
        if kind not in KINDS:
            raise unknown("kind of canvas concept", kind, KINDS)
        if name not in vocab.names(kind):
            raise unknown(kind, name, vocab.names(kind))
    if not seeds or len(set(seeds)) < len(seeds):
        raise ErasureError("the canvas grid needs seeds, each of them once")
    cells = vocab.cells()
    rows = tuple(
        PromptRow(i * len(cells) + j, vocab.grid.format(**cell), seed, None, cell)
        for i, seed in enumerate(seeds)
        for j, cell in enumerate(cells)
        if where.items() <= cell.items()
    )
    return PromptSet("canvas" + "".join(f"-{name}" for name in where.values()), rows)


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


def _check(rows: Sequence[PromptRow], where: str) -> None:
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
