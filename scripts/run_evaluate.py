"""Evaluate an erasure: before and after, scored beside the base, with a report.

Both are drawn from the same prompts and seeds.

  erase-evaluate --delta runs/heart/delta.safetensors --out runs/heart/report
  erase-evaluate --delta D --model PATH --prompts i2p.csv --evaluators [nudenet]
anybody's checkpoint (docs/foreign.md), or finished images of one:
  erase-evaluate --model PATH --erased esd.safetensors --concepts nudity
  erase-evaluate --model PATH --erased IMAGES --concepts nudity --prompts N.csv
several sets, each scored by itself; or a protocol of the field:
  erase-evaluate --delta D --prompts van-gogh --prompts coco.csv
  erase-evaluate --delta D --protocol mace
what a command would do, what it lacks and how long it takes:
  erase-evaluate --delta D --protocol mace --validate

OUT/report.html is one page for a browser, report.json the same for programs,
before_after.png the picture. Several processes share the images and the
judging:
  accelerate launch --num_processes 4 scripts/run_evaluate.py --delta D
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from rich.console import Console

from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import ANSWER_SEEDS, PromptSet, canvas_grid
from erase.scripts.cli import (
    OneDelta,
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
from erase.scripts.cli.foreign import add_erased, add_named, check_erased, erased_model, place_of
from erase.scripts.cli.idle import check_idle
from erase.scripts.cli.naming import concepts_named
from erase.scripts.cli.plugins import names_given
from erase.scripts.cli.protocols import add_protocol, prompts_of

if TYPE_CHECKING:
    from erase.delta import ErasedDelta
    from erase.eval.evaluators import Evaluator
    from erase.eval.protocols import Protocol
    from erase.eval.report.report import EvalReport
    from erase.eval.run import EvaluateConfig
    from erase.models import DiffusionModel
    from erase.prompts.concepts import ConceptSpec

DELTA = "runs/erased/delta.safetensors"


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
    command.add_argument("--delta", action=OneDelta, default=DELTA, help="what erase-concept wrote")
    add_erased(command, ", or a folder of finished images with a manifest of ours or a CSV")
    add_named(command)
    add_base(command)
    add_prompts(
        command,
        "each is scored by itself; canvas if none is given, or what finished images say of "
        "themselves",
    )
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
        help="folder for the base's images, shared by evaluations; with finished images it may "
        "hold finished ones too",
    )
    command.add_argument(
        "--out",
        type=str | None,
        default=None,
        help="folder of the report and its images; default: report, beside the delta; of --erased "
        "NAME, runs/NAME/report",
    )
    command.add_argument(
        "--compared_with",
        type=list[str],
        default=[],
        help="a list of report.json of other runs of this base and concept, which the page sets "
        "beside this one; for a delta",
    )
    command.add_argument(
        "--validate",
        action="store_true",
        help="say what would be judged, by whom, on how many images, what is missing and how long "
        "drawing, attacks, probes and relearning take here, and stop; nothing is written",
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
    """Parse, evaluate, print the table and the verdict."""
    from erase.eval.finished import holds_images
    from erase.eval.report.conclusion import states
    from erase.eval.run import EvaluateConfig

    evaluators = judges(argv)
    command = make_parser(evaluators)
    protocol = add_protocol(command, argv)
    options = parse(command, argv)
    check_erased(options, DELTA)
    options.out = options.out or place_of(options, "report")
    check_folder(options.out)
    config = EvaluateConfig(
        options.evaluators,
        options.generate,
        {name: options[name] for name in evaluators},
        protocol=f"{protocol.name} {protocol.version}" if protocol else None,
    )
    words = sys.argv[1:] if argv is None else argv
    check_used(words, options, evaluators)
    commands = [shlex.join(["erase-evaluate", *words])]
    finished = [path for path in options.erased if holds_images(path)]
    if finished and options.compared_with:
        raise ErasureError(
            "--compared_with needs the base's weights, and finished images come without; leave it "
            "out"
        )
    if finished and options.erased != finished[:1]:
        raise ErasureError(
            f"{finished[0]} is a folder of finished images, which stands alone; evaluate the other "
            "--erased by itself"
        )
    if options.validate:
        validate(options, config, protocol, bool(finished))
        return
    judge = of_images if finished else of_weights
    report, console = judge(options, config, protocol, commands), Console()
    console.print(report.table())
    for state in states(report):
        line = f"{state.question}: {state.word}. {state.said}"
        console.print(line, markup=False, highlight=False)
    print(f"{options.out}/report.html")


def check_used(
    words: Sequence[str], options: Namespace, evaluators: Mapping[str, Evaluator[Any]]
) -> None:
    """Refuse options of evaluators, and budgets of attacks, that do not run."""
    from erase.eval.evaluators import get_evaluator, not_unless_named
    from erase.eval.evaluators.attack import BUDGETS

    running = [get_evaluator(name).name for name in options.evaluators or ()] or [
        name for name, one in evaluators.items() if one.fits is not not_unless_named
    ]
    check_idle(words, "--", evaluators, running, "--evaluators")
    check_idle(words, "--attack.", BUDGETS, options.attack.attacks, "--attack.attacks")


def prompts_given(
    options: Namespace, protocol: Protocol | None, concepts: Sequence[ConceptSpec]
) -> list[PromptSet]:
    """The prompt sets of the command line, or a protocol's own."""
    seeds, own = seeds_of(options.seeds), prompts_of(protocol, options, concepts)
    if len(seeds) > 1 and (own or "canvas" not in (options.prompts or ["canvas"])):
        raise ErasureError(
            "--seeds is of canvas's own prompts, and others are asked; leave it out, or repeat a "
            "prompt with other seeds"
        )
    if own:
        return [own]
    return [
        canvas_grid(seeds) if name == "canvas" else PromptSet.load(name) for name in options.prompts
    ]


def of_weights(
    options: Namespace, config: EvaluateConfig, protocol: Protocol | None, commands: list[str]
) -> EvalReport:
    """The evaluation of a delta, or of what another program erased."""
    from erase.eval.run import Evidence, evaluate

    model, delta, prompts = weights_given(options, protocol)
    evidence = None if options.erased else Evidence.of(Path(delta.source).parent, delta)
    return evaluate(
        model,
        delta,
        prompts,
        options.out,
        config,
        base_images=options.base_images,
        evidence=evidence,
        commands=commands,
        compared_with=options.compared_with,
    )


def weights_given(
    options: Namespace, protocol: Protocol | None
) -> tuple[DiffusionModel, ErasedDelta, list[PromptSet]]:
    """The base, what was erased from it, and the prompts to judge it on."""
    from erase.delta import ErasedDelta
    from erase.delta.base import load_base
    from erase.parallel.processes import default_device

    if options.erased:
        model, delta = erased_model(options, default_device())
        prompts = prompts_given(options, protocol, delta.origin.concepts)
    else:
        delta = ErasedDelta.load(options.delta)
        prompts = prompts_given(options, protocol, delta.origin.concepts)
        model = load_base(delta, options.model, default_device(), options.load)
    return model, delta, prompts or [canvas_grid(seeds_of(options.seeds))]


def validate(
    options: Namespace, config: EvaluateConfig, protocol: Protocol | None, finished: bool
) -> None:
    """Print what the command would do.

    Raises:
        ErasureError: it cannot run; all that is missing is told.
    """
    from erase.eval.plan import plan

    if finished:
        raise ErasureError(
            "--validate is for weights: of finished images nothing is drawn but the base's, and "
            "they are checked before that; leave --validate out"
        )
    model, delta, prompts = weights_given(options, protocol)
    found = plan(model, delta, prompts, options.out, config, base_images=options.base_images)
    console = Console()
    console.print(found.table())
    for line in found.lines():
        console.print(line, markup=False, highlight=False)
    found.check()


def of_images(
    options: Namespace, config: EvaluateConfig, protocol: Protocol | None, commands: list[str]
) -> EvalReport:
    """The evaluation of finished images."""
    from erase.eval.finished import evaluate_images, holds_images
    from erase.models import load_model
    from erase.parallel.processes import default_device

    if not options.concepts:
        raise ErasureError(
            f"{options.erased[0]} does not say what was forgotten; name it with --concepts"
        )
    folder = options.base_images
    given = folder is not None and holds_images(folder)
    unnamed = None if given else "canvas"
    concepts = concepts_named(options.concepts, options.model or unnamed)

    def load() -> DiffusionModel:
        return load_model(options.model or "canvas", default_device(), options.load)

    return evaluate_images(
        options.erased[0],
        concepts,
        folder if given else load,
        options.out,
        config,
        base_images=folder,
        prompts=prompts_given(options, protocol, concepts),
        commands=commands,
    )


def seeds_of(count: int) -> tuple[int, ...]:
    """The first `count` seeds of UnlearnCanvas's answer set."""
    if not 1 <= count <= len(ANSWER_SEEDS):
        raise ErasureError(
            f"--seeds is {count}; the canvas answer set has 1 to {len(ANSWER_SEEDS)}"
        )
    return ANSWER_SEEDS[:count]


def cli() -> None:
    """The installed command."""
    sys.exit(run(main, resumes=True))


if __name__ == "__main__":
    cli()
