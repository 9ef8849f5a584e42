"""What an evaluation would do: what is judged by whom, how many images are drawn, what is missing,
how long the drawing takes. Nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from erase.delta import ErasedDelta
from erase.eval.case import Case
from erase.eval.evaluators import EVALUATORS, Evaluator
from erase.eval.generate import batches, left_to_make, planned
from erase.eval.report.report import BASE, ERASED
from erase.eval.reporting import asked_of
from erase.eval.run import EvaluateConfig, made_by
from erase.eval.sampling import prepared, sampled
from erase.models import Cond, DiffusionModel, autocast
from erase.models.pipelines import decode, encode, image_size
from erase.parallel.processes import processes
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import PromptSet, apart, joined

if TYPE_CHECKING:
    from rich.table import Table

STEPS = 2
"""denoising steps that are timed, after one that is not"""
ROWS = 4
"""images at a time that a CPU is timed with; a GPU is timed with a whole batch"""


@dataclass(frozen=True)
class Judged:
    """A prompt set, and who judges it by what settings."""

    name: str
    images: int
    concepts: list[str]
    evaluators: dict[str, dict[str, Any]]
    """name as it was given -> its settings, as far as they are not the defaults"""


@dataclass(frozen=True)
class Plan:
    """An evaluation before it is run."""

    judged: list[Judged]
    to_draw: dict[str, int]
    """row of the report -> images that are not there yet"""
    missing: list[str]
    """what keeps it from running, a sentence each"""
    seconds_each: float | None = None
    """to draw an image on this machine, as timed; None: there is nothing to draw, or it was not
    timed"""
    untimed: list[str] | None = None
    """evaluators that run the model themselves, for as long as their budgets say"""
    processes: int = 1

    @property
    def seconds(self) -> float | None:
        """Of the drawing, all of it: images that are left x seconds of one / processes."""
        if self.seconds_each is None:
            return None
        return sum(self.to_draw.values()) * self.seconds_each / self.processes

    def check(self) -> None:
        """Refuse a plan that cannot run, by all that is missing."""
        if self.missing:
            raise ErasureError(f"this evaluation cannot run: {'; '.join(self.missing)}")

    def table(self) -> Table:
        """For a console: a row per prompt set and evaluator."""
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for heading in ("prompts", "images", "concepts", "evaluator", "settings beside defaults"):
            table.add_column(heading, justify="right" if heading == "images" else "left")
        for part in self.judged:
            first = part.name, str(part.images), ", ".join(part.concepts) or "none"
            for name, settings in part.evaluators.items() or {"none": {}}.items():
                told = ", ".join(f"{key} {value}" for key, value in settings.items())
                table.add_row(*map(Text, (*first, name, told)))
                first = "", "", ""
        return table

    def lines(self) -> list[str]:
        """The sentences under the table."""
        drawn = "; ".join(f"{row}: {count}" for row, count in self.to_draw.items())
        lines = [f"images to draw: {drawn}"]
        if self.seconds is not None:
            each = f"{self.seconds_each:.2g} s an image, from denoising steps timed here"
            lines.append(f"drawing takes about {duration(self.seconds)} ({each})")
        if self.untimed:
            lines.append(
                f"not in it: judging, and what {', '.join(self.untimed)} draw and train by their "
                "own budgets (docs/attacks.md, docs/probes.md)"
            )
        return lines


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def plan(
    model: DiffusionModel,
    delta: ErasedDelta,
    prompts: PromptSet | Sequence[PromptSet],
    out: str | Path,
    config: EvaluateConfig | None = None,
    *,
    base_images: str | Path | None = None,
) -> Plan:
    """What `erase.eval.run.evaluate` would do with these arguments; the model is left as it was.

    Raises:
        ErasureError: a delta of another base or without a concept. What else is missing is told in
            the plan.
    """
    config, out = config or EvaluateConfig(), Path(out)
    sets = [prompts] if isinstance(prompts, PromptSet) else list(prompts)
    concepts = delta.origin.concepts
    delta.check(model)

    def foresee(one: PromptSet, asked: list[ConceptSpec]) -> Case:
        return Case(planned(one, out / ERASED, config.generate), asked, base=model, delta=delta)

    judged, missing, untimed = judging(apart(sets), concepts, foresee, config)
    whole, folder = joined(sets), Path(base_images or out / BASE)
    to_draw = {BASE: len(whole.rows), ERASED: len(whole.rows)}
    try:
        to_draw[BASE] = _left(model, whole, folder, config, None)
        with delta.applied(model):
            to_draw[ERASED] = _left(model, whole, out / ERASED, config, delta)
    except ErasureError as error:
        missing.append(str(error))
    timed = any(to_draw.values()) and not missing
    each = seconds_each(model, whole, config) if timed else None
    return Plan(judged, to_draw, missing, each, untimed, processes().num_processes)


def _left(
    model: DiffusionModel,
    prompts: PromptSet,
    folder: Path,
    config: EvaluateConfig,
    delta: ErasedDelta | None,
) -> int:
    about = made_by(model, delta)
    return left_to_make(model.pipeline(), prompts, folder, config.generate, about)


def judging(
    sets: Sequence[PromptSet],
    concepts: Sequence[ConceptSpec],
    foresee: Callable[[PromptSet, list[ConceptSpec]], Case],
    config: EvaluateConfig,
) -> tuple[list[Judged], list[str], list[str]]:
    """Who judges each set, what is missing for it, and who of them runs the model himself; each
    is asked, and not only the first that refuses."""
    judged, missing, untimed = [], dict[str, None](), dict[str, None]()
    for one, asked in asked_of(sets, concepts):
        case, evaluators = foresee(one, asked), dict[str, dict[str, Any]]()
        try:
            chosen = config.chosen(case)
        except ErasureError as error:
            missing[str(error)] = None
            chosen = {}
        for name, (evaluator, settings) in chosen.items():
            wants = [*_packages(name, evaluator), *_refusal(evaluator, case, settings)]
            if wants and not asked and len(sets) > 1:
                continue  # a set of what must stay is not judged by whom needs a concept
            evaluators[name] = _departures(evaluator, settings)
            missing |= dict.fromkeys(f"{name}: {want}" for want in wants)
            untimed |= {name: None} if evaluator.needs_model else {}
        named = [concept.target for concept in asked]
        judged.append(Judged(one.name, len(one.rows), named, evaluators))
    return judged, list(missing), list(untimed)


def _refusal(evaluator: Evaluator[Any], case: Case, settings: Any) -> list[str]:
    try:
        evaluator.check(case, settings)
    except ErasureError as error:
        return [str(error)]
    return []


def _packages(name: str, evaluator: Evaluator[Any]) -> list[str]:
    """What is said of packages that are not installed."""
    lacks = []
    for package in filter(None, (EVALUATORS.package(name), *evaluator.packages)):
        try:
            version(package)
        except PackageNotFoundError:
            lacks.append(f"{package} is not installed; install it")
    return lacks


def _departures(evaluator: Evaluator[Any], settings: Any) -> dict[str, Any]:
    usual = asdict(evaluator.config)
    return {key: value for key, value in asdict(settings).items() if usual.get(key) != value}


def seconds_each(
    model: DiffusionModel,
    prompts: PromptSet,
    config: EvaluateConfig,
    clock: Callable[[], float] = perf_counter,
) -> float:
    """Seconds to draw one image here: a step's time x all steps, and the decoding, of a batch, over
    its images. What the first step alone takes (kernels that are chosen, memory) is left out.

    Args:
        model: it draws.
        prompts: the first of them are drawn.
        config: how.
        clock: in seconds.
    """
    made = config.generate
    pipe = prepared(model.pipeline(), made)
    device, batch = pipe._execution_device, batches(prompts, made)[0]
    rows = batch.rows if device.type != "cpu" else batch.rows[:ROWS]
    cond = Cond.stack([encode(pipe, [row.prompt], device) for row in rows])
    null = Cond.stack([encode(pipe, [""], device)] * len(rows))
    seeds, side = [row.seed for row in rows], made.resolution or image_size(pipe)

    def take(steps: int) -> tuple[float, Any]:
        began = clock()
        with autocast(device, made.mixed_precision):
            latents = sampled(pipe, cond, null, seeds, batch.guidance, steps, side)
        latents.sum().item()  # until it is there
        return clock() - began, latents

    most = min(made.steps, STEPS)
    take(1)
    spent, latents = take(most)
    began = clock()
    decode(pipe, latents, made.mixed_precision).sum().item()
    return (spent / most * made.steps + clock() - began) / len(rows)
