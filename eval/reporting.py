"""From cases to a report: what is judged of each prompt set, the scores, the files."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from erase.eval.case import Case
from erase.eval.evaluators import EVALUATORS, Evaluator
from erase.eval.evidence import Evidence
from erase.eval.images import ImageSet
from erase.eval.outcomes import KeptOutcomes
from erase.eval.report.page import save_report
from erase.eval.report.report import EvalReport, differences
from erase.eval.report.setting import Setting, facts_since
from erase.eval.scores import Score
from erase.parallel.processes import processes
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_rows import asks_for
from erase.prompts.prompt_sets import PromptSet

Chosen = dict[str, tuple[Evaluator[Any], Any]]
"""name as it was given -> evaluator, and the configuration that it judges with"""
log = logging.getLogger("erase")


@dataclass(frozen=True)
class Part:
    """One of the prompt sets of an evaluation, as it is judged."""

    name: str
    """begins the names of its scores, `i2p: CLIP score`; empty where it is the only set"""
    prompts: PromptSet
    concepts: list[ConceptSpec]
    """those that it is judged on; of an only set, all"""
    chosen: Chosen
    unjudged: dict[str, str] = field(default_factory=dict)
    """evaluator that cannot judge prompts which ask for no concept -> its reason"""

    def narrowed(self, case: Case) -> Case:
        """The case of this set's images alone."""
        if not self.name:
            return case
        return case.narrowed({row.case for row in self.prompts.rows}, self.concepts, self.name)

    def told(self) -> dict[str, Any]:
        """For the report."""
        told: dict[str, Any] = {"prompts": len(self.prompts.rows), "sha256": self.prompts.sha256}
        told["judged_on"] = [concept.target for concept in self.concepts]
        return told | ({"not_judged_by": self.unjudged} if self.unjudged else {})


def parts_of(
    sets: Sequence[PromptSet],
    concepts: Sequence[ConceptSpec],
    foresee: Callable[[PromptSet, list[ConceptSpec]], Case],
    choose: Callable[[Case], Chosen],
) -> list[Part]:
    """What is judged of each set, checked before any image is made.

    Of several sets, each is judged on those concepts that its prompts name, and on those that no
    set names (I2P's prompts seldom say what they are of). A set that is left with none is of what
    must stay: an evaluator that needs a concept is left out there, and it is said.

    Args:
        sets: numbered apart.
        concepts: all that were forgotten.
        foresee: the case of a set and its concepts, with rows and no images.
        choose: the evaluators of a case.

    Raises:
        ErasureError: an evaluator refuses a set.
    """
    if len(sets) == 1:
        case = foresee(sets[0], list(concepts))
        return [_part("", sets[0], list(concepts), case, choose(case))]
    parts = []
    for one, asked in asked_of(sets, concepts):
        case = foresee(one, asked)
        parts.append(_part(one.name, one, asked, case, choose(case)))
    return parts


def asked_of(
    sets: Sequence[PromptSet], concepts: Sequence[ConceptSpec]
) -> list[tuple[PromptSet, list[ConceptSpec]]]:
    """Each set with the concepts that it is judged on (`parts_of`); an only set with all."""
    if len(sets) == 1:
        return [(sets[0], list(concepts))]
    named = [_named(one, concepts) for one in sets]
    pairs = []
    for one, own in zip(sets, named, strict=True):
        others = set().union(*named) - own
        pairs.append((one, [concept for concept in concepts if concept.target not in others]))
    return pairs


def _named(prompts: PromptSet, concepts: Sequence[ConceptSpec]) -> set[str]:
    """Targets of the concepts that a set names."""
    return {concept.target for concept in concepts if _asks_for(prompts, concept)}


def _asks_for(prompts: PromptSet, concept: ConceptSpec) -> bool:
    """Whether any prompt or label of a set names the concept."""
    return any(asks_for(row.prompt, row.labels, concept.names) for row in prompts.rows)


def _part(
    name: str, prompts: PromptSet, concepts: list[ConceptSpec], case: Case, chosen: Chosen
) -> Part:
    unjudged: dict[str, str] = {}
    for given, (evaluator, settings) in chosen.items():
        try:
            evaluator.check(case, settings)
        except ErasureError as error:
            if not name:
                raise
            if concepts:
                raise ErasureError(f"prompt set {name}: {error}") from error
            log.info("%s is not judged by %s: %s", name, given, error)
            unjudged[given] = str(error)
    kept = {given: pair for given, pair in chosen.items() if given not in unjudged}
    return Part(name, prompts, concepts, kept, unjudged)


def versions_of(parts: Sequence[Part]) -> dict[str, str]:
    """Distribution -> version, of those that evaluators come from and of those that they use.

    Raises:
        ErasureError: one is not installed.
    """
    versions: dict[str, str] = {}
    for name, (evaluator, _) in chosen_of(parts).items():
        for package in filter(None, (EVALUATORS.package(name), *evaluator.packages)):
            try:
                versions[package] = version(package)
            except PackageNotFoundError as error:
                raise ErasureError(
                    f"evaluator {name} needs {package}, which is not installed; install it"
                ) from error
    return versions


def chosen_of(parts: Sequence[Part]) -> Chosen:
    """The evaluators of all sets; the settings are those of the first set that each judges."""
    chosen: Chosen = {}
    for part in parts:
        chosen = part.chosen | chosen
    return chosen


def report_on(
    cases: Mapping[str, Case],
    parts: Sequence[Part],
    about: Mapping[str, Any],
    provenance: Mapping[str, Any],
    out: Path,
    evidence: Evidence | None = None,
    recipe: Mapping[str, str] | None = None,
    found: Mapping[str, Any] | None = None,
) -> EvalReport:
    """Score every case on every set, and write report.json, outcomes.json, report.html and
    before_after.png.

    Args:
        cases: row of the report -> case; the base first, then what was made of it.
        parts: the sets.
        about: the concept, or several, as the report tells them.
        provenance: where everything came from.
        out: folder of the report.
        evidence: losses and mask, if there are any.
        recipe: files that make the erasure again, for the page.
        found: extras that are known already.
    """
    began, folders = time.monotonic(), dict[str, Path]()
    # the page shows them, whoever else looks at them
    before, after = (case.images for case in cases.values())
    rows: dict[str, list[Score]] = {}
    extras: dict[str, Any] = dict(found or {})
    for row, case in cases.items():
        rows[row] = []
        for part in parts:
            own = part.narrowed(case)
            rows[row] += [_of_set(score, part.name) for score in scores_of(own, part.chosen)]
            label = f"{row}, {part.name}" if part.name else row
            folders |= {label: own.folder} if own.folder else {}
            for name, value in own.extras.items():
                extras.setdefault(name, {})[label] = value
    told = {part.name: part.told() for part in parts if part.name}
    cut = before.settings.get("cut_prompts")
    facts = {
        **provenance,
        **({"cut_evaluation_prompts": cut} if cut else {}),
        **({"prompt_sets": told} if told else {}),
    }
    report = EvalReport(dict(about), rows, facts, extras, differences(rows))
    if processes().is_main_process:
        setting = Setting(facts_since(began), recipe or {}, folders)
        _save(out, report, before, after, evidence or Evidence(), setting)
    processes().wait_for_everyone()  # who goes on finds the files
    return report


def _of_set(score: Score, name: str) -> Score:
    """The score under its set's name."""
    if not name:
        return score
    return replace(score, name=f"{name}: {score.name}", evaluator=f"{score.evaluator}, on {name}")


def scores_of(case: Case, chosen: Chosen) -> list[Score]:
    """Scores of one case; one that does not say its evaluator gets the name that was given."""
    scores: list[Score] = []
    givers: dict[str, str] = {}
    for name, (evaluator, settings) in chosen.items():
        for score in evaluator.evaluate(case, settings):
            if score.name in givers:
                raise ErasureError(
                    f"the score {score.name!r} is given twice, by {givers[score.name]} and by "
                    f"{name}; leave one of them out"
                )
            givers[score.name] = name
            scores.append(replace(score, evaluator=score.evaluator or name))
    return scores


def _save(
    out: Path,
    report: EvalReport,
    before: ImageSet,
    after: ImageSet,
    evidence: Evidence,
    setting: Setting,
) -> None:
    losses = {"loss": evidence.losses} if evidence.losses else {}
    mask = evidence.mask
    density, sizes = (mask.layer_density(), mask.sizes()) if mask else ({}, None)
    if mask and evidence.overlap is not None:
        share = mask.count() / mask.size
        shared = {"iou": evidence.overlap, "chance": share / (2 - share)}
        report = replace(report, extras=report.extras | {"overlap": shared})
    images = dict(zip(report.rows, (before, after), strict=True))
    KeptOutcomes.of(report, images, out).save(out)
    save_report(out, report, before, after, losses, density, sizes, setting)


def about_concepts(concepts: Sequence[ConceptSpec], anchored: bool = True) -> dict[str, Any]:
    """One concept as it is; several as lists under the same keys. `anchored`: what another program
    put in a concept's place is not known, and not told."""
    if not concepts:
        raise ErasureError("the delta names no concept, so there is nothing to evaluate it for")
    if len(concepts) == 1:
        about = {
            key: value
            for key, value in concepts[0].to_dict().items()
            if key not in ("templates", "retain")
        }
    else:
        about = {
            "target": [concept.target for concept in concepts],
            "anchor": [concept.anchor for concept in concepts],
            "synonyms": [name for concept in concepts for name in concept.synonyms],
            "kind": sorted({concept.kind for concept in concepts if concept.kind}),
        }
    return about if anchored else {key: about[key] for key in about if key != "anchor"}
