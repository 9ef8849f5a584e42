"""The model card of erased weights: Markdown with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from eval.report import EvalReport
from eval.report_words import glossary, limits, verdict_line
from prompts.errors import ErasureError

NEEDED = ("base_fingerprint", "base_id", "method", "config", "concepts", "created_with")

CARD = """\
---
{front}---

# {base} without {targets}

The weights of {base}, from which {targets} {was} erased with `{method}`. They load in stock diffusers,
without the code that made them.

{concepts}

## Use

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")
pipeline({prompt!r}).images[0].save("image.png")
```

## Scores

{scores}

## Limits

{limits}

## How it was made

{made}

Config:

```json
{config}
```

{reproduce}
"""


def model_card(report: EvalReport | None, metadata: Mapping[str, str]) -> str:
    """The README.md of an exported folder.

    Args:
        report: the scores, which stand beside the base's; None says that nothing was measured.
        metadata: of the delta: `base_fingerprint`, `base_id`, `method`, `config` (JSON), `concepts` (JSON list of
            `ConceptSpec` mappings), `created_with`; and `license`, the base's, if it is known.

    Raises:
        ErasureError: metadata lacks a key or holds broken JSON, or the report tells UA without its price.
    """
    if lacks := [key for key in NEEDED if key not in metadata]:
        raise ErasureError(
            f"the metadata lacks {', '.join(lacks)}; a model card needs the metadata that the delta was saved with"
        )
    concepts, config = _json(metadata, "concepts"), _json(metadata, "config")
    targets = " and ".join(concept["target"] for concept in concepts)
    return CARD.format(
        front=yaml.safe_dump(_front(metadata), sort_keys=False, allow_unicode=True),
        base=_base(metadata),
        targets=targets,
        was="was" if len(concepts) == 1 else "were",
        method=metadata["method"],
        concepts=_concepts(concepts),
        prompt=_prompt(concepts[0]),
        scores=_scores(report),
        limits="\n".join(f"- {limit}" for limit in limits(report, targets)),
        made=_made(metadata),
        config=json.dumps(config, indent=2, ensure_ascii=False),
        reproduce=_reproduce(report),
    )


def _json(metadata: Mapping[str, str], key: str) -> Any:
    try:
        return json.loads(metadata[key])
    except json.JSONDecodeError as error:
        raise ErasureError(f"the metadata's {key} is not JSON ({error}); take it from the delta as it is") from error


def _front(metadata: Mapping[str, str]) -> dict[str, Any]:
    base_id = metadata["base_id"]
    on_hub = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base_id) and not Path(base_id).exists()
    front: dict[str, Any] = {"license": metadata.get("license", "other")}
    if "license" not in metadata:
        front["license_name"] = "as-the-base"
        front |= {"license_link": f"https://huggingface.co/{base_id}"} if on_hub else {}
    front |= {"base_model": base_id, "base_model_relation": "finetune"} if on_hub else {}
    tags = ["concept-erasure", "machine-unlearning", metadata["method"]]
    return front | {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}


def _base(metadata: Mapping[str, str]) -> str:
    """The base's id; of a path on somebody's disk only its last part."""
    path = Path(metadata["base_id"])
    return path.name if path.is_absolute() else metadata["base_id"]


def _concepts(concepts: list[dict[str, Any]]) -> str:
    rows = [(c["target"], c["anchor"], ", ".join(c.get("synonyms", ())) or "none given") for c in concepts]
    return _table(("erased", "in its place", "other names erased with it"), rows)


def _prompt(concept: Mapping[str, Any]) -> str:
    return (list(concept.get("templates", ())) or ["an image of {}"])[0].replace("{}", concept["target"])


def _scores(report: EvalReport | None) -> str:
    if report is None:
        return "Not measured. Nothing is claimed about what is gone and what is left."
    heading = ("score", *report.check().rows)
    rows = []
    for column in report.columns():
        found = [report.score(row, column.name) for row in report.rows]
        rows.append((column.heading, *(f"{score.text()} (n {score.n})" if score else "–" for score in found)))
    terms = [f"- {name}: {meaning}." for name, meaning in glossary(report).items()]
    judges = [f"- judged by {judge}: {', '.join(names)}." for judge, names in _judges(report).items() if judge]
    noise = "± is one standard error of sampling n judgements; ↑ higher is better, ↓ lower is better."
    return "\n\n".join(filter(None, [verdict_line(report), _table(heading, rows), noise, "\n".join(terms + judges)]))


def _judges(report: EvalReport) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for score in report.columns():
        names.setdefault(score.evaluator, []).append(score.name)
    return names


def _made(metadata: Mapping[str, str]) -> str:
    facts = {"base": _base(metadata), "base fingerprint": f"`{metadata['base_fingerprint']}`"}
    facts |= {"method": f"`{metadata['method']}`", "made with": metadata["created_with"]}
    return _table(("", ""), list(facts.items()))


def _reproduce(report: EvalReport | None) -> str:
    commands = report.provenance.get("commands") if report else None
    if not commands:
        return "The same base, method, config and versions on the same machine give the same weights again."
    return "Commands:\n\n```sh\n" + (commands if isinstance(commands, str) else "\n".join(commands)) + "\n```"


def _table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heading, ("---",) * len(heading), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
