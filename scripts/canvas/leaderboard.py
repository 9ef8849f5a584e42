"""The full suite on erasures of the embedded world: every score and every attack, side by side.

  python scripts/canvas/leaderboard.py --variants salun salun-half esd uce --seeds 0 1 2
  python scripts/canvas/leaderboard.py --variants methods --suite quick
  python scripts/canvas/leaderboard.py --table

Each erasure is made as scripts/canvas/results.py makes it (`--out` may be that script's folder: its
deltas are found), then `erase-evaluate --suite` judges it. What is found on the base is found once
for each concept and seed. Each measurement is one line of OUT/suite.jsonl, and its report lies in
OUT/reports; what is there is not measured again, and a stopped measurement goes on.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from erase.eval.report.report import BASE, ERASED
from erase.models import load_model
from erase.prompts.canvas import canvas_concept
from erase.scripts.canvas.results import (
    Job,
    delta_path,
    erased,
    jobs_of,
    make_parser,
    read_rows,
    tell,
)
from erase.scripts.canvas.tables import spread
from erase.scripts.canvas.variants import Variant
from erase.scripts.run_evaluate import main as evaluate


def measure(job: Job, variant: Variant, suite: str, out: Path) -> dict[str, Any]:
    """Erase, unless that was done; evaluate; the scores of both rows by name."""
    path, evidence = delta_path(job, out), {}
    if not path.exists():
        delta, evidence = erased(
            job, variant, load_model("canvas"), canvas_concept(job.concept), out
        )
        delta.save(path)
    report = out / "reports" / f"{suite}-{job.slug}"
    base = out / "bases" / f"{suite}-{job.concept}-{job.seed}"
    words = ["--delta", str(path), "--suite", suite, "--base_images", str(base)]
    evaluate([*words, "--attack.seed", str(job.seed), "--out", str(report)])
    told = json.loads((report / "report.json").read_text(encoding="utf-8"))
    rows = {}
    for row in (BASE, ERASED):
        rows[row] = {score["name"]: score["value"] for score in told["rows"][row]}
    return {
        "concept": job.concept,
        "variant": job.name,
        "seed": job.seed,
        "suite": suite,
        "bytes": path.stat().st_size,
        **evidence,
        **rows,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a table per concept: scores down, base and variants across; means over seeds."""
    parts = []
    for concept in dict.fromkeys(row["concept"] for row in rows):
        here = [row for row in rows if row["concept"] == concept]
        cells: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in here:
            own = {"CPU seconds": row.get("seconds", math.nan), "delta, MB": row["bytes"] / 1e6}
            for name, value in [*row[ERASED].items(), *own.items()]:
                cells[name][row["variant"]].append(value)
            for name, value in row[BASE].items():
                cells[name][BASE].append(value)
        columns = [BASE, *dict.fromkeys(row["variant"] for row in here)]
        lines = [f"| {concept} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
        for name, found in cells.items():
            values = [_cell(found.get(column, [])) for column in columns]
            lines.append(f"| {name} | {' | '.join(values)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cell(values: list[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    if known and max(known) < 1:
        return f"{fmean(known):.3f}"
    return spread(known)


def main() -> None:
    """Measure what is asked for and not yet there."""
    parser = make_parser()
    parser.description = __doc__
    parser.add_argument("--suite", default="full", choices=["full", "quick"])
    args = parser.parse_args()
    record = args.out / "suite.jsonl"
    if args.table:
        print(table([row for row in read_rows(record) if row["suite"] == args.suite]))
        return

    args.out.mkdir(parents=True, exist_ok=True)
    identity = ("concept", "variant", "seed", "suite")
    done = set(map(itemgetter(*identity), read_rows(record)))
    for job, variant in jobs_of(args):
        key = (job.concept, job.name, job.seed, args.suite)
        if key not in done:
            row = measure(job, variant, args.suite, args.out)
            shown = {name: row[ERASED][name] for name in ("UA", "IRA", "CRA")}
            tell(record, row, [job.slug, shown])


if __name__ == "__main__":
    main()
