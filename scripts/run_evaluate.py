"""Evaluate an erasure: before and after, scored beside the base, with a report.

Both are drawn from the same prompts and seeds.

  erase-evaluate --delta runs/heart/delta.safetensors --out runs/heart/report
  erase-evaluate --delta D --model PATH --prompts i2p.csv --evaluators [nudenet]
  erase-evaluate --delta D --protocol mace

OUT/report.html is one page for a browser, report.json the same for programs,
before_after.png the picture. Several processes share the images and the
judging:
  accelerate launch --num_processes 4 scripts/run_evaluate.py --delta D
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import ANSWER_SEEDS, PromptSet, canvas_grid, joined
from erase.scripts.cli import (
    Parser,
    add_base,
    add_config,
    add_group,
    add_prompts,
    check_folder,
    config_files,
    parse,
    parser,
    run,
)
from erase.scripts.cli.plugins import names_given
from erase.scripts.cli.protocols import add_protocol, prompts_of

if TYPE_CHECKING:
    from erase.eval.evaluators import Evaluator


def judges(argv: list[str] | None) -> dict[str, Evaluator[Any]]:
    """Evaluators whose options there are, by their own names: ours, and all that are named."""
    from erase.eval.evaluators import EVALUATORS, get_evaluator

    names = [*EVALUATORS.ours, *names_given(argv, "evaluators", config_files(argv))]
    return {evaluator.name: evaluator for evaluator in map(get_evaluator, names)}


def make_parser(evaluators: Mapping[str, Evaluator[Any]]) -> Parser:
    """Options of the evaluation and of these evaluators."""
    from erase.eval.evaluators import EVALUATORS
    from erase.eval.run import EvaluateConfig

    command = parser("erase-evaluate", __doc__)
    command.add_argument(
        "--delta",
        type=str,
        default="runs/erased/delta.safetensors",
        help="what erase-concept wrote",
    )
    add_base(command)
    add_prompts(command, "canvas if none is given")
    command.add_argument(
        "--seeds",
        type=int,
        default=1,
        help="on canvas: how many seeds of each object x style x colour, 1 to 5",
    )
    command.add_argument(
        "--base_images",
        type=str | None,
        default=None,
        help="folder for the base's images, shared by evaluations",
    )
    command.add_argument(
        "--out", type=str, default="runs/erased/report", help="folder of the report and its images"
    )
    command.add_argument(
        "--evaluators",
        type=list[str] | None,
        default=None,
        help=f"a list of {EVALUATORS.listed()}, or package.module:NAME; --help shows the options "
        "of those that are named. Default: classifier and clip on the embedded world, clip "
        "elsewhere (its score alone, where the prompts carry no label of the concept's kind)",
    )
    add_config(command, EvaluateConfig(), skip={"evaluators", "settings", "protocol"})
    for name, evaluator in evaluators.items():
        add_group(command, name, evaluator.config)
    return command


def main(argv: list[str] | None = None) -> None:
    """Parse, evaluate, print the table."""
    from erase.delta import ErasedDelta
    from erase.delta.base import load_base
    from erase.eval.run import EvaluateConfig, Evidence, evaluate
    from erase.parallel.processes import default_device

    evaluators = judges(argv)
    command = make_parser(evaluators)
    protocol = add_protocol(command, argv)
    options = parse(command, argv)
    check_folder(options.out)
    seeds = seeds_of(options.seeds)
    delta = ErasedDelta.load(options.delta)
    names = options.prompts or ["canvas"]
    prompts = prompts_of(protocol, options, delta.origin.concepts) or joined(
        [canvas_grid(seeds) if name == "canvas" else PromptSet.load(name) for name in names]
    )
    report = evaluate(
        load_base(delta, options.model, default_device(), options.load),
        delta,
        prompts,
        options.out,
        EvaluateConfig(
            options.evaluators,
            options.generate,
            {name: options[name] for name in evaluators},
            protocol=f"{protocol.name} {protocol.version}" if protocol else None,
        ),
        base_images=options.base_images,
        evidence=Evidence.of(Path(delta.source).parent, delta),
        commands=[shlex.join(["erase-evaluate", *(sys.argv[1:] if argv is None else argv)])],
    )
    Console().print(report.table())
    print(f"{options.out}/report.html")


def seeds_of(count: int) -> tuple[int, ...]:
    """The first `count` seeds of UnlearnCanvas's answer set."""
    if not 1 <= count <= len(ANSWER_SEEDS):
        raise ErasureError(
            f"--seeds is {count}; the canvas answer set has 1 to {len(ANSWER_SEEDS)}"
        )
    return ANSWER_SEEDS[:count]


def cli() -> None:
    """The installed command."""
    sys.exit(run(main))


if __name__ == "__main__":
    cli()
