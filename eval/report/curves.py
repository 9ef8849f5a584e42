"""The report's plots of scores: UA against steps of relearning, and UA against what was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from erase.eval.metrics.intervals import of_rate
from erase.eval.report.axes import RETENTION, RETENTION_IS, retention, unlearning
from erase.eval.report.chart import SIDE, Axis, linear_axis
from erase.eval.report.report import BASE, ERASED, EvalReport, words
from erase.eval.report.states import judges
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError

PERCENT = Axis(0, 100, False, (0, 25, 50, 75, 100))


@dataclass(frozen=True)
class Dot:
    """A point and the ends of its intervals, in percent of the plot from the left and the top."""

    name: str
    x: float
    y: float
    left: float = 0.0
    right: float = 0.0
    top: float = 0.0
    bottom: float = 0.0
    text: str = ""


@dataclass(frozen=True)
class Trace:
    """A curve: SVG path data and its points."""

    name: str
    base: bool
    path: str
    dots: list[Dot]
    """`bottom` and `top` are the ends of each one's interval"""
    fainter: bool
    """of fewer images than the most"""


@dataclass(frozen=True)
class Plot:
    """Curves or points on common axes."""

    title: str
    xlabel: str
    ylabel: str
    x: Axis
    y: Axis
    traces: list[Trace] = field(default_factory=list)
    dots: list[Dot] = field(default_factory=list)

    @property
    def xticks(self) -> list[tuple[float, str]]:
        """(percent from the left, label)"""
        return [(100 * self.x.at(tick), f"{tick:g}") for tick in self.x.ticks]

    @property
    def yticks(self) -> list[tuple[float, str]]:
        """(percent from the top, label)"""
        return [(100 - 100 * self.y.at(tick), f"{tick:g}") for tick in self.y.ticks]


# ---- relearning ----------------------------------------------------------------------------------


def relearning(report: EvalReport) -> list[Plot]:
    """A plot for each kind of fine-tuning, of every count of images, the base's and the erased
    model's (`extras` of the evaluator `relearning`)."""
    kinds: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for row, curves in report.extras.get("relearning", {}).items():
        for curve in curves:
            kinds.setdefault(curve["kind"], []).append((row, curve))
    return [_relearned(kind, curves) for kind, curves in kinds.items()]


def _relearned(kind: str, curves: Sequence[tuple[str, Mapping[str, Any]]]) -> Plot:
    steps = linear_axis(0, max(max(curve["steps"]) for _, curve in curves))
    traces, most = [], max(curve["images"] for _, curve in curves)
    for row, curve in curves:
        shares = [100 * left / curve["n"] for left in curve["forgotten"]]
        ends = [of_rate(left, curve["n"]) for left in curve["forgotten"]]
        dots = []
        for step, share, (low, high) in zip(curve["steps"], shares, ends, strict=True):
            text = f"{row}, {curve['images']} images, {step} steps: UA {share:.1f} %"
            dots.append(
                Dot(
                    row,
                    100 * steps.at(step),
                    100 - share,
                    top=100 - 100 * high,
                    bottom=100 - 100 * low,
                    text=text,
                )
            )
        name = f"{row}, {curve['images']} image{'s' * (curve['images'] > 1)}"
        traces.append(Trace(name, row.startswith(BASE), _path(dots), dots, curve["images"] < most))
    title = {"benign": "benign: images of other things", "full": "full: all weights"}
    frozen = max(curve.get("frozen", 0) for _, curve in curves)
    label = title.get(kind, kind) + f", {frozen} tensors frozen" * (frozen > 0)
    return Plot(label, "steps of fine-tuning", "UA %", steps, PERCENT, traces)


def _path(dots: Sequence[Dot]) -> str:
    scale = SIDE / 100
    return "M" + "L".join(f"{scale * dot.x:.1f} {scale * dot.y:.1f}" for dot in dots)


# ---- UA against retention ------------------------------------------------------------------------


def plane(report: EvalReport) -> Plot | None:
    """UA against retention, by the first judge, with the intervals of both: the rows of the report,
    and the runs that it was compared with (`extras["compared"]`: name -> [UA, low, high] and
    retention likewise). None where no judge has a UA."""
    names = judges(report)
    if not names:
        return None
    points = {}
    for row in report.rows:
        if report.score(row, names[0] + "UA"):
            points[row] = of_plane(report, row, names[0])
    points |= {str(name): point for name, point in report.extras.get("compared", {}).items()}
    lowest = min(point[RETENTION][1] for point in points.values())
    kept, gone = linear_axis(min(lowest, 99.0), 100), PERCENT
    dots = []
    for name, point in points.items():
        (ua, ua_low, ua_high), (mean, low, high) = point["UA"], point[RETENTION]
        dots.append(
            Dot(
                name,
                100 * kept.at(mean),
                100 - ua,
                100 * kept.at(low),
                100 * kept.at(high),
                100 - ua_high,
                100 - ua_low,
                f"{name}: UA {ua:.1f} %, {RETENTION} {mean:.1f} %",
            )
        )
    label = f"{RETENTION} % ({RETENTION_IS.format(judge=names[0])})"
    return Plot("UA against what was kept", label, "UA %", kept, gone, dots=dots)


def compared(
    files: Sequence[str | Path], base: str, concepts: Sequence[ConceptSpec]
) -> dict[str, dict[str, list[float]]]:
    """Where other runs lie on the plane, by the first judge of each, under the name of its folder
    and of that judge, where it has one.

    Args:
        files: each a report.json.
        base: the base's fingerprint.
        concepts: what was forgotten.

    Raises:
        ErasureError: a report that cannot be read, is of another base or of other concepts, or has
            no UA.
    """
    points: dict[str, dict[str, list[float]]] = {}
    targets = sorted(concept.target for concept in concepts)
    for file in map(Path, files):
        report = EvalReport.load(file)
        if report.provenance.get("base_fingerprint") != base:
            raise ErasureError(f"{file} is of another base; compare runs of one base")
        if sorted(words(report.concept, "target")) != targets:
            raise ErasureError(
                f"{file} is of erasing {report.title}, not {', '.join(targets)}; compare runs that "
                "forget the same"
            )
        if not (names := judges(report)):
            raise ErasureError(f"{file} has no UA, so it lies nowhere on the plane; leave it out")
        folder = file.resolve().parent
        by = f", by {names[0].strip(' :')}" if names[0] else ""
        name = (folder.parent.name if folder.name == "report" else folder.name) + by
        points[name if name not in points else str(file)] = of_plane(report, ERASED, names[0])
    return points


def of_plane(report: EvalReport, row: str, judge: str = "") -> dict[str, list[float]]:
    """Where a row lies: its UA and its retention, each with the ends of its interval."""
    at = {"UA": unlearning(report, row, judge), RETENTION: retention(report, row, judge)}
    return {name: [one.value, one.low, one.high] for name, one in at.items()}
