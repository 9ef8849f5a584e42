"""Tables of measurements on the embedded world, as Markdown."""

from __future__ import annotations

from collections import defaultdict
from itertools import chain, pairwise
from statistics import fmean
from typing import Any

from erase.eval.metrics.paired import of_events
from erase.prompts.canvas import KINDS

SHOWN = ("UA", "IRA", "CRA", "CLIP UA", "CLIP IRA", "CLIP CRA")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: per variant and concept, means over seeds (with their range) beside the base."""
    runs_of: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        runs_of[row["variant"], row["kind"], row["concept"]].append(row)
    measured = {name for row in rows for name in row["erased"]}
    shown = [name for name in SHOWN if name in measured]
    lines = [
        f"| variant | kind | concept | seeds | changed | {' | '.join(shown)} |",
        "|---" * (5 + len(shown)) + "|",
    ]
    for (variant, kind, concept), runs in runs_of.items():
        changed = f"{fmean(run['changed'] for run in runs):,.0f}"
        cells = [variant, kind, concept, str(len(runs)), changed]
        for name in shown:
            with_it = [run for run in runs if name in run["erased"]]
            base = fmean(run["base"][name] for run in with_it)
            cells.append(_cell([run["erased"][name] for run in with_it], base))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> str:
    """Markdown: per variant and kind, the mean and the worst of UA and of what IRA and CRA lost."""
    lines = [
        "| variant | kind | runs | UA, mean (worst) | IRA - base, mean (worst) "
        "| CRA - base, mean (worst) |",
        "|---|---|---|---|---|---|",
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        for kind in KINDS:
            runs = [row for row in rows if (row["variant"], row["kind"]) == (variant, kind)]
            if runs:
                ua = [row["erased"]["UA"] for row in runs]
                cells = [variant, kind, str(len(runs)), f"{fmean(ua):.1f} ({min(ua):.1f})"]
                cells += [_lost(runs, name) for name in ("IRA", "CRA")]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def paired(rows: list[dict[str, Any]]) -> str:
    """Markdown: per variant and kind, erased - base of all runs together, paired by image: the
    difference, its 95 % interval, the chance of one as large between equal models, the images."""
    known = list(chain.from_iterable(row.get("judged", ()) for row in rows))
    names = [name for name in SHOWN if name in known]
    lines = [f"| variant | kind | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        for kind in (*KINDS, "all"):
            runs = [row for row in rows if row["variant"] == variant and "judged" in row]
            runs = [row for row in runs if kind in ("all", row["kind"])]
            cells = [_difference(runs, name) for name in names]
            if any(cells):
                lines.append(f"| {variant} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _difference(runs: list[dict[str, Any]], name: str) -> str:
    """An image that several runs were judged on counts as one case, of all its judgements."""
    judged = [run["judged"][name] for run in runs if name in run["judged"]]
    cases = [case for numbers, _, _ in judged for case in numbers]
    before = [int(bit) for _, bits, _ in judged for bit in bits]
    after = [int(bit) for _, _, bits in judged for bit in bits]
    found = of_events(cases, before, after)
    if found is None:
        return ""
    value, low, high = (100 * x for x in (found.difference, found.low, found.high))
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}], p {found.p:.2g}, {len(cases)}"


def grid(rows: list[dict[str, Any]], score_name: str = "UA") -> str:
    """Markdown: rules down, densities across, mean (lowest to highest) over concepts and seeds."""
    cells: dict[tuple[str, float], list[float]] = defaultdict(list)
    for row in rows:
        mask = row["settings"]["mask"]
        name = row["variant"].rsplit(" ", 2)[0]
        cells[name, mask["density"]].append(row["erased"][score_name])
    densities = sorted({density for _, density in cells})
    lines = [
        f"| {score_name} | {' | '.join(f'{density:.1%}' for density in densities)} |",
        "|---" * (1 + len(densities)) + "|",
    ]
    for rule in dict.fromkeys(rule for rule, _ in cells):
        found = [cells.get((rule, density), []) for density in densities]
        lines.append(f"| {rule} | {' | '.join(map(spread, found))} |")
    return "\n".join(lines)


def prediction(rows: list[dict[str, Any]]) -> str:
    """Markdown: the share of the squared benefit that masks held, whatever their rule, against what
    became of the concept."""
    edges = (0.0, 0.01, 0.03, 0.1, 0.3, 0.5, 1.0001)
    lines = [
        "| share held | masks | UA, mean (worst to best) | of them UA 97 and more |",
        "|---" * 4 + "|",
    ]
    for low, high in pairwise(edges):
        found = [row["erased"]["UA"] for row in rows if low <= row.get("held", -1) < high]
        if found:
            gone = sum(ua >= 97 for ua in found)
            lines.append(
                f"| {low:.0%} to {min(high, 1):.0%} | {len(found)} | {spread(found)} | {gone} |"
            )
    return "\n".join(lines)


def _lost(runs: list[dict[str, Any]], name: str) -> str:
    values = [row["erased"][name] - row["base"][name] for row in runs]
    return f"{fmean(values):+.1f} ({min(values):+.1f})"


def _cell(values: list[float], base: float) -> str:
    return f"{spread(values)} / {base:.1f}"


def spread(values: list[float]) -> str:
    if not values:
        return ""
    ends = [f"{end:.1f}" for end in (min(values), max(values))]
    return f"{fmean(values):.1f}" + (f" ({' to '.join(ends)})" if ends[0] != ends[1] else "")
