"""Evaluate an erasure: images of the base and of the erased model from the same prompts and seeds, scores, report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from erase.delta import ErasedDelta
from erase.eval.evaluators import EVALUATORS, get_evaluator
from erase.eval.evaluators.classifier import Config as ClassifierConfig
from erase.eval.evaluators.classifier import Judged, judged, load_judge
from erase.eval.evaluators.clip import Config as ClipConfig
from erase.eval.evaluators.nudenet import Config as NudeNetConfig
from erase.eval.generate import GenerateConfig, generate, planned
from erase.eval.images import ImageSet
from erase.eval.report.page import save_report
from erase.eval.report.report import BASE, ERASED, EvalReport, Score
from erase.files import errors_named
from erase.mask import SaliencyMask
from erase.models import DiffusionModel, load_model
from erase.parallel.processes import processes
from erase.prompts.canvas import KINDS
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import PromptSet


@dataclass
class EvaluateConfig:
    """What is measured, and on which images."""

    evaluators: list[str] | None = None
    """classifier (UA, IRA, CRA), clip (the same by zero-shot CLIP, and the CLIP score), nudenet (exposed boxes); default: classifier
    and clip on the embedded world, clip elsewhere (its score alone, where the prompts carry no label of the concept's kind)"""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    nudenet: NudeNetConfig = field(default_factory=NudeNetConfig)

    def for_prompts(self, prompts: PromptSet, concepts: list[ConceptSpec]) -> EvaluateConfig:
        """With what was left to us chosen for these prompts; CLIP is then the field's usual ViT-B/32 of OpenAI."""
        labels = prompts.rows[0].labels.keys()
        if set(KINDS) <= labels:
            return replace(self, evaluators=self.evaluators or ["classifier", "clip"])
        clip = self.clip
        if clip.model is None:
            clip = replace(clip, model="ViT-B-32", pretrained=clip.pretrained or "openai")
        if clip.zero_shot is None and self.evaluators is None and not any(concept.kind in labels for concept in concepts):
            clip = replace(clip, zero_shot=False)
        return replace(self, evaluators=self.evaluators or ["clip"], clip=clip)

    def __post_init__(self) -> None:
        if self.evaluators is not None and not self.evaluators:
            raise ErasureError(f"evaluators is an empty list; name some of {', '.join(EVALUATORS)}, or leave it out")


@dataclass
class Evidence:
    """What a run folder holds beside its delta, for the report."""

    losses: list[float] = field(default_factory=list)
    mask: SaliencyMask | None = None

    @classmethod
    def of(cls, folder: Path, delta: ErasedDelta | None = None) -> Evidence:
        """Losses and mask of an erasure's folder, as far as they are there.

        Args:
            folder: of a run.
            delta: the delta that they must be of; None: not compared.

        Raises:
            ErasureError: they are damaged, or of another delta.
        """
        training, mask = folder / "training.json", folder / "mask.safetensors"
        record: dict[str, Any] = {"losses": []}
        with errors_named(training, "delete it to report without the losses, or erase again"):
            if training.exists():
                record = json.loads(training.read_text(encoding="utf-8"))
            losses = list(map(float, record["losses"]))
        found = cls(losses, SaliencyMask.load(mask) if mask.exists() else None)

        if delta and (losses or found.mask):
            _check_run(folder / "run.json", delta)
            if record.get("delta_sha256", delta.sha256) != delta.sha256:
                raise _of_another(training, delta)
            if found.mask and not _may_change(found.mask, delta):
                raise _of_another(mask, delta)
        return found


def _check_run(path: Path, delta: ErasedDelta) -> None:
    """Refuse the folder of a run of another base, method or concept than the delta's."""
    if not path.exists():
        return
    with errors_named(path, "evaluate the delta in a folder of its own"):
        run = dict(json.loads(path.read_text(encoding="utf-8")))
        told = [{key: about.get(key) for key in ("base_fingerprint", "method")} for about in (run, delta.metadata)]
        concepts = json.loads(run.get("concepts", "[]"))
    if told[0] != told[1] or concepts != delta.concepts:
        raise _of_another(path, delta)


def _may_change(mask: SaliencyMask, delta: ErasedDelta) -> bool:
    """Whether the mask is of the delta's base and lets every weight change that the delta changes."""
    if mask.metadata.get("base_fingerprint") != delta.metadata.get("base_fingerprint"):
        return False
    pairs = [(bits, mask.bits.get(name)) for name, bits in delta.bits.items()]
    return all(own is not None and own.shape == bits.shape and not (bits & ~own).any() for bits, own in pairs)


def _of_another(path: Path, delta: ErasedDelta) -> ErasureError:
    return ErasureError(
        f"{path} is of another delta than {delta.source}; name the delta of that run, or move this one into a folder of its own"
    )


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
) -> EvalReport:
    """Generate before and after, score both, and write report.json, report.html and before_after.png into `out`.

    Under `accelerate launch` or `torchrun`, every process calls this with the same arguments; images are made and judged in shares,
    and the main process writes the report, the same as a single process would.

    Args:
        model: the base that the delta was made from, by name or loaded; a loaded one is left as it was found, bit for
            bit, also where an error ends the evaluation.
        delta: what was erased.
        prompts: the evaluation's prompts; their labels say what each image should show.
        out: folder of the report; the images go into its `erased` and, where no `base_images` is given, `base`.
        base_images: a folder to keep the base's images in, so that several evaluations share them.
        evidence: losses and mask for the report.
        commands: command lines that make it all again, for the report.

    Raises:
        ErasureError: an unknown evaluator, a delta of another base, prompts that the evaluators cannot judge.
    """
    origin = delta.origin  # before anything is drawn
    concepts = origin.concepts
    config, evidence, out = (config or EvaluateConfig()).for_prompts(prompts, concepts), evidence or Evidence(), Path(out)
    _check_judges(planned(prompts, out / "erased", config.generate), concepts, config)
    model = load_model(model) if isinstance(model, str) else model
    delta.check(model)  # before the base's images are made, not after
    base = {"model": model.name, "fingerprint": model.fingerprint}
    before = generate(model.pipeline(), prompts, Path(base_images or out / "base"), config.generate, base | {"delta": "none"})
    with delta.applied(model):
        told = base | {"delta": origin.method, "fingerprint": model.fingerprint}
        after = generate(model.pipeline(), prompts, out / "erased", config.generate, told)
    images = {BASE: before, ERASED: after}
    report = _report(images, concepts, delta, config, commands or [])
    mask = evidence.mask
    if processes().is_main_process:
        save_report(
            out,
            report,
            before,
            after,
            {"loss": evidence.losses} if evidence.losses else {},
            mask.layer_density() if mask else {},
            mask.sizes() if mask else None,
        )
    processes().wait_for_everyone()  # who goes on finds the files
    return report


def _check_judges(images: ImageSet, concepts: list[ConceptSpec], config: EvaluateConfig) -> None:
    """Refuse, before the hours of generating, evaluators that cannot judge these images, and scores of UA without its price."""
    names = config.evaluators or []
    scores = [one for name in names for one in get_evaluator(name).foreseen(images, concepts, getattr(config, name))]
    EvalReport(_concept(concepts), {BASE: scores}).check()


def _report(
    images: Mapping[str, ImageSet],
    concepts: list[ConceptSpec],
    delta: ErasedDelta,
    config: EvaluateConfig,
    commands: list[str],
) -> EvalReport:
    """Scores of both image sets, and where everything came from."""
    names, seen = config.evaluators or [], {}
    if "classifier" in names:  # scores and confusions of one look at the images
        seen = {row: judged(load_judge(config.classifier.judge), found, config.classifier) for row, found in images.items()}
    return EvalReport(
        concept=_concept(concepts),
        rows={row: score(found, concepts, names, config, seen.get(row)) for row, found in images.items()},
        provenance={
            **{key: value for key, value in sorted(delta.metadata.items()) if key not in ("config", "concepts", "format")},
            "config": delta.origin.config,
            "delta_sha256": delta.sha256,
            "delta_settings": _settings(delta),
            "evaluation": asdict(config),
            "changed_weights": delta.count,
            **_cut(images),
            "nudenet": version("nudenet"),
            "open_clip": version("open_clip_torch"),
            "commands": commands,
        },
        extras=_confusion(seen, concepts[0].kind),
    )


def _settings(delta: ErasedDelta) -> dict[str, Any]:
    """Method and strength of a delta: 1 as it was trained, or the scale of each of its parts."""
    parts = json.loads(delta.metadata.get("parts", "null"))
    strength = [part["scale"] for part in parts] if parts else 1.0
    return {"method": delta.metadata["method"], "strength": strength}


def _cut(images: Mapping[str, ImageSet]) -> dict[str, Any]:
    """The evaluation's prompts whose ends no text encoder saw, as their image sets say."""
    found = next((one.settings["cut_prompts"] for one in images.values() if "cut_prompts" in one.settings), None)
    return {"cut_evaluation_prompts": found} if found else {}


def score(
    images: ImageSet,
    concepts: list[ConceptSpec],
    evaluators: list[str],
    config: EvaluateConfig | None = None,
    seen: Judged | None = None,
) -> list[Score]:
    """Scores of one image set by several evaluators, in their order, each with its part of `config`.

    Every process asks for them together. `seen` is what the classifier saw, where it has judged these images already.
    """
    config = config or EvaluateConfig()
    scores: list[Score] = []
    for name in evaluators:
        if name == "classifier" and seen:
            scores += seen.scores(concepts, config.classifier)
        else:
            scores += get_evaluator(name).evaluate(images, concepts, getattr(config, name))
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


def _confusion(seen: Mapping[str, Judged], kind: str | None) -> dict[str, Any]:
    """Confusion matrices of the first concept's kind, where the classifier judged."""
    tables = {row: judgement.confusions() for row, judgement in seen.items()}
    return {"confusion": {row: table[kind] for row, table in tables.items() if kind in table}} if tables else {}
