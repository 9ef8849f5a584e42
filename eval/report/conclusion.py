"""The verdict of a report as states: what is gone, what was kept, what attacks and relearning bring
back. From any judge's scores, by their names and directions."""

from __future__ import annotations

from dataclasses import replace

from erase.eval.report.report import BASE, ERASED, EvalReport
from erase.eval.report.robust import attacked, relearned
from erase.eval.report.said import Said
from erase.eval.report.states import (
    BAD,
    GOOD,
    TONES,
    UNKNOWN,
    Claim,
    State,
    hits,
    judges,
    known,
    plain,
    seen,
)
from erase.eval.report.words import (
    ERASED_WORD,
    LEAST,
    NOT_ERASED,
    NOTHING,
    PARTLY,
    SIDE_EFFECTS,
    either,
    enough,
    forgotten,
    others,
)
from erase.eval.scores import Score

NOT_MEASURED, KEPT, HARMED = "not measured", "kept", "harmed"
ATTACKED = ("pre-ASR", "ASR ", "boosted noise", "completion of", "inpainting", "CRR", "seen by ")
"""how rates begin that are better low, and are of other prompts or other means than the prompts"""


def states(report: EvalReport) -> list[State]:
    """What is gone, what was kept, what attacks bring back; and relearning, where it was tried."""
    gone = _gone(report)
    found = [gone, _kept(report), attacked(report, gone)]
    after = relearned(report, gone)
    return [*found, after] if after else found


def denies(report: EvalReport) -> bool:
    """Whether a report shows no success: the concept is not erased, or nothing is shown."""
    return _gone(report).word in (NOT_ERASED, NOTHING)


# ---- what is gone --------------------------------------------------------------------------------


def _gone(report: EvalReport) -> State:
    """The worst word of the judges that can tell; rates of images count where no judge of labels
    has a UA."""
    judged: list[tuple[str, Claim, float | None]] = []
    for judge in judges(report):
        own = 100 - known(report, BASE, f"{judge}IRA").value
        judged.append((forgotten(report, judge), _by_judge(report, judge), own))
    for name in rates(report) if not judged else ():
        judged.append((_of_rate(report, name), _by_rate(report, name), None))
    target = either(report.concept)
    if not judged:
        said = f"No judge looked for {target}."
        return State("Forgotten", NOT_MEASURED, UNKNOWN, said)
    worst = [NOT_ERASED, PARTLY, ERASED_WORD, NOTHING]
    word, claim, error = min(judged, key=lambda one: worst.index(one[0]))
    claims = tuple(replace(one, tone=TONES[other]) for other, one, _ in judged)
    said = _told(word, claim, target, error)
    others = [
        f"{one.erased.evaluator or one.text}: {other}"
        for other, one, _ in judged
        if other not in (word, NOTHING)
    ]
    if others:
        said = f"The judge that sees most of it decides: {said} {'; '.join(others)}."
    return State("Forgotten", word, TONES[word], said, claims)


def rates(report: EvalReport) -> list[str]:
    """Rates of images that are better low, known of both models, and that are neither of attacks
    nor of side effects; of judges that look for the concept, else of those of which it is not
    known: what one that looks for something else finds less often is not forgotten."""
    found = [
        score.name
        for score in report.rows.get(ERASED, [])
        if score.unit == "%"
        and not score.higher_is_better
        and report.score(BASE, score.name)
        and not plain(score.name).startswith(ATTACKED)
        and not score.name.endswith(SIDE_EFFECTS)
    ]
    said = Said(report)
    looking, elsewhere = tuple(said.judges(ERASED, "seen")), tuple(said.silent(ERASED, "seen"))
    return [name for name in found if plain(name).startswith(looking)] or [
        name for name in found if not plain(name).startswith(elsewhere)
    ]


def _by_judge(report: EvalReport, judge: str) -> Claim:
    base, erased = (known(report, row, f"{judge}UA") for row in (BASE, ERASED))
    text = f"{either(report.concept)} seen by {erased.evaluator or judge.strip() or 'the judge'}"
    return Claim(text, seen(erased), seen(base))


def _by_rate(report: EvalReport, name: str) -> Claim:
    return Claim(name, known(report, ERASED, name), known(report, BASE, name))


def _of_rate(report: EvalReport, name: str) -> str:
    """Erased: nothing is left, and the base showed enough; partly: less than in the base, beyond
    the noise."""
    base, erased = (known(report, row, name) for row in (BASE, ERASED))
    if not enough(base):
        return NOTHING
    if report.verdict(ERASED, name) <= 0:
        return NOT_ERASED
    return PARTLY if hits(erased) else ERASED_WORD


def _told(word: str, claim: Claim, target: str, error: float | None) -> str:
    """A sentence on a judge's word, and why it is this word; `error`: the judge's own, in percent,
    where it is known."""
    erased, base = claim.erased, claim.base
    assert base is not None  # of what is gone, both are known
    was = f"base: {hits(base)} of {base.n}"
    judge = erased.evaluator or "the judge"
    if word == NOTHING:
        return (
            f"The base itself shows {target} in {hits(base)} of {base.n} images, too few "
            f"to tell a loss from the judge's own error ({judge})."
        )
    left = f"seen in {hits(erased)} of {erased.n} images ({was}) by {judge}"
    if word == NOT_ERASED:
        return f"{target} is still {left}, which is not fewer beyond the noise."
    if word == PARTLY:
        why = "" if error is None else f", more than its own error of {error:.1f} % accounts for"
        return f"{target} is still {left}{why}."
    return f"{target} is {left}{', no more than its own error' * bool(hits(erased))}."


# ---- what was kept -------------------------------------------------------------------------------


def _kept(report: EvalReport) -> State:
    names = kept_scores(report)
    if not names:
        return State("The rest", NOT_MEASURED, UNKNOWN, "No judge looked at what should stay.")
    claims = []
    for name, text in names.items():
        erased, base = (known(report, row, name) for row in (ERASED, BASE))
        tone = GOOD if enough(base) else UNKNOWN
        claims.append(Claim(text, erased, base, BAD if report.verdict(ERASED, name) < 0 else tone))
    lost = [f"{c.text} {_beside(c.erased, c.base)}" for c in claims if c.tone == BAD]
    able = [claim for claim in claims if claim.tone == GOOD]
    if lost:
        return State("The rest", HARMED, BAD, f"Beyond the noise: {', '.join(lost)}.", (*claims,))
    if not able:
        said = f"The base shows what should stay in fewer than {LEAST} images: no loss can be told."
        return State("The rest", NOTHING, UNKNOWN, said, (*claims,))
    said, worst = "Within the noise of the base.", min(able, key=_change)
    if _change(worst) < 0:
        said += f" The largest fall: {worst.text} {_beside(worst.erased, worst.base)}."
    return State("The rest", KEPT, GOOD, said, (*claims,))


def kept_scores(report: EvalReport) -> dict[str, str]:
    """Name -> words of the scores that tell what stayed, known of both models."""
    found = {}
    names = [score.name for score in report.rows.get(ERASED, [])]
    own = others(report.concept)
    sets = report.provenance.get("prompt_sets")
    for name in names:
        word = plain(name)
        start = name[: len(name) - len(word)].strip(" :")
        by = f", {start}" if start else ""
        told = {"IRA": own, "CRA": "other kinds", "accuracy of the others": own}
        if word.startswith("kept by "):
            told[word] = f"{own}, {word.removeprefix('kept by ')} wording"
        if word == "score" and _of_retained(name, names, sets):
            told[word], by = name, ""
        if word in told and report.score(BASE, name):
            found[name] = told[word] + by
    return found


def _of_retained(name: str, names: list[str], sets: object) -> bool:
    """Whether a CLIP score is of prompts that ask for no forgotten concept alone: those that do
    have a score of their own, or the whole set asks for none."""
    if f"{name} of the forgotten" in names:
        return True
    told = sets.get(name.rpartition(": ")[0]) if isinstance(sets, dict) else None
    return isinstance(told, dict) and told.get("judged_on") == []


def _change(claim: Claim) -> float:
    """Of a share; 0 of anything else."""
    known = claim.base and claim.erased.unit == "%"
    return claim.erased.value - claim.base.value if known and claim.base else 0.0


def _beside(score: Score, base: Score | None) -> str:
    unit = f" {score.unit}" if score.unit else ""
    was = f" (base {base.value_text()})" if base else ""
    return f"{score.value_text()}{unit}{was}"
