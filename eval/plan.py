"""What an evaluation would do: what is judged by whom, how many images are drawn, what is missing,
how long drawing, attacks and relearning take. Nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erase.claims import flat
from erase.delta import ErasedDelta
from erase.eval.budget import Budget, Speed, speed
from erase.eval.case import Case
from erase.eval.evaluators import EVALUATORS, Evaluator
from erase.eval.generate import left_to_make, planned
from erase.eval.report.report import BASE, ERASED
from erase.eval.reporting import asked_of
from erase.eval.run import EvaluateConfig, made_by
from erase.models import DiffusionModel
from erase.parallel.processes import processes
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import PromptSet, apart, joined

if TYPE_CHECKING:
    from rich.table import Table


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
    speed: Speed | None = None
    """of this machine, as timed; None: there is nothing to time, or something is missing"""
    budgets: Mapping[str, Budget] = field(default_factory=dict)
    """evaluator that runs the model itself -> what it asks of it"""
    untimed: Sequence[str] = ()
    """those that do not say it"""
    processes: int = 1

    @property
    def seconds(self) -> dict[str, float]:
        """Of the drawing, and of each evaluator that runs the model itself."""
        if self.speed is None:
            return {}
        asked = {"drawing": Budget(sum(self.to_draw.values())), **self.budgets}
        found = {name: self.speed.of(each, self.processes) for name, each in asked.items()}
        return {name: seconds for name, seconds in found.items() if seconds}

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
        found = self.seconds
        for name, seconds in found.items():
            lines.append(f"{name} takes about {duration(seconds)}{self._of(name)}")
        if len(found) > 1:
            lines.append(f"together about {duration(sum(found.values()))}")
        if found:
            others = [f"what {name} asks of the model" for name in self.untimed]
            lines.append(f"not in it: {', '.join(['judging', *others])}")
        return lines

    def _of(self, name: str) -> str:
        """What a time is for."""
        assert self.speed is not None  # there are seconds
        if name not in self.budgets:
            return f" ({self.speed.image:.2g} s an image, from denoising steps timed here)"
        images, asked = (
            round(self.budgets[name].images),
            round(self.budgets[name].asked.predictions),
        )
        return f" at most ({images:,} images and {asked:,} predictions, of both models)"


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

    judged, missing, budgets = judging(apart(sets), concepts, foresee, config)
    whole, folder = joined(sets), Path(base_images or out / BASE)
    to_draw = {BASE: len(whole.rows), ERASED: len(whole.rows)}
    try:
        to_draw[BASE] = _left(model, whole, folder, config, None)
        with delta.applied(model):
            to_draw[ERASED] = _left(model, whole, out / ERASED, config, delta)
    except ErasureError as error:
        missing.append(str(error))
    known = {name: each for name, each in budgets.items() if each}
    timed = (any(to_draw.values()) or known) and not missing
    pace = speed(model, whole, config.generate) if timed else None
    untimed = [name for name in budgets if name not in known]
    return Plan(judged, to_draw, missing, pace, known, untimed, processes().num_processes)


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
) -> tuple[list[Judged], list[str], dict[str, Budget | None]]:
    """Who judges each set, what is missing for it, and who of them runs the model himself, and how
    much; each is asked, and not only the first that refuses."""
    judged, missing = [], dict[str, None]()
    budgets: dict[str, Budget | None] = {}
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
            if evaluator.needs_model and not wants:
                own, before = evaluator.budget(case, settings), budgets.get(name, Budget())
                budgets[name] = before + own if before and own else None
        named = [concept.target for concept in asked]
        judged.append(Judged(one.name, len(one.rows), named, evaluators))
    return judged, list(missing), budgets


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
    usual = flat(asdict(evaluator.config))
    return {key: value for key, value in flat(asdict(settings)).items() if usual.get(key) != value}
