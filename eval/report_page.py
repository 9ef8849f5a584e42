"""report.html: one self-contained page of evidence, and the folder that holds it."""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erase.files import written_whole
from eval.images import ImageRow, ImageSet
from eval.report import BASE, ERASED, SCHEMA_VERSION, EvalReport, Score, verdict, words
from eval.report_chart import chart
from eval.report_figures import before_after, data_uri, matched

PAIRS = 48  # before/after pairs on the page; a third of them ask for the concept
STRIP = 4  # columns of the strip that ask for the concept, and as many that do not
GLOSSARY = {
    "UA": "unlearning accuracy: of the images whose prompt names {target}, the share in which the judge does not see it",
    "IRA": "in-domain retain accuracy: of the images that ask for {others}, the share in which the judge sees what was asked for",
    "CRA": "cross-domain retain accuracy: the same for the other kinds of concept",
}


def names_concept(row: ImageRow, concept: Mapping[str, Any]) -> bool:
    """Whether the row's labels or its prompt name what was forgotten, or a synonym of it."""
    lost = {word.lower() for key in ("target", "synonyms") for word in words(concept, key)}
    asked = {label.lower() for label in row.labels.values()}
    return bool(lost & asked) or any(re.search(rf"\b{re.escape(word)}\b", row.prompt.lower()) for word in lost)


def spread_out(rows: Sequence[ImageRow], count: int) -> list[ImageRow]:
    """`count` rows drawn at random (always the same ones), each time one whose labels were drawn least; sorted by case."""
    pool, seen = random.Random(0).sample(list(rows), len(rows)), Counter[tuple[str, str]]()
    drawn: list[ImageRow] = []
    while pool and len(drawn) < count:
        row = min(pool, key=lambda row: sum(seen[label] for label in row.labels.items()))
        seen.update(row.labels.items())
        drawn.append(row)
        pool.remove(row)
    return sorted(drawn, key=lambda row: row.case)


def groups(concept: Mapping[str, Any], images: ImageSet, forget: int, retain: int) -> dict[str, list[ImageRow]]:
    """Rows to show, under what they ask for: the concept first, then anything else."""
    asks = [names_concept(row, concept) for row in images.rows]
    target = " or ".join(words(concept, "target"))
    return {
        f"Prompts that ask for {target}": spread_out([r for r, ask in zip(images.rows, asks, strict=True) if ask], forget),
        "Prompts that ask for something else": spread_out([r for r, ask in zip(images.rows, asks, strict=True) if not ask], retain),
    }


# ---- scores in words --------------------------------------------------------------------------------------------------


def others(concept: Mapping[str, Any]) -> str:
    """`other objects`: what IRA is measured on."""
    return f"other {kind}s" if (kind := concept.get("kind")) else "other concepts"


def verdict_line(report: EvalReport) -> str:
    """One or two sentences in plain words on what the erased row says beside the base's."""
    base, erased = ({score.name: score for score in report.rows.get(row, [])} for row in (BASE, ERASED))
    shared = [name for name in erased if name in base]
    if "UA" not in shared:
        return "; ".join(f"{n}: {_percent(erased[n])} (base {_percent(base[n])})" for n in shared[:3]) + "." if shared else ""
    target, ua = " or ".join(words(report.concept, "target")), erased["UA"]
    gone = round(ua.value * ua.n / 100)
    found = f"{target} is gone from {gone} of {ua.n} images that ask for it"
    if verdict(base["UA"], ua) <= 0:
        found = f"{target} is not gone: the judge still sees it in {ua.n - gone} of {ua.n} images that ask for it"
    kept = {others(report.concept): "IRA", "the other kinds": "CRA"}
    right = [f"{what} are right in {_percent(erased[n])} (base {_percent(base[n])})" for what, n in kept.items()]
    lost = [what for what, n in kept.items() if verdict(base[n], erased[n]) < 0]
    price = f"The loss in {' and in '.join(lost)} is real." if lost else "What was kept cannot be told apart from the base."
    return f"{found}; {', '.join(right)}. {price}"


def _percent(score: Score) -> str:
    return f"{score.value:.{score.decimals}f}\N{NO-BREAK SPACE}{score.unit}".rstrip()


def _score_cell(report: EvalReport, row: str, name: str) -> dict[str, str] | None:
    score, base = report.score(row, name), report.score(BASE, name)
    if score is None:
        return None
    cell = {"value": score.text(), "n": str(score.n), "difference": "", "verdict": ""}
    if base and row != BASE:
        word = ("within noise", "better", "worse")[verdict(base, score)]
        cell |= {"difference": f"{score.value - base.value:+.{base.decimals}f}".replace("-", "−"), "verdict": word}
    return cell


def _scores(report: EvalReport) -> dict[str, Any]:
    columns = report.columns()
    terms = {"target": " or ".join(words(report.concept, "target")), "others": others(report.concept)}
    return {
        "columns": columns,
        "rows": {row: [_score_cell(report, row, column.name) for column in columns] for row in report.rows},
        "glossary": {c.name: GLOSSARY[c.name].format(**terms) for c in columns if c.name in GLOSSARY},
        "judges": {c.name: c.evaluator for c in columns if c.evaluator},
    }


# ---- saliency density, confusion, provenance ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A block of the network: the fraction of its weights that the mask lets change, and the same for each of its layers."""

    name: str
    density: float
    layers: dict[str, float]


def block_name(parameter: str) -> str:
    """`down_blocks.1` for `down_blocks.1.attentions.0…`: up to the first number, or the first word if there is none."""
    parts = parameter.split(".")
    number = next((i for i, part in enumerate(parts[:4]) if part.isdigit()), 0)
    return ".".join(parts[: number + 1])


def blocks(density: Mapping[str, float], sizes: Mapping[str, int]) -> list[Block]:
    """Layers grouped by block in order of first appearance; a block's density weighs its layers by size (1 if not known)."""
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
        shares = [[count / (sum(counts) or 1) for count in counts] for counts in table["counts"]]
        tables.append({"row": row, "shares": shares} | table)
    return tables


def _settings(before: ImageSet, after: ImageSet) -> list[tuple[str, str, str]]:
    keys = dict.fromkeys([*before.settings, *after.settings])
    return [(key, *(_flat(images.settings.get(key, "–")) for images in (before, after))) for key in keys]


def _flat(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _provenance(report: EvalReport) -> dict[str, Any]:
    known = {key: report.provenance.get(key) for key in ("commands", "config")}
    commands = known["commands"] or []
    config = known["config"] or {}
    return {
        "commands": commands if isinstance(commands, str) else "\n".join(commands),
        "config": config if isinstance(config, str) else json.dumps(config, indent=2, ensure_ascii=False),
        "facts": {key: _flat(value) for key, value in report.provenance.items() if key not in known},
    }


def limits(report: EvalReport, before: ImageSet) -> list[str]:
    """What the evidence in this report does not show."""
    target = " or ".join(words(report.concept, "target"))
    attacked = any("ASR" in score.name for scores in report.rows.values() for score in scores)
    untested = "It does not cover attacks other than those scored above." if attacked else "No attack was tried."
    asked = sum(names_concept(row, report.concept) for row in before.rows)
    return [
        f"“Gone” is a judge's word. It means that the judge does not see {target} in an image, not that the model cannot draw it.",
        f"{untested} Prompts found by search, inversion of the text embedding, and fine-tuning of the weights may bring {target} back.",
        f"The scores hold for these {len(before.rows)} prompts and seeds ({asked} of them ask for {target}), with this sampler "
        "and these settings. Other wordings, languages and settings were not looked at.",
        "Standard errors count the chance in sampling images. They do not count the chance in the erasure itself: that takes "
        "several runs with different seeds.",
        "The mask says which weights were allowed to change. It does not say where in the network the concept is kept.",
    ]


# ---- the page -----------------------------------------------------------------------------------------------------------


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
        density: parameter name -> fraction of it that the mask lets change, in [0, 1]; empty without a mask.
        sizes: parameter name -> number of weights, to weigh layers within a block.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    page = Environment(
        loader=PackageLoader("eval"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html.j2")
    shown = groups(report.concept, before, PAIRS // 3, PAIRS - PAIRS // 3)
    return page.render(
        report=report.check(),
        target=words(report.concept, "target"),
        anchor=words(report.concept, "anchor"),
        synonyms=words(report.concept, "synonyms"),
        verdict=verdict_line(report),
        scores=_scores(report),
        pairs={heading: _pairs(before, after, rows) for heading, rows in shown.items() if rows},
        small=_side(before) <= 128,
        chart=chart(curves),
        blocks=blocks(density, sizes or {}),
        overall=mean_density(density, sizes or {}),
        weighed=bool(sizes),
        confusion=_confusion(report),
        provenance=_provenance(report),
        settings=_settings(before, after),
        limits=limits(report, before),
        schema=SCHEMA_VERSION,
    )


def _side(images: ImageSet) -> int:
    return max(images.image(images.rows[0]).size) if images.rows else 0


def _pairs(before: ImageSet, after: ImageSet, rows: Sequence[ImageRow]) -> list[dict[str, Any]]:
    return [
        {"prompt": first.prompt, "seed": first.seed, "before": data_uri(before.image(first)), "after": data_uri(after.image(second))}
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
    """Write report.json, report.html and before_after.png into `folder`; arguments as for `render_html`."""
    folder = Path(folder)
    page = render_html(report, before, after, curves, density, sizes)
    strip = before_after(before, after, groups(report.concept, before, STRIP, STRIP), report.title)
    report.save(folder / "report.json")
    with written_whole(folder / "report.html") as aside:
        aside.write_text(page, encoding="utf-8")
    with written_whole(folder / "before_after.png") as aside:
        strip.save(aside, "PNG", optimize=True)
    return folder
