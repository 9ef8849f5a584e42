"""Evaluate an erasure: images of the base and of the erased model from the same prompts and seeds, scores, report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from erase.delta import ErasedDelta
from erase.mask import SaliencyMask
from erase.models import DiffusionModel, load_model
from eval.evaluators import get_evaluator
from eval.generate import GenerateConfig, generate
from eval.images import ImageSet
from eval.report import BASE, ERASED, EvalReport, Score
from eval.report_page import save_report
from prompts.concepts import ConceptSpec
from prompts.errors import ErasureError
from prompts.prompt_sets import PromptSet


@dataclass
class EvaluateConfig:
    """What is measured, and on which images."""

    evaluators: list[str] = field(default_factory=lambda: ["classifier", "clip"])
    """classifier (UA, IRA, CRA), clip (the same by zero-shot CLIP, and the CLIP score), nudenet (exposed boxes)"""
    generate: GenerateConfig = field(default_factory=GenerateConfig)


@dataclass
class Evidence:
    """What a run folder holds beside its delta, for the report."""

    losses: list[float] = field(default_factory=list)
    mask: SaliencyMask | None = None

    @classmethod
    def of(cls, folder: Path) -> Evidence:
        """Losses and mask of an erasure's folder, as far as they are there."""
        training, mask = folder / "training.json", folder / "mask.safetensors"
        losses = json.loads(training.read_text())["losses"] if training.exists() else []
        return cls(losses, SaliencyMask.load(mask) if mask.exists() else None)


def evaluate(
    model: str | DiffusionModel,
    delta: ErasedDelta,
    prompts: PromptSet,
    out: str | Path,
    config: EvaluateConfig | None = None,
    *,
    base_images: str | Path | None = None,
    evidence: Evidence | None = None,
    commands: list[str] | None = None,
    configs: Mapping[str, Any] | None = None,
) -> EvalReport:
    """Generate before and after, score both, and write report.json, report.html and before_after.png into `out`.

    Args:
        model: the base that the delta was made from, by name or loaded; a loaded one holds the erased weights afterwards.
        delta: what was erased.
        prompts: the evaluation's prompts; their labels say what each image should show.
        out: folder of the report; the images go into its `erased` and, where no `base_images` is given, `base`.
        base_images: a folder to keep the base's images in, so that several evaluations share them.
        evidence: losses and mask for the report.
        commands: command lines that make it all again, for the report.
        configs: evaluator name -> its Config, where it is not the default.

    Raises:
        ErasureError: an unknown evaluator, a delta of another base, prompts that the evaluators cannot judge.
    """
    config, evidence, out = config or EvaluateConfig(), evidence or Evidence(), Path(out)
    for name in config.evaluators:
        get_evaluator(name)  # a misspelt name fails before the hour of generating, not after
    concepts = [ConceptSpec(**concept) for concept in delta.concepts]  # type: ignore[arg-type]
    model = load_model(model) if isinstance(model, str) else model
    delta.check(model)  # before the base's images are made, not after
    base = {"model": model.name, "fingerprint": model.fingerprint}
    before = generate(model.pipeline(), prompts, Path(base_images or out / "base"), config.generate, base | {"delta": "none"})
    delta.apply(model)
    after = generate(
        model.pipeline(),
        prompts,
        out / "erased",
        config.generate,
        base | {"delta": delta.metadata["method"], "fingerprint": model.fingerprint},
    )
    images = {BASE: before, ERASED: after}
    report = _report(images, concepts, delta, config, commands or [], configs or {})
    mask = evidence.mask
    save_report(
        out,
        report,
        before,
        after,
        {"loss": evidence.losses} if evidence.losses else {},
        mask.layer_density() if mask else {},
        mask.sizes() if mask else None,
    )
    return report


def _report(
    images: Mapping[str, ImageSet],
    concepts: list[ConceptSpec],
    delta: ErasedDelta,
    config: EvaluateConfig,
    commands: list[str],
    configs: Mapping[str, Any],
) -> EvalReport:
    """Scores of both image sets, and where everything came from."""
    return EvalReport(
        concept=_concept(concepts),
        rows={row: score(found, concepts, config.evaluators, configs) for row, found in images.items()},
        provenance={
            **{key: value for key, value in delta.metadata.items() if key not in ("config", "concepts", "format")},
            "config": json.loads(delta.metadata["config"]),
            "evaluation": asdict(config),
            "changed_weights": delta.count,
            "nudenet": version("nudenet"),
            "open_clip": version("open_clip_torch"),
            "commands": commands,
        },
        extras=_confusion(images, concepts, config, configs),
    )


def score(
    images: ImageSet, concepts: list[ConceptSpec], evaluators: list[str], configs: Mapping[str, Any] | None = None
) -> list[Score]:
    """Scores of one image set by several evaluators, in their order."""
    scores: list[Score] = []
    for name in evaluators:
        module = get_evaluator(name)
        scores += module.evaluate(images, concepts, (configs or {}).get(name) or module.Config())
    return scores


def _concept(concepts: list[ConceptSpec]) -> dict[str, Any]:
    """One concept as it is; several as lists under the same keys."""
    if not concepts:
        raise ErasureError("the delta names no concept, so there is nothing to evaluate it for")
    if len(concepts) == 1:
        return {key: value for key, value in concepts[0].to_dict().items() if key not in ("templates", "retain")}
    return {
        "target": [concept.target for concept in concepts],
        "anchor": [concept.anchor for concept in concepts],
        "synonyms": [name for concept in concepts for name in concept.synonyms],
        "kind": sorted({concept.kind for concept in concepts if concept.kind}),
    }


def _confusion(
    images: Mapping[str, ImageSet], concepts: list[ConceptSpec], config: EvaluateConfig, configs: Mapping[str, Any]
) -> dict[str, Any]:
    """Confusion matrices of the first concept's kind, where the classifier judged."""
    if "classifier" not in config.evaluators:
        return {}
    from eval.evaluators.classifier import Config, confusions

    tables = {row: confusions(found, configs.get("classifier") or Config()) for row, found in images.items()}
    kind = concepts[0].kind
    return {"confusion": {row: table[kind] for row, table in tables.items() if kind in table}}
