"""Tables of the classifier bench, as Markdown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from erase.eval.metrics.intervals import of_mean
from erase.scripts.bench.classifier_data import SCENARIOS
from erase.scripts.bench.classifier_scores import COLUMNS, gap

OURS, RETRAIN = "SalUn, benefit", "Retrain"
Measurements = Sequence[Mapping[str, Any]]


def tables(found: Iterable[Mapping[str, Any]], tuning: Collection[int]) -> str:
    """Both tables of each scenario, of the seeds that no setting was chosen on."""
    reported = [each for each in found if each["seed"] not in tuning]
    parts = []
    for scenario in SCENARIOS:
        own = [each for each in reported if each["scenario"] == scenario]
        if own:
            parts += [f"### {scenario}", table(own), comparison(own)]
    return "\n\n".join(parts)


def table(found: Measurements) -> str:
    """Per row: its setting, and mean with 95 % interval of every column over the seeds; last, the
    papers' average gap, which is that of the means."""
    shown = (*COLUMNS, "gap", "seconds")
    lines = [
        f"| row | setting | seeds | {' | '.join(shown)} | gap of means |",
        "|---" * (4 + len(shown)) + "|",
    ]
    for name in dict.fromkeys(each["row"] for each in found):
        runs = _runs(found, name)
        seeds = {run["seed"] for run in runs}
        exact = [run for run in _runs(found, RETRAIN) if run["seed"] in seeds]
        setting = ", ".join(f"{key} {value:g}" for key, value in runs[0]["setting"].items())
        cells = [around(_values(runs, column)) for column in shown]
        cells.append(f"{gap(_means(runs), _means(exact)):.2f}" if exact else "")
        lines.append(f"| {name} | {setting} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _runs(found: Measurements, name: str) -> Measurements:
    return [each for each in found if each["row"] == name]


def _values(runs: Measurements, column: str) -> list[float]:
    return [run[column] for run in runs]


def _means(runs: Measurements) -> dict[str, float]:
    return {column: fmean(_values(runs, column)) for column in COLUMNS}


def comparison(found: Measurements) -> str:
    """Rules down, densities across: the gap of `benefit` minus that of the other at the same
    density and seed; below zero, `benefit` is nearer to Retrain."""
    gaps: dict[tuple[str, str], dict[int, float]] = {}
    for each in found:
        if each["row"].startswith("SalUn, "):
            rule, density, _ = each["row"].rsplit(" ", 2)
            gaps.setdefault((rule, density), {})[each["seed"]] = each["gap"]
    densities = list(dict.fromkeys(density for _, density in gaps))
    heads = " | ".join(f"{density} %" for density in densities)
    lines = [f"| gap of benefit - gap of | {heads} |", "|---" * (1 + len(densities)) + "|"]
    for rule in dict.fromkeys(rule for rule, _ in gaps):
        if rule != OURS:
            cells = [_paired(gaps, rule, density) for density in densities]
            lines.append(f"| {rule.removeprefix('SalUn, ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _paired(gaps: Mapping[tuple[str, str], Mapping[int, float]], rule: str, density: str) -> str:
    ours, theirs = gaps.get((OURS, density), {}), gaps.get((rule, density), {})
    return around([ours[seed] - theirs[seed] for seed in ours if seed in theirs], sign="+")


def around(values: Sequence[float], sign: str = "") -> str:
    """Mean and half of its 95 % interval (Student)."""
    if not values:
        return ""
    low, high = of_mean(values)
    return f"{fmean(values):{sign}.2f} ± {(high - low) / 2:.2f}"
