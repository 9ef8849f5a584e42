"""Functions shared by evaluators that read labels: labels out of a case, scores out of
predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from erase.eval.case import Case
from erase.eval.judgements import Judgement
from erase.eval.metrics.labels import accuracies, forgetting
from erase.eval.report.report import BASE, EvalReport
from erase.eval.scores import Score, proportion
from erase.prompts.canvas import KINDS, vocabulary
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError, unknown


def of_canvas(case: Case) -> bool:
    """Whether the prompts are of the embedded world, whose judges come with us: labelled by its
    kinds, with its names alone."""
    if not set(KINDS) <= case.images.rows[0].labels.keys():
        return False
    known = {kind: {*case.called(kind, vocabulary().names(kind)), ""} for kind in KINDS}
    return all({*case.labels[kind]} <= known[kind] for kind in KINDS)


def labels_of(case: Case, classes: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """kind -> label of each image, for the kinds of `classes` that the images have labels for.

    Args:
        case: its images' labels are what the prompts say.
        classes: kind -> the names that the judge knows.

    Raises:
        ErasureError: no kind in common, a label that some images lack (an empty one is none), or
            one that the judge does not know.
    """
    images = case.images
    labels = {kind: case.labels[kind] for kind in classes if any(case.labels.get(kind, ()))}
    if not labels:
        told = f" ({', '.join(classes)})" if classes else ""
        raise ErasureError(
            f"the images in {images.folder} have no labels to judge them by{told}; generate them "
            "from a prompt set with such columns"
        )

    for kind, names in labels.items():
        if "" in names:
            row = images.rows[names.index("")]
            raise ErasureError(
                f"image {row.file} in {images.folder} has no label {kind!r}, others have; complete "
                "the prompt set"
            )
        if strangers := set(names) - set(case.called(kind, classes[kind])):
            raise unknown(f"{kind} label", min(strangers), classes[kind])
    return labels


def targets_of(
    concepts: Sequence[ConceptSpec], labels: Mapping[str, Sequence[str]]
) -> list[tuple[str, str]]:
    """(kind, target) of each concept; a concept without a kind gets the one among whose labels its
    target is.

    Raises:
        ErasureError: no image's prompt names the concept.
    """
    targets = []
    for concept in concepts:
        kind = concept.kind or next(
            (kind for kind, values in labels.items() if concept.target in values), None
        )
        if kind is None or concept.target not in labels.get(kind, ()):
            raise ErasureError(
                f"no image is labelled {concept.target!r}{f' as its {kind}' if kind else ''}, so "
                "nothing can show that it was forgotten; labels of the images: "
                f"{', '.join(labels)}; use a prompt set that names it"
            )
        targets.append((kind, concept.target))
    return targets


def label_scores(
    predictions: Mapping[str, Sequence[str]],
    labels: Mapping[str, Sequence[str]],
    concepts: Sequence[ConceptSpec],
    cra_with_target: bool,
    prefix: str,
    evaluator: str,
    cases: Sequence[int] = (),
) -> list[Score]:
    """UA, IRA and CRA if concepts are given, else the accuracy of each kind.

    Args:
        predictions: kind -> predicted name of each image.
        labels: kind -> name in each image's prompt.
        concepts: what was forgotten.
        cra_with_target: see `forgetting`.
        prefix: begins each score's name (`"CLIP "`).
        evaluator: what predicted.
        cases: number of each image's case, by which two models are paired; none: they are not.
    """
    if not concepts:
        tallies = {
            f"{kind} accuracy": tally for kind, tally in accuracies(predictions, labels).items()
        }
    else:
        tallies = forgetting(predictions, labels, targets_of(concepts, labels), cra_with_target)
    scores = []
    for name, tally in tallies.items():
        outcomes = [(cases[place], counts) for place, counts in tally.outcomes] if cases else ()
        scores.append(
            proportion(prefix + name, tally.hits, tally.n, evaluator=evaluator, outcomes=outcomes)
        )
    return scores


def cases_of(case: Case) -> list[int]:
    """Number of each image's case, in row order."""
    return [row.case for row in case.images.rows]


def words_on(
    case: Case,
    labels: Mapping[str, Sequence[str]],
    predictions: Mapping[str, Sequence[str]],
    shares: Mapping[str, Sequence[float]],
) -> dict[int, Judgement]:
    """What a judge of labels says of each image: the name that it gives for the concepts' kinds,
    and those of other kinds where it does not see what was asked for.

    Args:
        case: its images, in the order of the labels.
        labels: kind -> name in each image's prompt.
        predictions: kind -> predicted name of each image.
        shares: kind -> probability of each, where there is one.
    """
    targets = set(targets_of(case.concepts, labels)) if case.concepts else set()
    own = {kind for kind, _ in targets} or set(labels)
    order = sorted(labels, key=lambda kind: kind not in own)
    judgements = {}
    for place, row in enumerate(case.images.rows):
        said = {kind: predictions[kind][place] for kind in labels}
        wrong = {kind for kind in labels if said[kind] != labels[kind][place]}
        words = []
        for kind in sorted(own | wrong, key=order.index):
            share = f" {100 * shares[kind][place]:.0f} %" if kind in shares else ""
            words.append(said[kind] + share)
        seen = not targets.isdisjoint(said.items()) if targets else None
        judgements[row.case] = Judgement(", ".join(words), seen, not wrong)
    return judgements


def check_price(scores: Sequence[Score]) -> None:
    """Refuse scores that would tell a UA without its IRA and CRA.

    Args:
        scores: of a judge that is always right.

    Raises:
        ErasureError: one that names what is missing.
    """
    EvalReport({}, {BASE: list(scores)}).check()
