"""Requests one after another on the embedded world: what is left of the earlier ones, and of the
rest, after each.

  python scripts/canvas/sequence.py --concepts heart Neon red tree
  python scripts/canvas/sequence.py --ways sequential sum --images 12 --others 48
  python scripts/canvas/sequence.py --table

After each request all concepts so far are judged together (UA), and the rest of the world (IRA on
their kinds, CRA on the others), on the same prompts and seeds, beside the base. The ways:

  sequential   each request on top of the one before (erase_concept(after=...))
  unprotected  the same, with no retain latents of earlier concepts (latents.earlier 0)
  l2           so too, and every change drawn back to what the earlier one left (prox_l2 3)
  confined     so too, and keys and values changed in the null space of the earlier prompts' text
               states alone (confine 0.1)
  sum, ties    each erased from the base alone, then composed; ties of 20 % of each delta's changes
  ties-all     ties of all changes
  joint        all of them at once from the base, with as many steps and latents for each

Each measurement is one line of OUT/sequence.jsonl; what is there is not measured again, so that the
script can be stopped at any time. Deltas are kept in OUT/deltas. --table prints the table and draws
the curves into OUT/sequence.svg.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from erase.compose import compose
from erase.delta import ErasedDelta
from erase.delta.stored import FILE
from erase.eval.generate import GenerateConfig, generate
from erase.eval.images import ImageSet
from erase.eval.run import score
from erase.eval.scores import Score
from erase.latents.config import LatentConfig
from erase.methods import get_method
from erase.models import DiffusionModel, load_model
from erase.prompts.canvas import canvas_concept
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import unknown
from erase.prompts.prompt_rows import PromptRow
from erase.prompts.prompt_sets import ANSWER_SEEDS, PromptSet, canvas_grid
from erase.run import EraseConfig, erase_concept
from erase.scripts.bench.plain import plain_parser
from erase.scripts.canvas.curve import drawn
from erase.scripts.canvas.measuring import read_rows, spaced, tell
from erase.training.config import TunedConfig

MERGED = {"sum": ("sum", 1.0), "ties": ("ties", 0.2), "ties-all": ("ties", 1.0)}
"""way -> on_conflict and keep of `compose`"""
HELD = {"unprotected": {}, "l2": {"prox_l2": 3.0}, "confined": {"confine": 0.1}}
"""way without latents of earlier concepts -> the option that holds them, of methods that train"""
WAYS = ("sequential", *HELD, *MERGED, "joint")
SCORES = ("UA", "IRA", "CRA")


@dataclass(frozen=True)
class Job:
    """One measurement: the first so many concepts, erased in one of the ways."""

    way: str
    concepts: tuple[str, ...]
    method: str
    seed: int

    @property
    def slug(self) -> str:
        """For names of files; a single concept is the same in every way."""
        way = self.way if len(self.concepts) > 1 else "alone"
        return "-".join([way, *self.concepts, self.method, str(self.seed)])

    @property
    def key(self) -> tuple[Any, ...]:
        return self.way, self.concepts, self.method, self.seed


def erased(job: Job, model: DiffusionModel, out: Path) -> ErasedDelta:
    """The delta of a job, made from those that it needs."""
    folder = out / "deltas" / job.slug
    if (folder / FILE).exists():
        return ErasedDelta.load(folder)
    if job.way in MERGED and len(job.concepts) > 1:
        alone = [replace(job, concepts=(name,)) for name in job.concepts]
        parts = [(erased(one, model, out), 1.0) for one in alone]
        delta = compose(model, parts, *MERGED[job.way])
        delta.save(folder / FILE)
        return delta

    specs = [canvas_concept(name) for name in job.concepts]
    method, after = get_method(job.method), None
    settings, latents = method.config, replace(method.latents, cache=str(out / "latents"))
    if job.way == "joint":
        settings, latents = of_many(settings, latents, len(specs))
    elif len(specs) > 1:
        after = erased(replace(job, concepts=job.concepts[:-1]), model, out)
        specs = specs[-1:]
        if job.way in HELD:
            settings = replace(settings, **HELD[job.way])
            latents = replace(latents, earlier=0.0)
    config = EraseConfig(method=job.method, seed=job.seed, latents=latents)
    return erase_concept(specs, config, settings, model=model, out=folder, after=after)


def of_many(settings: Any, latents: LatentConfig, count: int) -> tuple[Any, LatentConfig]:
    """As many steps, latents, and batches behind the mask for each of several concepts as one alone
    has."""
    if isinstance(settings, TunedConfig):
        train = replace(settings.train, steps=count * settings.train.steps)
        mask = replace(settings.mask, batches=count * settings.mask.batches)
        settings = replace(settings, train=train, mask=mask)
    forget, retain = count * latents.n_forget, count * latents.n_retain
    return settings, replace(latents, n_forget=forget, n_retain=retain)


def asked_for(concepts: Sequence[ConceptSpec], own: int, others: int) -> PromptSet:
    """So many rows of each concept, and so many that name none of them, spread over the set."""
    prompts = canvas_grid(ANSWER_SEEDS[:1])
    named = [(str(concept.kind), concept.target) for concept in concepts]
    rest = [row for row in prompts.rows if not set(named) & set(row.labels.items())]
    chosen = _spread(rest, others)
    for kind, name in named:
        chosen |= _spread([row for row in prompts.rows if row.labels[kind] == name], own)
    return replace(prompts, rows=tuple(row for row in prompts.rows if row.case in chosen))


def _spread(rows: Sequence[PromptRow], count: int) -> set[int]:
    """Cases of so many of the rows, evenly apart."""
    return {row.case for row in spaced(rows, min(count, len(rows)))}


def measure(
    job: Job, asked: PromptSet, config: GenerateConfig, out: Path, base: ImageSet
) -> dict[str, Any]:
    """Erase, draw, score beside the base's images of the same prompts and seeds."""
    model, started = load_model("canvas"), time.process_time()
    delta = erased(job, model, out)
    seconds = round(time.process_time() - started, 1)
    folder = out / "images" / job.slug
    with delta.applied(model):
        provenance = {"fingerprint": model.fingerprint}
        after = generate(model.pipeline(), asked, folder, config, provenance)
    concepts = [canvas_concept(name) for name in job.concepts]
    rows = {}
    for name, images in (("base", base), ("erased", after)):
        rows[name] = {one.name: told(one) for one in score(images, concepts, ["classifier"])}
    shutil.rmtree(folder)
    return {
        **asdict(job),
        "seconds": seconds,
        "changed": delta.count,
        "rows": len(asked.rows),
    } | rows


def told(found: Score) -> list[float]:
    """Value, number of judgements, and the ends of its interval."""
    return [round(number, 2) for number in (found.value, found.n, found.low, found.high)]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each way and number of requests, with the base's scores beside."""
    head = "requests | last | way | CPU s | changed | UA | IRA | CRA"
    lines = [f"| {head} |", "|---" * 8 + "|"]
    for row in sorted(rows, key=lambda row: (len(row["concepts"]), WAYS.index(row["way"]))):
        facts = [len(row["concepts"]), row["concepts"][-1], row["way"], f"{row['seconds']:.0f}"]
        cells = [*map(str, facts), f"{row['changed']:,}"]
        for name in SCORES:
            value, n, low, high = row["erased"][name]
            was = row["base"][name][0]
            cells.append(f"{value:.1f} [{low:.1f}, {high:.1f}], base {was:.1f} (n {n})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = plain_parser(__doc__)
    parser.add_argument(
        "--concepts", nargs="+", default=["heart", "Neon", "red", "tree"], help="in this order"
    )
    parser.add_argument("--ways", nargs="+", default=list(WAYS), help=", ".join(WAYS))
    parser.add_argument(
        "--counts", nargs="+", type=int, default=None, help="numbers of requests; default: all"
    )
    parser.add_argument("--method", default="salun")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=12, help="of each concept")
    parser.add_argument("--others", type=int, default=48, help="images that name none of them")
    parser.add_argument("--steps", type=int, default=12, help="sampling steps of the images")
    parser.add_argument("--out", type=Path, default=Path("runs/sequence"))
    parser.add_argument("--table", action="store_true", help="print the table and end")
    return parser


def main() -> None:
    """Measure what is asked for and not yet there, the earlier requests first."""
    args = make_parser().parse_args()
    record = args.out / "sequence.jsonl"
    if args.table:
        rows = read_rows(record)
        print(table(rows))
        (args.out / "sequence.svg").write_text(drawn(rows, WAYS), encoding="utf-8")
        return
    for way in args.ways:
        if way not in WAYS:
            raise SystemExit(str(unknown("way", way, WAYS)))

    args.out.mkdir(parents=True, exist_ok=True)
    concepts = [canvas_concept(name) for name in args.concepts]
    asked = asked_for(concepts, args.images, args.others)
    config, model = GenerateConfig(steps=args.steps), load_model("canvas")
    base = generate(
        model.pipeline(), asked, args.out / "base", config, {"fingerprint": model.fingerprint}
    )
    done = {
        Job(row["way"], tuple(row["concepts"]), row["method"], row["seed"]).key
        for row in read_rows(record)
    }
    for count in args.counts or range(1, len(concepts) + 1):
        for way in args.ways:
            job = Job(way, tuple(args.concepts[:count]), args.method, args.seed)
            if job.key in done or (count == 1 and way != "sequential"):
                continue
            row = measure(job, asked, config, args.out, base)
            shown = {name: row["erased"][name][0] for name in SCORES}
            tell(record, row, [job.slug, row["seconds"], "s", row["changed"], shown])


if __name__ == "__main__":
    main()
