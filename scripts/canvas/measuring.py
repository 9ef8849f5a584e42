"""What the measuring scripts of the embedded world share: which erasures are asked for, and the
record of what was measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erase.prompts.canvas import EMBEDDED, concept_names
from erase.prompts.errors import unknown
from erase.prompts.prompt_rows import PromptRow
from erase.scripts.bench.plain import plain_parser
from erase.scripts.canvas.variants import Variant, groups


@dataclass(frozen=True)
class Job:
    """One measurement."""

    concept: str
    name: str
    """of the variant"""
    seed: int
    model: str = "canvas"

    @property
    def slug(self) -> str:
        """For names of files."""
        name = self.name.replace(" ", "-").replace(",", "").replace("%", "")
        return f"{self.concept}-{name}-{self.seed}"


def make_parser() -> argparse.ArgumentParser:
    """Options that several measuring scripts share."""
    parser = plain_parser(None)
    parser.add_argument(
        "--concepts", nargs="+", default=["heart", "Neon", "red"], help="names, or all"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["salun"],
        help="names or groups of scripts/canvas/variants.py",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--model",
        choices=EMBEDDED,
        default="canvas",
        help="the base; each needs an --out of its own",
    )
    parser.add_argument(
        "--precision", default="no", help="no, bf16 or fp16; of sampling and training alike"
    )
    parser.add_argument(
        "--steps", type=int, default=12, help="sampling steps of the images that are judged"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument(
        "--part",
        nargs=2,
        type=int,
        default=(1, 1),
        metavar=("WHICH", "OF"),
        help="measure this part of the work",
    )
    parser.add_argument("--table", action="store_true", help="print the tables and end")
    return parser


def jobs_of(args: argparse.Namespace) -> Iterator[tuple[Job, Variant]]:
    """The measurements that are asked for: of the first variant all, then of the next."""
    variants = groups(args.precision)
    known = {name: variant for group in variants.values() for name, variant in group.items()}
    picked = [name for word in args.variants for name in variants.get(word, [word])]
    for name in picked:
        if name not in known:
            raise SystemExit(str(unknown("variant", name, [*known, *variants])))

    names = args.concepts
    if names == ["all"]:
        names = concept_names()
    which, of = args.part
    jobs = [
        Job(concept, name, seed, args.model)
        for seed in args.seeds
        for name in picked
        for concept in names
    ]
    for job in jobs[which - 1 :: of]:
        yield job, known[job.name]


def delta_path(job: Job, out: Path) -> Path:
    """The file of a measurement's delta."""
    folder = out / "deltas"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{job.slug}.safetensors"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The measurements of a file; none where it is not there yet."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def tell(path: Path, row: dict[str, Any], words: Sequence[Any]) -> None:
    """Add a measurement to its file, and say so."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(*words, flush=True)


def spaced(rows: Sequence[PromptRow], count: int) -> list[PromptRow]:
    """So many of the rows, evenly apart."""
    return [rows[i * len(rows) // count] for i in range(count)]
