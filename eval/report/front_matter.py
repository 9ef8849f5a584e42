"""The front matter of a model card, as the Hugging Face hub reads it: licence, base, tags and
scores."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erase.eval.report.report import EvalReport, words
from erase.export.formats import Usage
from erase.models import SHIPPED

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData


def front_matter(
    metadata: Mapping[str, str], usage: Usage, title: str, report: EvalReport | None
) -> ModelCardData:
    """Front matter (https://huggingface.co/docs/hub/model-cards), with the scores as its model
    index."""
    from huggingface_hub import ModelCardData

    base_id = metadata["base_id"]
    license, hosted = metadata.get("license") or _license_of(base_id), on_hub(base_id)
    # a key that the class does not know
    relation: dict[str, Any] = {"base_model_relation": usage.relation} if hosted else {}
    return ModelCardData(
        license=license or "other",
        license_name=None if license else "as-the-base",
        license_link=f"https://huggingface.co/{base_id}" if hosted and not license else None,
        base_model=base_id if hosted else None,
        library_name=usage.library,
        pipeline_tag="text-to-image",
        tags=["concept-erasure", "machine-unlearning", *metadata["method"].split("+"), *usage.tags],
        model_name=title if report else None,
        eval_results=_results(report) if report else None,
        **relation,
    )


def _results(report: EvalReport) -> list[EvalResult]:
    """Every score of every row; the base's stand beside the erased ones here too."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="prompts",
            dataset_name=(
                f"prompts of {', '.join(words(report.concept, 'target'))} and of what is kept"
            ),
            metric_type=score.name.lower().replace(" ", "_"),
            metric_name=f"{score.heading} ({row})",
            metric_value=round(score.value, 4),
        )
        for row, scores in report.check().rows.items()
        for score in scores
    ]


def on_hub(base_id: str) -> bool:
    """Whether a base is named by its id on the hub, and not by a place on this disk."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base_id)) and not Path(base_id).exists()


def _license_of(base_id: str) -> str | None:
    """The licence that a base on this disk states in its own card."""
    from huggingface_hub import ModelCard

    card = SHIPPED.get(base_id, Path(base_id)) / "README.md"
    stated = (
        ModelCard.load(card, ignore_metadata_errors=True).data.license if card.is_file() else None
    )
    return stated if isinstance(stated, str) and stated != "other" else None
