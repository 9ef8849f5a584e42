"""The tables of the report: scores, saliency density by block, confusions, provenance, settings."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from erase.eval.images import ImageSet
from erase.eval.report.bars import bars
from erase.eval.report.report import BASE, EvalReport
from erase.eval.report.words import VERDICTS, change_text, glossary, signed


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
        cell["verdict"] = VERDICTS[report.verdict(row, name)]
        if difference := report.difference(row, name):
            cell["paired"] = change_text(base, difference)
    return cell


def score_table(report: EvalReport) -> dict[str, Any]:
    """The models, the rows of the table with their cells and bars, and the meaning of the terms."""
    rows = []
    for score in report.columns():
        cells = [_score_cell(report, row, score.name) for row in report.rows]
        drawn = bars([(row, report.score(row, score.name)) for row in report.rows])
        rows.append((score, cells, drawn))
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


def confusions(report: EvalReport) -> list[dict[str, Any]]:
    """The tables of each kind, of every row: that of the concept's kind first."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row, found in report.extras.get("confusion", {}).items():
        for table in found if isinstance(found, list) else [found]:
            shares = []
            for counts in table["counts"]:
                total = sum(counts) or 1
                shares.append([count / total for count in counts])
            kinds.setdefault(table["kind"], []).append({"row": row, "shares": shares} | table)
    return [{"kind": kind, "tables": tables} for kind, tables in kinds.items()]


def settings_table(before: ImageSet, after: ImageSet) -> list[tuple[str, str, str]]:
    """How both sets of images were made: (setting, of the base, of the erased model)."""
    keys = dict.fromkeys([*before.settings, *after.settings])
    return [(key, _flat(before.settings.get(key)), _flat(after.settings.get(key))) for key in keys]


def _indented(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


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


def commands_of(report: EvalReport) -> list[str]:
    """The commands that made it, a line each."""
    commands = report.provenance.get("commands") or []
    return commands.splitlines() if isinstance(commands, str) else commands


def provenance_table(report: EvalReport) -> dict[str, Any]:
    """Commands, config, settings of the evaluation, and all other facts as text."""
    known = {key: report.provenance.get(key) for key in ("commands", "config", "evaluation")}
    config = known["config"] or {}
    return {
        "commands": commands_of(report),
        "config": config if isinstance(config, str) else _indented(config),
        "evaluation": known["evaluation"] and _indented(known["evaluation"]),
        "facts": {
            key: _flat(value) for key, value in report.provenance.items() if key not in known
        },
    }
