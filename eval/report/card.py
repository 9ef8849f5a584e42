"""The model card of erased weights, in Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from erase.delta.origin import gone, read_origin, requests_of, unanchored
from erase.eval.report.conclusion import denies
from erase.eval.report.front_matter import front_matter, on_hub
from erase.eval.report.report import EvalReport, words
from erase.eval.report.words import glossary, limits, verdict_line, verdicts
from erase.export.formats import DIFFUSERS, Usage
from erase.export.published import (
    code,
    command_without_paths,
    plain,
    without_folders,
    without_paths,
)
from erase.prompts.errors import ErasureError

NEEDED = ("base_fingerprint", "base_id", "method", "config", "concepts", "created_with")

PICTURE = "before_after.png"
"""beside the report, and in an exported folder beside its card"""

CARD = """\
# {title}

{what}. This is {about}.

{picture}{concepts}

## Use

```python
{code}
pipeline({prompt!r}{call}).images[0].save("image.png")
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
    report: EvalReport | None,
    metadata: Mapping[str, str],
    usage: Usage = DIFFUSERS,
    notes: Sequence[str] = (),
    *,
    sha256: str | Collection[str] = (),
    exact: bool = True,
    picture: bool = False,
) -> str:
    """The README.md of an export.

    Args:
        report: the scores, which stand beside the base's; None says that nothing was measured.
        metadata: of the delta: `base_fingerprint`, `base_id`, `method`, `config` (JSON), `concepts`
            (JSON list of `ConceptSpec` mappings), `created_with`; `parts`, if it was composed; and
            `license`, the base's, if it is known.
        usage: what the files are and how they are loaded.
        notes: further limits, e.g. of a LoRA's rank or of rounded weights.
        sha256: the delta's digest, or several that a report may be of; a report that names another
            one is refused.
        exact: whether the scores are of the very weights in the files; only then they stand in the
            front matter.
        picture: whether `PICTURE` lies beside the card.

    Raises:
        ErasureError: metadata lacks a key or holds broken JSON, or the report is of another erasure
            or tells UA without its price.
    """
    check_sources(report, metadata, sha256)
    concepts, config = _json(metadata, "concepts"), _json(metadata, "config")
    targets = [str(concept["target"]) for concept in concepts]
    denied = report is not None and denies(report.check())
    title, what = _words(metadata, denied)
    body = CARD.format(
        title=plain(title),
        what=what,
        about=usage.about,
        picture=f"![The same prompts and seeds before and after]({PICTURE})\n\n" if picture else "",
        concepts=_concepts(concepts, unanchored(metadata)),
        call=usage.call,
        code=usage.code.replace(
            '"path/to/base"', json.dumps(_base_path(metadata["base_id"]), ensure_ascii=False)
        ),
        prompt=_prompt(concepts),
        scores=_scores(report),
        limits="\n".join(
            f"- {limit}"
            for limit in (
                *notes,
                *map(plain, limits(report, " and ".join(targets) or "the concept")),
            )
        ),
        made=_made(metadata),
        config=json.dumps(without_paths(config), indent=2, ensure_ascii=False),
        reproduce=_reproduce(report),
    )
    front = front_matter(metadata, usage, title, report if exact else None)
    return f"---\n{front.to_yaml()}\n---\n\n{body}"


def check_sources(
    report: EvalReport | None, metadata: Mapping[str, str], sha256: str | Collection[str] = ()
) -> None:
    """Refuse what no card can be made of: metadata that lacks a key, a report of other concepts,
    another base or another delta."""
    if lacks := [key for key in NEEDED if key not in metadata]:
        raise ErasureError(
            f"the metadata lacks {', '.join(lacks)}; a model card needs the metadata that the "
            "delta was saved with"
        )
    concepts = read_origin(metadata, "the delta").concepts
    if report is None:
        return

    reported, targets = words(report.concept, "target"), [concept.target for concept in concepts]
    if sorted(reported) != sorted(targets):
        names = (" and ".join(some) or "nothing" for some in (reported, targets))
        raise ErasureError(
            "the report is of erasing {}, the delta erases {}; name the report of this "
            "delta".format(*names)
        )
    base = report.provenance.get("base_fingerprint", metadata["base_fingerprint"])
    if base != metadata["base_fingerprint"]:
        raise ErasureError(
            f"the report is of base {str(base)[:12]}, the delta of "
            f"{metadata['base_fingerprint'][:12]}; name the report of this delta"
        )
    _check_delta(report, metadata, [sha256] if isinstance(sha256, str) else sha256)


def _check_delta(report: EvalReport, metadata: Mapping[str, str], digests: Collection[str]) -> None:
    """The report's delta is this one: by its digest, or in a report from before there was one, by
    its settings."""
    way_out = (
        "name the report of this delta, or evaluate it: write it with --format delta and give it "
        "to erase-evaluate"
    )
    reported = report.provenance.get("delta_sha256")
    if reported is not None and digests and reported not in digests:
        raise ErasureError(
            f"the report is of the delta {str(reported)[:12]}, this one is "
            f"{next(iter(digests))[:12]} (of other settings, strength or parts); {way_out}"
        )
    if reported is None:
        for key in ("method", "config"):
            own = _json(metadata, key) if key == "config" else metadata[key]
            if report.provenance.get(key, own) != own:
                raise ErasureError(
                    f"the report is of a delta of another {key} than this one; {way_out}"
                )


def _words(metadata: Mapping[str, str], denied: bool) -> tuple[str, str]:
    """Title, and first sentence in Markdown. Nothing is erased where an erasure was undone, or
    every part was composed with a negative scale, or with none; `denied`: its report shows no
    success."""
    base, targets, method = _base(metadata), gone(metadata), metadata["method"]
    if "undoes" in metadata:
        return (
            f"{base}, undone",
            f"The weights of {plain(base)}, into which what {code(method)} erased was put back",
        )
    if not targets:
        return (
            f"{base}, changed",
            f"The weights of {plain(base)}, changed by deltas of {code(method)} at the scales "
            "given below",
        )
    was, named = "was" if len(targets) == 1 else "were", " and ".join(targets)
    if denied:
        return (
            f"{base}, an attempt to erase {named}",
            f"The weights of {plain(base)}, after an attempt with {code(method)} to erase "
            f"{plain(named)}, of which the scores show no success",
        )
    what = (
        f"The weights of {plain(base)}, from which {plain(named)} {was} erased with {code(method)}"
    )
    return f"{base} without {named}", what


def _json(metadata: Mapping[str, str], key: str) -> Any:
    try:
        return json.loads(metadata[key])
    except json.JSONDecodeError as error:
        raise ErasureError(
            f"the metadata's {key} is not JSON ({error}); take it from the delta as it is"
        ) from error


def _base_path(base_id: str) -> str:
    """What to load the base from: its hub id, or a stand-in for where it lies."""
    last = re.split(r"[/\\]", base_id.rstrip("/\\"))[-1]
    return base_id if on_hub(base_id) else f"path/to/{last}"


def _base(metadata: Mapping[str, str]) -> str:
    """The base's id; of a path on somebody's disk only its last part."""
    return without_folders(metadata["base_id"]).removeprefix("path/to/")


def _concepts(concepts: list[dict[str, Any]], unanchored: Collection[str]) -> str:
    if not concepts:
        return "No concept was erased."
    rows = [
        (
            plain(c["target"]),
            "not known" if c["target"] in unanchored else plain(c["anchor"]),
            plain(", ".join(c.get("synonyms", ())) or "none given"),
        )
        for c in concepts
    ]
    return _table(("erased", "in its place", "other names erased with it"), rows)


def _prompt(concepts: list[dict[str, Any]]) -> str:
    concept = concepts[0] if concepts else {"target": "anything"}
    return (list(concept.get("templates", ())) or ["an image of {}"])[0].replace(
        "{}", concept["target"]
    )


def _scores(report: EvalReport | None) -> str:
    if report is None:
        return "Not measured. Nothing is claimed about what is gone and what is left."
    heading = ("score", *map(plain, report.check().rows))
    rows = []
    for column in report.columns():
        scores = [report.score(row, column.name) for row in report.rows]
        rows.append(
            (
                plain(column.heading),
                *(f"{score.text()} (n {score.n})" if score else "–" for score in scores),
            )
        )
    terms = [f"- {plain(f'{name}: {meaning}.')}" for name, meaning in glossary(report).items()]
    judged = {judge: ", ".join(names) for judge, names in _judges(report).items() if judge}
    judges = [f"- {plain(f'judged by {judge}: {names}.')}" for judge, names in judged.items()]
    noise = (
        "[low, high] is the 95 % interval of sampling n judgements; ↑ higher is better, ↓ lower is "
        "better."
    )
    return "\n\n".join(
        filter(
            None,
            [
                plain(verdict_line(report)),
                "\n".join(f"- {plain(line)}" for line in verdicts(report)),
                _table(heading, rows),
                noise,
                "\n".join(terms + judges),
            ],
        )
    )


def _judges(report: EvalReport) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for score in report.columns():
        names.setdefault(score.evaluator, []).append(score.name)
    return names


def _made(metadata: Mapping[str, str]) -> str:
    facts = {"base": plain(_base(metadata)), "base fingerprint": code(metadata["base_fingerprint"])}
    facts |= {"method": code(metadata["method"]), "made with": plain(metadata["created_with"])}
    tables = [_table(("", ""), list(facts.items()))]
    if "parts" in metadata:
        rows = [
            (
                plain(part["erased"]),
                f"{part['scale']:g}",
                plain(part["method"]),
                code(part["sha256"][:16]),
            )
            for part in _json(metadata, "parts")
        ]
        tables.append(
            "Composed of these deltas, scaled and added; a negative scale adds its concept instead "
            "of erasing it:"
        )
        tables.append(_table(("erases", "scale", "method", "sha256"), rows))
    if requests := requests_of(metadata, "this delta"):
        tables.append("Erased one after another, each from what the one before had left:")
        headings = ("request", "erases", "method", "seed", "sha256 of its settings", "of its delta")
        tables.append(_table(headings, [_request(*numbered) for numbered in enumerate(requests)]))
    return "\n\n".join(tables)


def _request(place: int, request: Mapping[str, Any]) -> tuple[str, ...]:
    facts = plain(", ".join(request["erased"])), plain(request["method"])
    digests = code(request["config_sha256"][:16]), code(request["sha256"][:16])
    return str(place + 1), *facts, plain(request.get("seed", "")), *digests


def _reproduce(report: EvalReport | None) -> str:
    commands = report.provenance.get("commands") if report else None
    if not commands:
        return (
            "The same base, method, config and versions on the same machine give the same weights "
            "again."
        )
    lines = (
        commands.splitlines()
        if isinstance(commands, str)
        else [" ".join(str(line).split()) for line in commands]
    )
    text = "\n".join(map(command_without_paths, lines))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"Commands:\n\n{fence}sh\n{text}\n{fence}"


def _table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heading, ("---",) * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
