"""The CLIP evaluator, through open_clip: zero-shot UA, IRA and CRA over the images' labels, and the
CLIP score.

Zero-shot classification and its prompt ensembles: Radford et al. 2021, section 3.1. CLIP score:
Hessel et al. 2021, without their factor 2.5 and without clipping at zero: 100 x the cosine of image
and prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import Formatter

import torch.nn.functional as F
from torch import Tensor

from erase.eval.case import Case
from erase.eval.evaluators import Evaluator
from erase.eval.evaluators.clip_classes import columns, names_of, no_kinds
from erase.eval.evaluators.clip_model import CANVAS, Clip, load
from erase.eval.evaluators.in_prompt import rests
from erase.eval.evaluators.labelled import (
    cases_of,
    check_price,
    label_scores,
    labels_of,
    of_canvas,
    words_on,
)
from erase.eval.evaluators.wordings import HARMONIC, accuracy_scores, wording_scores
from erase.eval.judgements import Judgement
from erase.eval.metrics.intervals import of_difference
from erase.eval.scores import Score, mean_score
from erase.prompts.canvas import KINDS, vocabulary
from erase.prompts.errors import COUNT, ErasureError, check_names, check_ranges
from erase.prompts.prompt_rows import asks_for

TEMPLATES = {"style": ("an image in {} style", "an artwork in {} style", "{} style")}
Labels = Mapping[str, Sequence[str]]
log = logging.getLogger("erase")
ANY_KIND = ("a photo of a {}", "an image of a {}", "a picture of a {}")


@dataclass
class Config:
    """clip: the same scores by zero-shot CLIP, and the CLIP score."""

    model: str | None = None
    """`canvas` (the embedded world's own), a folder in open_clip's format, an open_clip model name,
    or `hf-hub:owner/name`; default: canvas for the embedded world's prompts, else ViT-B-32 with
    OpenAI's weights"""
    pretrained: str | None = None
    """weights for an open_clip model name: a tag of open_clip (such as `openai`) or a file"""
    quick_gelu: bool | None = None
    """whether the weights were trained with QuickGELU; default: as the tag, the config or the
    file's name tells. OpenAI's, DFN's and MetaCLIP's were, LAION's and DataComp's mostly not"""
    zero_shot: bool | None = None
    """score the labels zero-shot; off: the CLIP score alone; default: on where the prompts carry
    labels of the concept's kind"""
    classes: dict[str, list[str]] | None = None
    """kinds of label to judge -> names to choose from, an empty list for all that the labels hold;
    default: the embedded world's for `canvas`, else every kind of label that the images have, but
    none that gives all of them one name or each another"""
    templates: dict[str, list[str]] | None = None
    """kind -> captions with one {} for the name, averaged; default: some for each kind"""
    cra_with_target: bool = False
    """count images whose prompt names a forgotten concept in CRA too (the default leaves them out
    of IRA and CRA)"""
    in_prompt: bool = False
    """add Six-CD's in-prompt CLIP score: images whose prompt names a forgotten concept, against
    the rest of that prompt"""
    harmonic: str | None = None
    """add a mean of MACE's: H_o or H_c over the wordings of the prompts, or H_a, the CLIP score
    less that of the forgotten (artists)"""
    batch_size: int = 64
    """images or captions encoded at once; no score depends on it"""
    device: str = "auto"
    """where the model runs; `auto` is this process's GPU if there is one"""

    def __post_init__(self) -> None:
        check_ranges(self, {"batch_size": COUNT}, "clip")
        if self.harmonic is not None:
            check_names(self, {"harmonic": (*HARMONIC, "H_a")})

    @property
    def name(self) -> str:
        """The model, once it is asked for."""
        return self.model or CANVAS

    @property
    def labelled(self) -> bool:
        """Whether labels are scored."""
        return self.zero_shot is not False


def load_clip(config: Config) -> Clip:
    """The CLIP that `config` names; see `erase.eval.evaluators.clip_model.load`."""
    return load(config.name, config.pretrained, config.quick_gelu, config.device)


def captions_for(kind: str, config: Config) -> list[str]:
    """The captions, with one {} each, in which names of `kind` are asked for.

    Raises:
        ErasureError: a configured template without exactly one {}.
    """
    if config.templates and kind in config.templates:
        for template in config.templates[kind]:
            if template.count("{}") != 1:
                raise ErasureError(
                    f"CLIP template {template!r} for {kind!r} needs exactly one {{}} for the name"
                )
        return config.templates[kind]
    if config.name == CANVAS and kind in KINDS:
        fields = {}
        for template in vocabulary().templates:
            parsed = Formatter().parse(template)
            fields[template] = [field for _, field, _, _ in parsed if field]
        return [
            template.replace(f"{{{kind}}}", "{}")
            for template, named in fields.items()
            if named == [kind]
        ]
    return list(TEMPLATES.get(kind, ANY_KIND))


def zero_shot_weights(clip: Clip, names: Sequence[str], kind: str, config: Config) -> Tensor:
    """One unit vector per name, shape (names, d): the mean over the captions' embeddings, as in
    CLIP's prompt ensembles."""
    templates = captions_for(kind, config)
    captions = [template.replace("{}", name) for name in names for template in templates]
    embedded = clip.texts(captions, config.batch_size)
    return F.normalize(embedded.unflatten(0, (len(names), -1)).mean(1), dim=-1)


def classes_for(case: Case, config: Config) -> dict[str, list[str]]:
    """kind -> names that zero-shot classification chooses from; see `Config.classes`."""
    if config.classes is None and config.name == CANVAS:
        return {kind: vocabulary().names(kind) for kind in KINDS}
    if config.classes:
        return {kind: names_of(kind, case, names) for kind, names in config.classes.items()}
    unfit = no_kinds(case)
    return {kind: names_of(kind, case) for kind in columns(case) if kind not in unfit}


def zero_shot(
    clip: Clip, seen: Tensor, classes: Mapping[str, Sequence[str]], config: Config
) -> dict[str, list[str]]:
    """kind -> the name nearest to each image.

    Args:
        clip: the model that embedded the images.
        seen: unit image embeddings, shape (n, d).
        classes: kind -> names to choose from.
        config: its templates.
    """
    weights = {
        kind: zero_shot_weights(clip, names, kind, config) for kind, names in classes.items()
    }
    labels = {}
    for kind, weight in weights.items():
        labels[kind] = [classes[kind][i] for i in (seen @ weight.T).argmax(1).tolist()]
    return labels


def _label_scores(predictions: Labels, labels: Labels, case: Case, config: Config) -> list[Score]:
    evaluator = f"open_clip {load_clip(config).name}"
    mean = config.harmonic if config.harmonic in HARMONIC else None
    worded = wording_scores(case, predictions, labels, "CLIP ", evaluator, mean)
    if case.concepts and config.classes and len(config.classes) == 1:
        pair = accuracy_scores(
            predictions, labels, case.concepts, "CLIP ", evaluator, cases_of(case)
        )
        return pair + worded
    scores = label_scores(
        predictions,
        labels,
        case.concepts,
        config.cra_with_target,
        "CLIP ",
        evaluator,
        cases_of(case),
    )
    return scores + worded


def _mean_scores(values: Sequence[float], case: Case, config: Config) -> list[Score]:
    """Mean CLIP score of the images whose prompt and labels name no forgotten concept, and of the
    others; none of those of which there are no images.

    Args:
        values: 100 x cosine of each image and its prompt, in row order.
    """
    names = [name for concept in case.concepts for name in concept.names]
    named = [asks_for(row.prompt, row.labels, names) for row in case.images.rows]
    cases, evaluator = cases_of(case), f"open_clip {load_clip(config).name}"
    scores = []
    for name, of_named in (("CLIP score", False), ("CLIP score of the forgotten", True)):
        places = [place for place, forgotten in enumerate(named) if forgotten is of_named]
        if places:
            score = mean_score(
                name,
                [values[place] for place in places],
                higher_is_better=not of_named,
                evaluator=evaluator,
                cases=[cases[place] for place in places],
            )
            scores.append(score)
    return scores + (_artists(scores, config) if config.harmonic and case.concepts else [])


def _artists(scores: Sequence[Score], config: Config) -> list[Score]:
    """MACE's mean for artists, of both CLIP scores, where it is asked for."""
    if config.harmonic in HARMONIC:
        if not config.labelled:
            raise ErasureError(
                f"{config.harmonic} is taken of the labels; leave clip.zero_shot on, and use a "
                "prompt set with labels"
            )
        return []
    if len(scores) < 2:
        raise ErasureError(
            f"{config.harmonic} compares prompts that name a forgotten concept with others; use a "
            "prompt set with both"
        )
    score, forgotten = scores
    return [_difference("H_a", forgotten, score)]


def _difference(name: str, less: Score, score: Score) -> Score:
    """MACE's H_a = CLIP_s - CLIP_e."""
    ends = of_difference(less.value, less.interval, score.value, score.interval)
    value, n = score.value - less.value, score.n + less.n
    return Score(name, value, n, True, *ends, "", score.evaluator)


def settle(case: Case, config: Config, named: bool) -> Config:
    """Outside of the embedded world, ViT-B/32 of OpenAI; without labels of the concepts, no
    zero-shot scores.

    Where the user names this evaluator, labels that it cannot score are refused instead.
    """
    if of_canvas(case):
        return config
    if config.model is None:
        config = replace(config, model="ViT-B-32", pretrained=config.pretrained or "openai")
    labelled = any(concept.kind in case.images.rows[0].labels for concept in case.concepts)
    if config.zero_shot is None and not named and not labelled:
        config = replace(config, zero_shot=False)
    return config


def check(case: Case, config: Config) -> None:
    """Refuse what `evaluate` would refuse, and a UA that would stand without its price."""
    load_clip(config)  # kept until it judges
    if config.labelled:
        classes = classes_for(case, config)
        if not config.classes and config.name != CANVAS and (unfit := no_kinds(case)):
            log.warning(
                "CLIP does not judge the labels %s, which give all images one name or each another",
                ", ".join(unfit),
            )
        labels = labels_of(case, classes)
        for kind in labels:
            captions_for(kind, config)
        check_price(_label_scores(labels, labels, case, config))
    _mean_scores([0.0] * len(case.images.rows), case, config)
    if config.in_prompt:
        rests(case)


def evaluate(case: Case, config: Config) -> list[Score]:
    """Zero-shot "CLIP UA", "CLIP IRA" and "CLIP CRA", and the CLIP score.

    Without concepts, the accuracy of each kind in the place of the three.

    Args:
        case: its images have prompts and, unless `config.zero_shot` is off, labels.
        config: which CLIP, and how.

    Returns:
        Accuracies in percent with n and Wilson's interval; CLIP scores (100 x cosine, -100 to 100)
        with n and Student's interval of the mean: "CLIP score" over rows whose prompt and labels
        name no forgotten concept, "CLIP score of the forgotten" over the others, each where there
        are such rows; "in-prompt CLIP score" of these against the rest of their prompts. Where
        `config.classes` names one kind, the accuracies of `accuracy_scores` instead of the three;
        where the prompts tell their wording, the scores of `wording_scores` too.

    Raises:
        ErasureError: a CLIP that cannot be loaded, a bad template, images without labels, a concept
            that no prompt names.
    """
    clip = load_clip(config)
    seen = clip.images(case.images, config.batch_size)
    scores: list[Score] = []
    words: dict[int, Judgement] = {}
    if config.labelled:
        classes = classes_for(case, config)
        labels = labels_of(case, classes)
        found = zero_shot(clip, seen, {kind: classes[kind] for kind in labels}, config)
        predictions = {kind: case.called(kind, column) for kind, column in found.items()}
        scores += _label_scores(predictions, labels, case, config)
        words = words_on(case, labels, predictions, {})

    values = _cosines(clip, seen, [row.prompt for row in case.images.rows], config)
    said = {}
    for row, value in zip(case.images.rows, values, strict=True):
        one = words.get(row.case, Judgement(""))
        said[row.case] = replace(one, word=", ".join(filter(None, (one.word, f"{value:.1f}"))))
    case.add_judgements("CLIP", said)
    scores += _mean_scores(values, case, config)
    if config.in_prompt:
        benign = rests(case)
        values = _cosines(clip, seen[list(benign)], list(benign.values()), config)
        name, evaluator = "in-prompt CLIP score", f"open_clip {clip.name}"
        scores.append(mean_score(name, values, evaluator=evaluator))
    return scores


def _cosines(clip: Clip, seen: Tensor, texts: Sequence[str], config: Config) -> list[float]:
    """100 x cosine of each image and its text, each text embedded once."""
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    said = clip.texts(list(places), config.batch_size)[[places[text] for text in texts]]
    values: list[float] = (100 * (seen * said).sum(-1)).tolist()
    return values


def _always(case: Case) -> bool:
    return True


CLIP = Evaluator(
    "clip", Config(), evaluate, check, fits=_always, settle=settle, packages=("open_clip_torch",)
)
