"""Evaluate an erasure: before and after from the same prompts and seeds, scored beside the base, with a report to look at.

  erase-evaluate --delta runs/heart/delta.safetensors --out runs/heart/report
  erase-evaluate --delta runs/nudity/delta.safetensors --model PATH --prompts i2p.csv --evaluators '[nudenet]' --out runs/nudity/report

OUT/report.html is one page for a browser, report.json the same for programs, before_after.png the picture. Several processes share
the images and the judging: accelerate launch --num_processes 4 scripts/run_evaluate.py --delta DELTA --out OUT
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from rich.console import Console

from erase.delta import ErasedDelta
from erase.models import LoadConfig
from erase.processes import default_device
from erase.run import load_base
from eval.run import EvaluateConfig, Evidence, evaluate
from prompts.errors import ErasureError
from prompts.prompt_sets import ANSWER_SEEDS, PromptSet, canvas_grid, shipped_sets
from scripts.front import add_config, build, parse, parser, run


def main(argv: list[str] | None = None) -> None:
    """Parse, evaluate, print the table."""
    made = parser("erase-evaluate", __doc__)
    made.add_argument("--delta", type=str, default="runs/erased/delta.safetensors", help="what erase-concept wrote")
    made.add_argument("--model", type=str | None, default=None, help="the base; by default the one that the delta names")
    made.add_argument(
        "--load", type=LoadConfig, default=LoadConfig(), help="how the base is read; by default as it was for the delta"
    )
    made.add_argument(
        "--prompts",
        type=str,
        default="canvas",
        help=f"a shipped set ({', '.join(shipped_sets())}), or a .csv (the field's columns) or .yaml file (templates)",
    )
    made.add_argument("--seeds", type=int, default=1, help="on canvas: how many seeds of each object x style x colour, 1 to 5")
    made.add_argument("--base_images", type=str | None, default=None, help="folder for the base's images, shared by evaluations")
    made.add_argument("--out", type=str, default="runs/erased/report", help="folder of the report and its images")
    add_config(made, EvaluateConfig())
    options = parse(made, argv)
    delta = ErasedDelta.load(options.delta)
    prompts = canvas_grid(seeds_of(options.seeds)) if options.prompts == "canvas" else PromptSet.load(options.prompts)
    report = evaluate(
        load_base(delta, options.model, default_device(), options.load),
        delta,
        prompts,
        options.out,
        build(EvaluateConfig, options),
        base_images=options.base_images,
        evidence=Evidence.of(Path(options.delta).parent),
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
