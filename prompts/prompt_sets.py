"""Prompt sets: what to draw, from which seed, and what each image is expected to show."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from erase.prompts.canvas import KINDS, vocabulary
from erase.prompts.errors import ErasureError, counted, unknown
from erase.prompts.prompt_product import yaml_rows
from erase.prompts.prompt_rows import PromptRow, check_rows, csv_rows
from erase.prompts.reading import DATA

__all__ = [
    "ANSWER_SEEDS",
    "PromptRow",
    "PromptSet",
    "apart",
    "canvas_grid",
    "joined",
    "of_prompts",
    "shipped_sets",
]

EVAL = DATA / "eval"
ANSWER_SEEDS = (188, 288, 588, 688, 888)  # UnlearnCanvas's answer set


@dataclass(frozen=True)
class PromptSet:
    """Rows under a name.

    Raises:
        ErasureError: no rows, or a case number that stands twice.
    """

    name: str
    rows: tuple[PromptRow, ...]
    sensitive: bool | None = None
    """whether reports cover its pictures until they are asked for; None: it does not say, and they
    are covered unless the embedded model drew them"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        check_rows(self.rows, f"the prompt set {self.name!r}")

    def __repr__(self) -> str:
        return f"PromptSet({self.name!r}, {counted(len(self.rows), 'row')})"

    @property
    def marks(self) -> dict[str, bool]:
        """The mark `sensitive`, for the settings of its images; nothing where it does not say."""
        return {} if self.sensitive is None else {"sensitive": self.sensitive}

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
        dropped; every other column becomes a label, without the blanks around it. A set with I2P's
        columns is sensitive, and a column `sensitive` of true and false says it for any: one such
        row makes the set so.

        Raises:
            ErasureError: unreadable, malformed or empty file; missing or repeated columns; a bad
                value, with its row.
        """
        return cls(Path(path).stem, *csv_rows(path))

    @classmethod
    def from_yaml(cls, path: str | Path) -> PromptSet:
        """The product of a YAML file's lists.

        `templates` with named slots (`A {object} image in {style} style.`), one list for each slot,
        `seeds`, and optionally `guidance` and `sensitive` (true or false). Each template is filled
        with every combination of the slots that it names, which become its labels.

        Raises:
            ErasureError: unreadable file or no YAML; an unknown key (the near one is suggested); a
                slot without a list; a bad value.
        """
        return cls(Path(path).stem, *yaml_rows(path))


def joined(sets: Sequence[PromptSet]) -> PromptSet:
    """The rows of several sets, one set after the other, as `apart` numbers them; the name is that
    of all of them, `i2p+coco`. Errors as `apart`."""
    numbered = apart(sets)
    rows = [row for one in numbered for row in one.rows]
    return PromptSet("+".join(one.name for one in sets), tuple(rows), mark_of(sets))


def mark_of(sets: Iterable[PromptSet]) -> bool | None:
    """The mark `sensitive` of several sets together: that of the first that is, or does not say."""
    marks = [one.sensitive for one in sets]
    return next((mark for mark in (True, None) if mark in marks), False)


def apart(sets: Sequence[PromptSet]) -> list[PromptSet]:
    """Several sets whose case numbers do not collide, and whose names differ.

    Case numbers stay as they are in the first set; each further set's are counted on from the last
    of the one before, so that a row keeps its place within its set. A name that stood before gets a
    number: `prompts (2)`.

    Raises:
        ErasureError: the same rows twice, or no sets.
    """
    if not sets:
        raise ErasureError("there is no prompt set to draw; give at least one")
    seen: dict[str, str] = {}
    numbered: list[PromptSet] = []
    start = 0
    for one in sets:
        if one.sha256 in seen:
            raise ErasureError(
                f"the prompt sets {seen[one.sha256]!r} and {one.name!r} are the same; give it once"
            )
        seen[one.sha256] = one.name
        name, before = one.name, [other.name for other in numbered]
        if name in before:
            name = next(f"{name} ({i})" for i in range(2, 99) if f"{name} ({i})" not in before)
        rows = [replace(row, case=start + row.case) for row in one.rows]
        numbered.append(PromptSet(name, tuple(rows), one.sensitive))
        start = max(row.case for row in rows) + 1
    return numbered


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
    return PromptSet("canvas" + "".join(f"-{name}" for name in where.values()), rows, False)
