"""report.html: one self-contained page of evidence, and the folder that holds it."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from erase.eval.images import ImageRow, ImageSet
from erase.eval.report.chart import chart
from erase.eval.report.figures import before_after, data_uri, matched
from erase.eval.report.report import BASE, SCHEMA_VERSION, EvalReport, words
from erase.eval.report.words import (
    change_text,
    either,
    glossary,
    limits,
    signed,
    verdict_line,
    verdicts,
)
from erase.files import atomic_write
from erase.prompts.prompt_rows import PromptRow, asks_for

FORGET, RETAIN = 18, 30  # before/after pairs on the page: that ask for the concept, and that do not
STRIP = 4  # columns of the strip that ask for the concept, and as many that do not
MASK = (
    "The saliency mask says which weights were allowed to change. It does not say where in the "
    "network the concept is kept."
)


def names_concept(row: ImageRow | PromptRow, concept: Mapping[str, Any]) -> bool:
    """Whether the row's labels or its prompt name what was forgotten, or a synonym of it."""
    names = [word for key in ("target", "synonyms") for word in words(concept, key)]
    return asks_for(row.prompt, row.labels, names)


def spread_out(rows: Sequence[ImageRow], count: int) -> list[ImageRow]:
    """`count` rows drawn at random (always the same ones), each time one whose labels were drawn
    least; sorted by case."""
    pool, seen = random.Random(0).sample(list(rows), len(rows)), Counter[tuple[str, str]]()
    drawn: list[ImageRow] = []
    while pool and len(drawn) < count:
        row = min(pool, key=lambda row: sum(seen[label] for label in row.labels.items()))
        seen.update(row.labels.items())
        drawn.append(row)
        pool.remove(row)
    return sorted(drawn, key=lambda row: row.case)


def groups(
    concept: Mapping[str, Any], images: ImageSet, forget: int, retain: int
) -> dict[str, list[ImageRow]]:
    """Rows to show, under what they ask for: the concept first, then anything else."""
    asking = [row for row in images.rows if names_concept(row, concept)]
    others = [row for row in images.rows if not names_concept(row, concept)]
    return {
        f"Prompts that ask for {either(concept)}": spread_out(asking, forget),
        "Prompts that ask for something else": spread_out(others, retain),
    }


# ---- scores, saliency density, confusion, provenance ---------------------------------------------


def _score_cell(report: EvalReport, row: str, name: str) -> dict[str, str] | None:
    score, base = report.score(row, name), report.score(BASE, name)
    if score is None:
        return None
    cell = {
        "value": score.value_text(),
        "interval": score.interval_text(),
        "n": str(score.n),
        "change": "",
        "paired": "",
        "verdict": "",
    }
    if base and row != BASE:
        cell["change"] = signed(score.value - base.value, base.decimals)
        cell["verdict"] = ("within noise", "better", "worse")[report.verdict(row, name)]
        if difference := report.difference(row, name):
            cell["paired"] = change_text(base, difference)
    return cell


def _scores(report: EvalReport) -> dict[str, Any]:
    rows = []
    for score in report.columns():
        rows.append((score, [_score_cell(report, row, score.name) for row in report.rows]))
    return {"models": list(report.rows), "rows": rows, "glossary": glossary(report)}


@dataclass(frozen=True)
class Block:
    """A block of the network: the fraction of its weights that the mask lets change, and the same
    for each of its layers."""

    name: str
    density: float
    layers: dict[str, float]


def block_name(parameter: str) -> str:
    """`down_blocks.1` for `down_blocks.1.attentions.0…`: up to the first number, or the first word
    if there is none."""
    parts = parameter.split(".")
    number = next((i for i, part in enumerate(parts[:4]) if part.isdigit()), 0)
    return ".".join(parts[: number + 1])


def blocks(density: Mapping[str, float], sizes: Mapping[str, int]) -> list[Block]:
    """Layers grouped by block in order of first appearance; a block's density weighs its layers by
    size (1 if not known)."""
    grouped: dict[str, dict[str, float]] = defaultdict(dict)
    for name, fraction in density.items():
        grouped[block_name(name)][name] = fraction
    return [Block(name, mean_density(layers, sizes), layers) for name, layers in grouped.items()]


def mean_density(density: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """Fraction of all weights that the mask lets change; NaN-free: 0 without layers."""
    weights = {name: sizes.get(name, 1) for name in density}
    return sum(weights[name] * density[name] for name in density) / (sum(weights.values()) or 1)


def _confusion(report: EvalReport) -> list[dict[str, Any]]:
    tables = []
    for row, table in report.extras.get("confusion", {}).items():
        shares = []
        for counts in table["counts"]:
            total = sum(counts) or 1
            shares.append([count / total for count in counts])
        tables.append({"row": row, "shares": shares} | table)
    return tables


def _settings(before: ImageSet, after: ImageSet) -> list[tuple[str, str, str]]:
    keys = dict.fromkeys([*before.settings, *after.settings])
    return [(key, _flat(before.settings.get(key)), _flat(after.settings.get(key))) for key in keys]


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    return (
        "none"
        if value is None
        else value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False)
    )


def _provenance(report: EvalReport) -> dict[str, Any]:
    known = {key: report.provenance.get(key) for key in ("commands", "config")}
    commands = known["commands"] or []
    config = known["config"] or {}
    return {
        "commands": commands.splitlines() if isinstance(commands, str) else commands,
        "config": config
        if isinstance(config, str)
        else json.dumps(config, indent=2, ensure_ascii=False),
        "facts": {
            key: _flat(value) for key, value in report.provenance.items() if key not in known
        },
    }


# ---- the page ------------------------------------------------------------------------------------


def render_html(
    report: EvalReport,
    before: ImageSet,
    after: ImageSet,
    curves: Mapping[str, Sequence[float]],
    density: Mapping[str, float],
    sizes: Mapping[str, int] | None = None,
) -> str:
    """The report as one HTML page that asks nothing of the network.

    Args:
        report: the scores; `check` must pass.
        before: the base's images.
        after: the erased model's images of the same prompts and seeds.
        curves: name -> loss of every training step.
        density: parameter name -> fraction of it that the mask lets change, in [0, 1]; empty
            without a mask.
        sizes: parameter name -> number of weights, to weigh layers within a block.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    page = Environment(
        loader=PackageLoader("erase.eval.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.j2")
    groups_shown = groups(report.concept, before, FORGET, RETAIN)
    return page.render(
        report=report.check(),
        target=words(report.concept, "target"),
        anchor=words(report.concept, "anchor"),
        synonyms=words(report.concept, "synonyms"),
        verdict=verdict_line(report),
        verdicts=verdicts(report),
        scores=_scores(report),
        pairs={
            heading: _pairs(before, after, rows) for heading, rows in groups_shown.items() if rows
        },
        small=_side(before) <= 128,
        chart=chart(curves),
        blocks=blocks(density, sizes or {}),
        overall=mean_density(density, sizes or {}),
        weighed=bool(sizes),
        overlap=report.extras.get("overlap"),
        confusion=_confusion(report),
        provenance=_provenance(report),
        settings=_settings(before, after),
        limits=[*limits(report), _coverage(report, before), *[MASK] * bool(density)],
        schema=SCHEMA_VERSION,
    )


def _coverage(report: EvalReport, images: ImageSet) -> str:
    asked = sum(names_concept(row, report.concept) for row in images.rows)
    return (
        f"The images are of {len(images.rows)} prompts and seeds, {asked} of which ask for "
        f"{either(report.concept)}, with one sampler and its settings. Other wordings, languages "
        "and settings were not looked at."
    )


def _side(images: ImageSet) -> int:
    return max(images.image(images.rows[0]).size) if images.rows else 0


def _pairs(before: ImageSet, after: ImageSet, rows: Sequence[ImageRow]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": first.prompt,
            "seed": first.seed,
            "before": data_uri(before.image(first)),
            "after": data_uri(after.image(second)),
        }
        for first, second in matched(before, after, rows)
    ]


def save_report(
    folder: str | Path,
    report: EvalReport,
    before: ImageSet,
    after: ImageSet,
    curves: Mapping[str, Sequence[float]],
    density: Mapping[str, float],
    sizes: Mapping[str, int] | None = None,
) -> Path:
    """Write report.json, report.html and before_after.png into `folder`; arguments as for
    `render_html`.

    The loss curves and the density per layer go into report.json too, under `extras`.
    """
    folder = Path(folder)
    page = render_html(report, before, after, curves, density, sizes)
    strip = before_after(
        before,
        after,
        groups(report.concept, before, STRIP, STRIP),
        f"{report.title}: the same prompts and seeds, before and after",
    )
    extras = {
        "curves": {name: list(values) for name, values in curves.items()},
        "density": dict(density),
    }
    replace(report, extras=report.extras | extras).save(folder / "report.json")
    with atomic_write(folder / "report.html") as aside:
        aside.write_text(page, encoding="utf-8")
    with atomic_write(folder / "before_after.png") as aside:
        strip.save(aside, "PNG", optimize=True)
    return folder
