"""Measure erasures on the embedded world, for the tables of docs/results.md.

the default preset, every concept:
  python scripts/canvas/results.py --concepts all
a group of variants (scripts/canvas/variants.py), three concepts of three kinds, three seeds:
  python scripts/canvas/results.py --variants sweep --seeds 0 1 2
fewer images of other concepts, and the classifier alone:
  python scripts/canvas/results.py --variants sweep --others 96 --evaluators classifier
five seeds of images, 80 that ask for the concept and 480 others:
  python scripts/canvas/results.py --answers 5 --asked 80 --others 480 --evaluators classifier
the flow transformer instead of the UNet, in a folder of its own:
  python scripts/canvas/results.py --model canvas-flow --variants salun uce --out runs/results-flow
the tables of all that was measured:
  python scripts/canvas/results.py --table

Each measurement is one line of OUT/results.jsonl; what is there is not measured again, so that the
script can be stopped at any time, and several can share the work: `--part 1 2` takes every second
one. Deltas are kept in OUT/deltas, for scripts/canvas/robustness.py.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from erase.delta import ErasedDelta
from erase.eval.generate import GenerateConfig, generate
from erase.eval.images import ImageSet
from erase.eval.run import score
from erase.eval.scores import Outcomes, Score
from erase.latents.prepare import Plan
from erase.mask import SaliencyMask
from erase.models import DiffusionModel, load_model
from erase.objectives.remap import Remap
from erase.parallel.processes import default_device
from erase.prompts.canvas import canvas_concept
from erase.prompts.concepts import ConceptSpec
from erase.prompts.prompt_rows import PromptRow
from erase.prompts.prompt_sets import ANSWER_SEEDS, PromptSet, canvas_grid
from erase.run import EraseConfig, erase_concept
from erase.scripts.bench.measuring import new_peak, start_peak
from erase.scripts.canvas.measuring import (
    Job,
    delta_path,
    jobs_of,
    make_parser,
    read_rows,
    spaced,
    tell,
)
from erase.scripts.canvas.tables import grid, paired, prediction, summary, table
from erase.scripts.canvas.variants import Variant
from erase.task import Task
from erase.training.rules import RULES, held
from erase.training.saliency import Objective, compute_statistics
from erase.training.statistics import Statistics

EVALUATORS = ["classifier", "clip"]
RANKED = (*RULES, "matched-random", "lowest", "inverted")


@dataclass(frozen=True)
class Budget:
    """The images that judge an erasure."""

    answers: int
    """seeds of the answer set"""
    asked: int | None
    """images that ask for the concept, spread over the set; None: all"""
    others: int | None
    """images that ask for other concepts of its kind, spread over the set; None: all"""
    evaluators: list[str]
    config: GenerateConfig


def measure(job: Job, variant: Variant, out: Path, budget: Budget) -> dict[str, Any]:
    """Erase, generate, score beside the base's images of the same prompts and seeds."""
    concept, model = canvas_concept(job.concept), load_model(job.model)
    prompts = canvas_grid(ANSWER_SEEDS[: budget.answers])
    asked = asked_for(prompts, concept, budget.others, budget.asked)
    delta, evidence = erased(job, variant, model, concept, out)
    delta.save(delta_path(job, out))
    folder = out / "images" / job.slug
    with delta.applied(model):
        provenance = {"fingerprint": model.fingerprint}
        after = generate(model.pipeline(), asked, folder, budget.config, provenance)
    cases, evaluators = tuple(row.case for row in asked.rows), tuple(budget.evaluators)
    rows = {
        "base": _base_scores(base_folder(budget, out), cases, job.concept, evaluators),
        "erased": score(after, [concept], budget.evaluators),
    }
    shutil.rmtree(folder)
    return {
        "concept": job.concept,
        "kind": concept.kind,
        "variant": job.name,
        "seed": job.seed,
        "answers": budget.answers,
        "asked": budget.asked,
        "others": budget.others,
        "base_fingerprint": delta.metadata["base_fingerprint"],
        "settings": asdict(variant.settings),
        "latents": asdict(variant.latents),
        **evidence,
        "changed": delta.count,
        **{row: _rounded(scores) for row, scores in rows.items()},
        "judged": _judged(rows["base"], rows["erased"]),
    }


def erased(
    job: Job,
    variant: Variant,
    model: DiffusionModel,
    concept: ConceptSpec,
    out: Path,
    *,
    share_latents: bool = True,
) -> tuple[ErasedDelta, dict[str, Any]]:
    """The delta, the CPU seconds that it took (where variants share the statistics of gradients,
    without those; where they share latents, without such as were there), the most memory that the
    process held meanwhile, the loss of its last ten steps, and the share of the squared benefit
    that its mask holds."""
    settings, statistics = variant.settings, None
    if variant.shares:
        statistics = _statistics(job, variant, model, concept, out)
        if settings.mask.rule in RANKED:
            settings = replace(settings, mask=replace(settings.mask, saliency=str(statistics)))

    folder = out / "runs" / job.slug
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if share_latents:  # the same for all variants of a concept and seed
        (out / "latents").mkdir(exist_ok=True)
        (folder / "latents").symlink_to((out / "latents").resolve())
    config = EraseConfig(method=variant.method, seed=job.seed, latents=variant.latents)
    device = default_device()
    start_peak(device)
    started = time.process_time()
    delta = erase_concept(concept, config, settings, model=model, out=folder)
    seconds = time.process_time() - started
    evidence: dict[str, Any] = {"seconds": round(seconds, 1), "peak_bytes": new_peak(device)}

    losses = json.loads((folder / "training.json").read_text(encoding="utf-8"))["losses"]
    evidence["loss"] = sum(losses[-10:]) / len(losses[-10:]) if losses else None
    if statistics and (folder / "mask.safetensors").exists():
        mask = SaliencyMask.load(folder / "mask.safetensors")
        evidence["held"] = held(Statistics.load(statistics), mask)
    shutil.rmtree(folder)
    return delta, evidence


def _statistics(
    job: Job, variant: Variant, model: DiffusionModel, concept: ConceptSpec, out: Path
) -> Path:
    """Those of every rule, computed once for all variants with the same batches."""
    settings = variant.settings
    about = json.dumps([asdict(variant.latents), _batches_of(settings)])
    digest = hashlib.sha256(about.encode()).hexdigest()[:8]
    path = out / "statistics" / f"{job.concept}-{job.seed}-{digest}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        plan = Plan(model, [concept], variant.latents, job.seed, out / "latents")
        task = Task(model, [concept], plan, job.seed)
        remap = Remap(task, settings)
        needed = sorted({name for rule in RULES.values() for name in rule.needs})
        objective = Objective(remap.loss, remap.batches)
        compute_statistics(task, settings, tuple(needed), objective).save(path)
    return path


def _batches_of(settings: Any) -> dict[str, Any]:
    """What decides the gradients: the settings, less how a mask is cut and how long one trains."""
    about = asdict(settings)
    for name in ("rule", "density", "allocation", "like", "file", "saliency"):
        del about["mask"][name]
    about["train"] = settings.train.batch_size
    return about


def asked_for(
    prompts: PromptSet, concept: ConceptSpec, others: int | None, asked: int | None = None
) -> PromptSet:
    """So many of the rows that ask for the concept, and of the others, spread evenly; None: all."""
    own: list[PromptRow] = []
    rest: list[PromptRow] = []
    for row in prompts.rows:
        asks = row.labels.get(str(concept.kind)) == concept.target
        (own if asks else rest).append(row)
    picked = [
        *spaced(own, len(own) if asked is None else asked),
        *spaced(rest, len(rest) if others is None else others),
    ]
    return replace(prompts, rows=tuple(sorted(picked, key=lambda row: row.case)))


def base_folder(budget: Budget, out: Path) -> Path:
    """The folder of the base's images of the whole answer set."""
    return out / f"base-{budget.answers}"


def draw_base(budget: Budget, name: str, out: Path) -> None:
    """Make the base's images, once for all measurements."""
    model, prompts = load_model(name), canvas_grid(ANSWER_SEEDS[: budget.answers])
    provenance = {"fingerprint": model.fingerprint}
    generate(model.pipeline(), prompts, base_folder(budget, out), budget.config, provenance)


@cache
def _base_scores(
    folder: Path, cases: tuple[int, ...], concept: str, evaluators: tuple[str, ...]
) -> list[Score]:
    """The same for every variant and seed of a concept: the same images, the same judges."""
    images = ImageSet.open(folder)
    images = replace(images, rows=[row for row in images.rows if row.case in cases])
    return score(images, [canvas_concept(concept)], list(evaluators))


def _rounded(scores: list[Score]) -> dict[str, float]:
    return {score.name: round(score.value, 3) for score in scores}


def _judged(base: list[Score], erased: list[Score]) -> dict[str, list[Any]]:
    """Score -> the cases of its judgements, and for base and erased a 1 or 0 for each."""
    after = {found.name: found.outcomes for found in erased}
    judged = {}
    for found in base:
        cases = _cases(found.outcomes)
        if cases == _cases(after.get(found.name, ())):
            judged[found.name] = [cases, _bits(found.outcomes), _bits(after[found.name])]
    return judged


def _cases(judged: Outcomes) -> list[int]:
    return [case for case, _ in judged]


def _bits(judged: Outcomes) -> str:
    return "".join(str(int(value > 0)) for _, value in judged)


@cache
def _done(path: Path) -> set[tuple[Any, ...]]:
    return {_key(row) for row in read_rows(path)}


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    budget = row["answers"], row.get("asked"), row.get("others")
    return row["concept"], row["variant"], row["seed"], *budget


def main() -> None:
    """Measure what is asked for and not yet there."""
    parser = make_parser()
    parser.description = __doc__
    parser.add_argument(
        "--answers",
        type=int,
        default=1,
        help="seeds of the answer set: images of each object x style x colour",
    )
    parser.add_argument(
        "--others", type=int, default=None, help="images of other concepts; default: all"
    )
    parser.add_argument("--evaluators", nargs="+", default=EVALUATORS)
    parser.add_argument(
        "--asked", type=int, default=None, help="images that ask for the concept; default: all"
    )
    args = parser.parse_args()
    record = args.out / "results.jsonl"
    if args.table:
        rows = read_rows(record)
        swept = [row for row in rows if row["variant"].endswith("%")]
        tables = (summary(rows), paired(rows), table(rows), grid(swept), prediction(rows))
        print("\n\n".join(tables))
        return

    args.out.mkdir(parents=True, exist_ok=True)
    config = GenerateConfig(steps=args.steps, mixed_precision=args.precision)
    budget = Budget(args.answers, args.asked, args.others, args.evaluators, config)
    draw_base(budget, args.model, args.out)
    for job, variant in jobs_of(args):
        key = (job.concept, job.name, job.seed, budget.answers, budget.asked, budget.others)
        if key in _done(record):
            continue
        row = measure(job, variant, args.out, budget)
        tell(record, row, [job.slug, row["seconds"], "s", row["changed"], row["erased"]])


if __name__ == "__main__":
    main()
