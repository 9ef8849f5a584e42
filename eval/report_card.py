"""The model card of erased weights: Markdown with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from erase.models import CANVAS
from erase.origin import read_origin
from erase.usage import DIFFUSERS, Usage
from eval.report import EvalReport, words
from eval.report_words import glossary, limits, verdict_line
from prompts.errors import ErasureError

NEEDED = ("base_fingerprint", "base_id", "method", "config", "concepts", "created_with")

CARD = """\
---
{front}---

# {title}

{what}. This is {about}.

{concepts}

## Use

```python
{code}
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


def model_card(
    report: EvalReport | None, metadata: Mapping[str, str], usage: Usage = DIFFUSERS, notes: Sequence[str] = ()
) -> str:
    """The README.md of an export.

    Args:
        report: the scores, which stand beside the base's; None says that nothing was measured.
        metadata: of the delta: `base_fingerprint`, `base_id`, `method`, `config` (JSON), `concepts` (JSON list of
            `ConceptSpec` mappings), `created_with`; `parts`, if it was composed; and `license`, the base's, if it is known.
        usage: what the files are and how they are loaded.
        notes: further limits, e.g. of a LoRA's rank or of rounded weights.

    Raises:
        ErasureError: metadata lacks a key or holds broken JSON, or the report is of another erasure or tells UA without its price.
    """
    check_sources(report, metadata)
    concepts, config = _json(metadata, "concepts"), _json(metadata, "config")
    targets = " and ".join(concept["target"] for concept in concepts)
    title, what = _words(_base(metadata), targets, metadata["method"], len(concepts))
    return CARD.format(
        front=yaml.safe_dump(_front(metadata, usage), sort_keys=False, allow_unicode=True),
        title=title,
        what=what,
        about=usage.about,
        concepts=_concepts(concepts),
        code=usage.code.replace("path/to/base", _base_path(metadata["base_id"])),
        prompt=_prompt(concepts),
        scores=_scores(report),
        limits="\n".join(f"- {limit}" for limit in (*notes, *limits(report, targets or "the concept"))),
        made=_made(metadata),
        config=json.dumps(config, indent=2, ensure_ascii=False),
        reproduce=_reproduce(report),
    )


def check_sources(report: EvalReport | None, metadata: Mapping[str, str]) -> None:
    """Refuse what no card can be made of: metadata that lacks a key, a report of other concepts or of another base."""
    if lacks := [key for key in NEEDED if key not in metadata]:
        raise ErasureError(
            f"the metadata lacks {', '.join(lacks)}; a model card needs the metadata that the delta was saved with"
        )
    concepts = read_origin(metadata, "the delta").concepts
    if report is None:
        return
    told, targets = words(report.concept, "target"), [concept.target for concept in concepts]
    if sorted(told) != sorted(targets):
        names = (" and ".join(some) or "nothing" for some in (told, targets))
        raise ErasureError("the report is of erasing {}, the delta erases {}; name the report of this delta".format(*names))
    base = report.provenance.get("base_fingerprint", metadata["base_fingerprint"])
    if base != metadata["base_fingerprint"]:
        raise ErasureError(
            f"the report is of base {str(base)[:12]}, the delta of {metadata['base_fingerprint'][:12]}; name the report of this delta"
        )


def _words(base: str, targets: str, method: str, count: int) -> tuple[str, str]:
    """Title and first sentence. Nothing is erased where every part was composed with a negative scale, or with none."""
    if not targets:
        return f"{base}, changed", f"The weights of {base}, changed by deltas of `{method}` at the scales given below"
    was = "was" if count == 1 else "were"
    return f"{base} without {targets}", f"The weights of {base}, from which {targets} {was} erased with `{method}`"


def _json(metadata: Mapping[str, str], key: str) -> Any:
    try:
        return json.loads(metadata[key])
    except json.JSONDecodeError as error:
        raise ErasureError(f"the metadata's {key} is not JSON ({error}); take it from the delta as it is") from error


def _front(metadata: Mapping[str, str], usage: Usage) -> dict[str, Any]:
    """Front matter (https://huggingface.co/docs/hub/model-cards)."""
    base_id = metadata["base_id"]
    license = metadata.get("license") or _license_of(base_id)
    front: dict[str, Any] = {"license": license or "other"}
    if not license:
        front["license_name"] = "as-the-base"
        front |= {"license_link": f"https://huggingface.co/{base_id}"} if _on_hub(base_id) else {}
    front |= {"base_model": base_id, "base_model_relation": usage.relation} if _on_hub(base_id) else {}
    tags = ["concept-erasure", "machine-unlearning", *metadata["method"].split("+"), *usage.tags]
    return front | {"library_name": usage.library, "pipeline_tag": "text-to-image", "tags": tags}


def _on_hub(base_id: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base_id)) and not Path(base_id).exists()


def _license_of(base_id: str) -> str | None:
    """The licence that a base on this disk states in its own card."""
    from huggingface_hub import ModelCard

    card = (CANVAS if base_id == "canvas" else Path(base_id)) / "README.md"
    stated = ModelCard.load(card, ignore_metadata_errors=True).data.license if card.is_file() else None
    return stated if isinstance(stated, str) and stated != "other" else None


def _base_path(base_id: str) -> str:
    """What to load the base from: its hub id, or a stand-in for where it lies."""
    return base_id if _on_hub(base_id) else f"path/to/{Path(base_id).name}"


def _base(metadata: Mapping[str, str]) -> str:
    """The base's id; of a path on somebody's disk only its last part."""
    path = Path(metadata["base_id"])
    return path.name if path.is_absolute() else metadata["base_id"]


def _concepts(concepts: list[dict[str, Any]]) -> str:
    if not concepts:
        return "No concept was erased."
    rows = [(c["target"], c["anchor"], ", ".join(c.get("synonyms", ())) or "none given") for c in concepts]
    return _table(("erased", "in its place", "other names erased with it"), rows)


def _prompt(concepts: list[dict[str, Any]]) -> str:
    concept = concepts[0] if concepts else {"target": "anything"}
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
    noise = "[low, high] is the 95 % interval of sampling n judgements; ↑ higher is better, ↓ lower is better."
    return "\n\n".join(filter(None, [verdict_line(report), _table(heading, rows), noise, "\n".join(terms + judges)]))


def _judges(report: EvalReport) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for score in report.columns():
        names.setdefault(score.evaluator, []).append(score.name)
    return names


def _made(metadata: Mapping[str, str]) -> str:
    facts = {"base": _base(metadata), "base fingerprint": f"`{metadata['base_fingerprint']}`"}
    facts |= {"method": f"`{metadata['method']}`", "made with": metadata["created_with"]}
    tables = [_table(("", ""), list(facts.items()))]
    if "parts" in metadata:
        rows = [
            (part["erased"], f"{part['scale']:g}", part["method"], f"`{part['sha256'][:16]}`")
            for part in _json(metadata, "parts")
        ]
        tables.append("Composed of these deltas, scaled and added; a negative scale adds its concept instead of erasing it:")
        tables.append(_table(("erases", "scale", "method", "sha256"), rows))
    return "\n\n".join(tables)


def _reproduce(report: EvalReport | None) -> str:
    commands = report.provenance.get("commands") if report else None
    if not commands:
        return "The same base, method, config and versions on the same machine give the same weights again."
    return "Commands:\n\n```sh\n" + (commands if isinstance(commands, str) else "\n".join(commands)) + "\n```"


def _table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heading, ("---",) * len(heading), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
