"""Evaluate an erasure: before and after, scored beside the base, with a report.

Both are drawn from the same prompts and seeds.

  erase-evaluate --delta runs/heart/delta.safetensors --out runs/heart/report
  erase-evaluate --delta D --model PATH --prompts i2p.csv --evaluators [nudenet]

OUT/report.html is one page for a browser, report.json the same for programs,
before_after.png the picture. Several processes share the images and the
judging:
  accelerate launch --num_processes 4 scripts/run_evaluate.py --delta D
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from rich.console import Console

from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import ANSWER_SEEDS, PromptSet, canvas_grid, joined, shipped_sets
from erase.scripts.cli import Parser, Words, add_config, build, check_folder, parse, parser, run


def make_parser() -> Parser:
    """All options."""
    from erase.eval.run import EvaluateConfig
    from erase.models import LoadConfig

    made = parser("erase-evaluate", __doc__)
    made.add_argument("--delta", type=str, default="runs/erased/delta.safetensors", help="what erase-concept wrote")
    made.add_argument("--model", type=str | None, default=None, help="the base; by default the one that the delta names")
    made.add_argument(
        "--load", type=LoadConfig, default=LoadConfig(), help="how the base is read; by default as it was for the delta"
    )
    made.add_argument(
        "--prompts",
        action=Words,
        help=f"a shipped set ({', '.join(shipped_sets())}), or a .csv (the field's columns) or .yaml file (templates); may be given several "
        "times, the case numbers then count on; canvas if none is given",
    )
    made.add_argument("--seeds", type=int, default=1, help="on canvas: how many seeds of each object x style x colour, 1 to 5")
    made.add_argument("--base_images", type=str | None, default=None, help="folder for the base's images, shared by evaluations")
    made.add_argument("--out", type=str, default="runs/erased/report", help="folder of the report and its images")
    add_config(made, EvaluateConfig())
    return made


def main(argv: list[str] | None = None) -> None:
    """Parse, evaluate, print the table."""
    from erase.delta import ErasedDelta
    from erase.delta.base import load_base
    from erase.eval.run import EvaluateConfig, Evidence, evaluate
    from erase.parallel.processes import default_device

    options = parse(make_parser(), argv)
    check_folder(options.out)
    seeds = seeds_of(options.seeds)
    delta = ErasedDelta.load(options.delta)
    names = options.prompts or ["canvas"]
    prompts = joined([canvas_grid(seeds) if name == "canvas" else PromptSet.load(name) for name in names])
    report = evaluate(
        load_base(delta, options.model, default_device(), options.load),
        delta,
        prompts,
        options.out,
        build(EvaluateConfig, options),
        base_images=options.base_images,
        evidence=Evidence.of(Path(delta.source).parent, delta),
        commands=[shlex.join(["erase-evaluate", *(sys.argv[1:] if argv is None else argv)])],
    )
    Console().print(report.table())
    print(f"{options.out}/report.html")


def seeds_of(count: int) -> tuple[int, ...]:
    """The first `count` seeds of UnlearnCanvas's answer set."""
    if not 1 <= count <= len(ANSWER_SEEDS):
        raise ErasureError(f"--seeds is {count}; the canvas answer set has 1 to {len(ANSWER_SEEDS)}")
    return ANSWER_SEEDS[:count]


def cli() -> None:
    """The installed command."""
    sys.exit(run(main))


if __name__ == "__main__":
    cli()
