"""report.html: one self-contained page of evidence, and the folder that holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from erase.eval.images import ImageSet
from erase.eval.report.attacks import attacks
from erase.eval.report.bars import Bar, bars
from erase.eval.report.chart import chart
from erase.eval.report.conclusion import states
from erase.eval.report.covering import is_sensitive
from erase.eval.report.curves import plane, relearning
from erase.eval.report.figures import before_after
from erase.eval.report.html import rendered
from erase.eval.report.report import BASE, ERASED, SCHEMA_VERSION, EvalReport, words
from erase.eval.report.reproduce import COMMAND
from erase.eval.report.said import Said
from erase.eval.report.setting import Setting
from erase.eval.report.states import Claim, State
from erase.eval.report.tables import (
    blocks,
    confusions,
    mean_density,
    provenance_table,
    score_table,
    settings_table,
)
from erase.eval.report.wall import SMALL, Wall, groups, multiples, names_concept
from erase.eval.report.words import either, limits, verdicts
from erase.files import atomic_write

STRIP = 4  # columns of the strip that ask for the concept, and as many that do not
MASK = (
    "The saliency mask says which weights were allowed to change. It does not say where in the "
    "network the concept is kept."
)


def render_html(
    report: EvalReport,
    before: ImageSet,
    after: ImageSet,
    curves: Mapping[str, Sequence[float]],
    density: Mapping[str, float],
    sizes: Mapping[str, int] | None = None,
    setting: Setting | None = None,
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
        setting: date and machine, how the erasure is made again, folders of further pictures.
    """
    setting = setting or Setting()
    wall = Wall(report.check(), before, after, Said(report))
    side, failures = wall.side(), wall.failures()
    return rendered(
        "report.html.j2",
        report=report,
        target=words(report.concept, "target"),
        anchor=words(report.concept, "anchor"),
        synonyms=words(report.concept, "synonyms"),
        verdicts=verdicts(report),
        states=[_drawn(state) for state in states(report)],
        hero=wall.hero(),
        failures=failures,
        sample=wall.sample(),
        judged=bool(wall.said.judges(ERASED, "seen")),
        side=min(side, SMALL) if side <= SMALL else 256,
        small=side <= SMALL,
        multiples=multiples(side),
        sensitive=is_sensitive(report.concept, (before, after)),
        scores=score_table(report),
        attacks=attacks(report, setting.folders),
        relearning=relearning(report),
        plane=plane(report),
        chart=chart(curves),
        blocks=blocks(density, sizes or {}),
        overall=mean_density(density, sizes or {}),
        weighed=bool(sizes),
        overlap=report.extras.get("overlap"),
        confusions=confusions(report),
        provenance=provenance_table(report),
        settings=settings_table(before, after),
        facts=setting.facts,
        recipe=setting.recipe,
        command=COMMAND,
        limits=[*limits(report), _coverage(report, before), *[MASK] * bool(density)],
        schema=SCHEMA_VERSION,
    )


def _drawn(state: State) -> tuple[State, list[tuple[Claim, list[Bar]]]]:
    """A state, and the bars of each of its claims; those that decide it first."""
    lines = []
    for claim in sorted(state.claims, key=lambda claim: claim.tone != state.tone):
        lines.append((claim, bars([(BASE, claim.base), (ERASED, claim.erased)])))
    return state, lines


def _coverage(report: EvalReport, images: ImageSet) -> str:
    asked = sum(names_concept(row, report.concept) for row in images.rows)
    told = (
        f"{asked} of which ask for {either(report.concept)}"
        if asked
        else f"none of which names {either(report.concept)}"
    )
    return (
        f"The images are of {len(images.rows)} prompts and seeds, {told}, with one sampler and its "
        "settings. Other wordings, languages and settings were not looked at."
    )


def save_report(
    folder: str | Path,
    report: EvalReport,
    before: ImageSet,
    after: ImageSet,
    curves: Mapping[str, Sequence[float]],
    density: Mapping[str, float],
    sizes: Mapping[str, int] | None = None,
    setting: Setting | None = None,
) -> Path:
    """Write report.json, report.html and before_after.png into `folder`; arguments as for
    `render_html`.

    The loss curves and the density per layer go into report.json too, under `extras`.
    """
    folder = Path(folder)
    page = render_html(report, before, after, curves, density, sizes, setting)
    strip = before_after(
        before,
        after,
        groups(report.concept, before, STRIP, STRIP),
        f"{report.title}: the same prompts and seeds, before and after",
        is_sensitive(report.concept, (before, after)),
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
