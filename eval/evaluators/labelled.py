"""What the label-reading evaluators (classifier, CLIP) share: labels out of an image set, scores out of predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from erase.eval.images import ImageSet
from erase.eval.metrics.labels import accuracies, forgetting
from erase.eval.report.report import Score, proportion
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError, unknown


def labels_of(images: ImageSet, classes: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """kind -> label of each image, for the kinds of `classes` that the images have labels for.

    Args:
        images: their rows' labels are what the prompts say.
        classes: kind -> the names that the judge knows.

    Raises:
        ErasureError: no kind in common, a label that some images lack (an empty one is none), or one that the judge does not know.
    """
    found = {kind: [row.labels.get(kind, "") for row in images.rows] for kind in classes}
    labels = {kind: list(filter(None, values)) for kind, values in found.items()}
    labels = {kind: values for kind, values in labels.items() if values}
    if not labels:
        raise ErasureError(
            f"the images in {images.folder} have no labels to judge them by ({', '.join(classes)}); "
            "generate them from a prompt set with these columns"
        )
    for kind, values in labels.items():
        if len(values) < len(images.rows):
            row = images.rows[found[kind].index("")]
            raise ErasureError(f"image {row.file} in {images.folder} has no label {kind!r}, others have; complete the prompt set")
        if strangers := set(values) - set(classes[kind]):
            raise unknown(f"{kind} label", min(strangers), classes[kind])
    return labels


def targets_of(concepts: Sequence[ConceptSpec], labels: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """(kind, target) of each concept; a concept without a kind gets the one among whose labels its target is.

    Raises:
        ErasureError: no image's prompt names the concept.
    """
    targets = []
    for concept in concepts:
        kind = concept.kind or next((kind for kind, values in labels.items() if concept.target in values), None)
        if kind is None or concept.target not in labels.get(kind, ()):
            raise ErasureError(
                f"no image is labelled {concept.target!r}{f' as its {kind}' if kind else ''}, so nothing can show that it was "
                f"forgotten; labels of the images: {', '.join(labels)}; use a prompt set that names it"
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
) -> list[Score]:
    """UA, IRA and CRA if concepts are given, else the accuracy of each kind. `prefix` begins each name (`"CLIP "`)."""
    if not concepts:
        found = {f"{kind} accuracy": tally for kind, tally in accuracies(predictions, labels).items()}
    else:
        found = forgetting(predictions, labels, targets_of(concepts, labels), cra_with_target)
    return [proportion(prefix + name, tally.hits, tally.n, evaluator=evaluator) for name, tally in found.items()]
