"""The sentences of a report: the verdict, the meaning of the scores, and their limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from erase.eval.report.report import BASE, ERASED, EvalReport, words
from erase.eval.scores import Score, verdict

GLOSSARY = {
    "UA": (
        "unlearning accuracy: of the images whose prompt names {target}, the share in which the "
        "judge does not see it"
    ),
    "IRA": (
        "in-domain retain accuracy: of the images that ask for {others}, the share in which the "
        "judge sees what was asked for"
    ),
    "CRA": "cross-domain retain accuracy: the same for the other kinds of concept",
}


def either(concept: Mapping[str, Any]) -> str:
    """`heart`, or `heart or moon` if several were forgotten."""
    return " or ".join(words(concept, "target"))


def others(concept: Mapping[str, Any]) -> str:
    """The things that IRA is measured on, e.g. `other objects`."""
    return f"other {' and '.join(f'{kind}s' for kind in words(concept, 'kind')) or 'concepts'}"


def glossary(report: EvalReport) -> dict[str, str]:
    """The meaning of UA, IRA and CRA for this concept, as far as the report has them."""
    terms = {"target": either(report.concept), "others": others(report.concept)}
    names = (score.name.rpartition(": ")[2] for score in report.columns())  # whatever its set
    return {name: GLOSSARY[name].format(**terms) for name in names if name in GLOSSARY}


def verdict_line(report: EvalReport) -> str:
    """Two sentences in plain words on what the erased row says beside the base's."""
    rows = report.check().rows
    base = {score.name: score for score in rows.get(BASE, [])}
    erased = {score.name: score for score in rows.get(ERASED, [])}
    shared = [name for name in erased if name in base]
    if "UA" not in shared:
        return "; ".join(f"{name}: {_beside(erased[name], base[name])}" for name in shared[:3])
    kept = {others(report.concept): "IRA", "the other kinds": "CRA"}
    right = ", ".join(
        f"{what} {'are right ' * (n == 'IRA')}in {_beside(erased[n], base[n])}"
        for what, n in kept.items()
    )
    lost = [what for what, n in kept.items() if verdict(base[n], erased[n]) < 0]
    price = (
        f"The loss in {' and in '.join(lost)} is beyond the noise."
        if lost
        else "What was kept is within the noise of the base."
    )
    return f"{_found(either(report.concept), base['UA'], erased['UA'])}; {right}. {price}"


def _found(target: str, base: Score, erased: Score) -> str:
    gone, before = (round(score.value * score.n / 100) for score in (erased, base))
    if gone < erased.n and verdict(base, erased) <= 0:
        return (
            f"{target} is not gone: the judge still sees it in {erased.n - gone} of {erased.n} "
            "images that ask for it"
        )
    return (
        f"{target} is gone from {gone} of {erased.n} images that ask for it (base: {before} of "
        f"{base.n})"
    )


def _beside(score: Score, base: Score) -> str:
    value, was = (f"{s.value_text()}\N{NO-BREAK SPACE}{s.unit}".rstrip() for s in (score, base))
    return f"{value} (base {was})"


def limits(report: EvalReport | None, target: str = "") -> list[str]:
    """The limits of the evidence; without a report, of `target`."""
    target = either(report.concept) if report else target
    attacked = report is not None and any("ASR" in score.name for score in report.columns())
    tried = (
        "Attacks other than those scored here were not tried"
        if attacked
        else "Robustness to attacks was not measured"
    )
    return [
        f"Erasure is not a guarantee. An image in which the judge does not see {target} does not "
        "prove that none can be drawn.",
        f"{tried}. Prompts found by search, inversion of the text embedding, and fine-tuning of "
        "the weights may bring it back.",
        "Intervals count the chance in sampling images, not the chance in the erasure itself: "
        "that takes several runs with different seeds.",
    ]
