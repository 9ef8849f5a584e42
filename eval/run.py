"""Evaluate an erasure: images of the base and of the erased model, scores of both, a report.

Both are drawn from the same prompts and seeds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from erase.delta import ErasedDelta
from erase.delta.origin import unanchored
from erase.eval.case import Case
from erase.eval.cost import cost_of
from erase.eval.evaluators import EVALUATORS, get_evaluator
from erase.eval.evidence import Evidence
from erase.eval.generate import GenerateConfig, generate, planned
from erase.eval.images import ImageSet
from erase.eval.report.curves import compared
from erase.eval.report.report import BASE, ERASED, EvalReport
from erase.eval.report.reproduce import recipe
from erase.eval.reporting import (
    Chosen,
    about_concepts,
    chosen_of,
    parts_of,
    report_on,
    scores_of,
    versions_of,
)
from erase.eval.scores import Score
from erase.models import DiffusionModel, load_model
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError, unknown
from erase.prompts.prompt_sets import PromptSet, apart, joined

__all__ = ["EvaluateConfig", "Evidence", "GenerateConfig", "evaluate", "score"]


@dataclass
class EvaluateConfig:
    """Evaluators, and the images that they look at."""

    evaluators: list[str] | None = None
    """names of the index, or package.module:NAME; default: those of ours that fit the prompts"""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    settings: dict[str, Any] = field(default_factory=dict)
    """an evaluator's own name -> its configuration, where it is not the default"""
    protocol: str | None = None
    """name and version of the protocol that these settings come from, for the report"""

    def __post_init__(self) -> None:
        if self.evaluators is not None and not self.evaluators:
            raise ErasureError(
                f"evaluators is an empty list; name some of {', '.join(EVALUATORS)}, or leave it "
                "out"
            )

    def chosen(self, case: Case) -> Chosen:
        """The evaluators that are named, or those of ours that fit the case, and their settings.

        Raises:
            ErasureError: an unknown evaluator, one that is named twice, or settings that are not
                its own or of no evaluator.
        """
        named = self.evaluators is not None
        evaluators: Chosen = {}
        for name in self.evaluators or EVALUATORS.ours:
            evaluator = get_evaluator(name)
            if not named and not evaluator.fits(case):
                continue
            if evaluator.name in (other.name for other, _ in evaluators.values()):
                raise ErasureError(
                    f"evaluators names {evaluator.name!r} twice; leave one of them out"
                )
            settings = evaluator.settings(self.settings.get(evaluator.name))
            evaluators[name] = evaluator, evaluator.settle(case, settings, named)

        known = {evaluator.name for evaluator, _ in evaluators.values()} | set(EVALUATORS)
        for name in self.settings:
            if name not in known:
                raise unknown("evaluator in settings", name, known)
        return evaluators


def evaluate(
    model: str | Path | DiffusionModel,
    delta: ErasedDelta,
    prompts: PromptSet | Sequence[PromptSet],
    out: str | Path,
    config: EvaluateConfig | None = None,
    *,
    base_images: str | Path | None = None,
    evidence: Evidence | None = None,
    commands: list[str] | None = None,
    compared_with: Sequence[str | Path] = (),
) -> EvalReport:
    """Generate before and after, score both, and write report.json, report.html and
    before_after.png into `out`.

    Under `accelerate launch` or `torchrun`, every process calls this with the same arguments;
    images are made and judged in shares, and the main process writes the report, the same as a
    single process would.

    Args:
        model: the base that the delta was made from, by name or loaded; a loaded one is left as it
            was found, bit for bit, also where an error ends the evaluation.
        delta: the erasure to evaluate.
        prompts: the evaluation's prompts; their labels say what each image should show. Of several
            sets each is scored by itself (`erase.eval.reporting.parts_of`); their images lie
            together, the case numbers counted on.
        out: folder of the report; the images go into its `erased` and, where no `base_images` is
            given, `base`.
        base_images: a folder to keep the base's images in, so that several evaluations share them;
            what evaluators find about the base lies beside it, in `NAME-work`.
        evidence: losses and mask for the report.
        commands: command lines that make it all again, for the report.
        compared_with: report.json of other runs of this base and concept, to lie beside this one
            where the page sets UA against what was kept.

    Raises:
        ErasureError: an unknown evaluator, a delta of another base, prompts that the evaluators
            cannot judge, a report of something else.
    """
    concepts = delta.origin.concepts  # before anything is drawn
    config, evidence, out = config or EvaluateConfig(), evidence or Evidence(), Path(out)
    about = about_concepts(concepts, anchored=not unanchored(delta.metadata))
    sets = [prompts] if isinstance(prompts, PromptSet) else prompts
    base = load_model(model) if isinstance(model, str | Path) else model
    delta.check(base)  # before the base's images are made, not after
    others = compared(compared_with, base.fingerprint, concepts)

    def foresee(one: PromptSet, asked: list[ConceptSpec]) -> Case:
        images = planned(one, out / "erased", config.generate)
        return Case(images, asked, base=base, delta=delta)

    parts = parts_of(apart(sets), concepts, foresee, config.chosen)
    provenance = _provenance(delta, config, chosen_of(parts))
    provenance |= {"versions": versions_of(parts), "commands": commands or []}
    folder = Path(base_images or out / "base")
    work = folder.with_name(f"{folder.name}-work") if base_images else out / "work"
    cases = _cases(base, delta, joined(sets), folder, work, out, config.generate)
    found = {"compared": others} if others else {}
    return report_on(cases, parts, about, provenance, out, evidence, recipe(delta), found)


def made_by(model: DiffusionModel, delta: ErasedDelta | None = None) -> dict[str, str]:
    """What images say of the model that they are of: a base, or one with a delta in it."""
    method = delta.origin.method if delta else "none"
    return {"model": model.name, "fingerprint": model.fingerprint, "delta": method}


def _cases(
    model: DiffusionModel,
    delta: ErasedDelta,
    prompts: PromptSet,
    base_folder: Path,
    base_work: Path,
    out: Path,
    config: GenerateConfig,
) -> dict[str, Case]:
    """Row of the report -> the case; its images are made when they are asked for.

    Args:
        base_folder: of the base's images.
        base_work: of the findings about the base, and of what the attacker has from it.
        out: of the report; it holds the rest.
    """

    def draw_base() -> ImageSet:
        return generate(model.pipeline(), prompts, base_folder, config, made_by(model))

    def draw_erased() -> ImageSet:
        with delta.applied(model):
            return generate(
                model.pipeline(), prompts, out / "erased", config, made_by(model, delta)
            )

    concepts, shared = delta.origin.concepts, base_work / "attacker"
    base = Case(draw_base, concepts, base=model, folder=base_work / BASE, shared=shared)
    erased = Case(
        draw_erased,
        concepts,
        base_images=lambda: base.images,
        base=model,
        delta=delta,
        folder=out / "work" / ERASED,
        shared=shared,
    )
    return {BASE: base, ERASED: erased}


def _provenance(delta: ErasedDelta, config: EvaluateConfig, chosen: Chosen) -> dict[str, Any]:
    """Where delta, images and scores came from."""
    elsewhere = ("config", "concepts", "format", "requests")
    evaluation: dict[str, Any] = {"evaluators": list(chosen), "generate": asdict(config.generate)}
    for evaluator, settings in chosen.values():
        evaluation[evaluator.name] = asdict(settings)
    if config.protocol:
        evaluation["protocol"] = config.protocol
    return {
        **{key: value for key, value in sorted(delta.metadata.items()) if key not in elsewhere},
        **({"requests": delta.requests} if delta.requests else {}),
        "config": delta.origin.config,
        "delta_sha256": delta.sha256,
        "delta_settings": _settings(delta),
        "evaluation": evaluation,
        "changed_weights": delta.count,
        "cost": cost_of(delta),
    }


def _settings(delta: ErasedDelta) -> dict[str, Any]:
    """Method and strength of a delta: 1 as it was trained, or the scale of each of its parts."""
    parts = json.loads(delta.metadata.get("parts", "null"))
    strength = [part["scale"] for part in parts] if parts else 1.0
    return {"method": delta.metadata["method"], "strength": strength}


def score(
    images: ImageSet,
    concepts: list[ConceptSpec],
    evaluators: list[str],
    config: EvaluateConfig | None = None,
) -> list[Score]:
    """Scores of one image set by several evaluators; every process asks for them together."""
    case = Case(images, concepts)
    return scores_of(case, replace(config or EvaluateConfig(), evaluators=evaluators).chosen(case))
