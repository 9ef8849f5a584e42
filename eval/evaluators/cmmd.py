"""CMMD of the retained prompts' images: the maximum mean discrepancy of CLIP's image embeddings
(Jayasumana et al. 2024, "Rethinking FID").

1000 times the squared MMD of unit embeddings with a Gaussian kernel of sigma 10. The paper defines
the unbiased estimate; the code published with it, and so the field's figures, take the biased one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from erase.eval.case import Case
from erase.eval.evaluators import Evaluator, clip
from erase.eval.evaluators.labelled import of_canvas
from erase.eval.evaluators.retained import reference_features, reference_files, retained_pairs
from erase.eval.metrics.distances import gaussian, mmd
from erase.eval.scores import Score
from erase.parallel.processes import in_shares
from erase.prompts.errors import COUNT, check_names, check_ranges

SCALE = 1000
ESTIMATORS = ("unbiased", "as-published")


@dataclass
class Config:
    """cmmd: distance in CLIP between base and erased, of prompts that must stay."""

    model: str | None = None
    """as `clip.model`; default: canvas for the embedded world's prompts, else ViT-L-14-336 with
    OpenAI's weights, as in the paper"""
    pretrained: str | None = None
    """as `clip.pretrained`"""
    quick_gelu: bool | None = None
    """as `clip.quick_gelu`"""
    estimator: str = "unbiased"
    """unbiased: as the paper defines it; as-published: biased, as its code and the field's figures,
    to compare with those"""
    reference: str | None = None
    """folder of images to compare with too, such as real ones (default: none)"""
    batch_size: int = 64
    """images embedded at once; no score depends on it"""
    device: str = "auto"
    """where the model runs; `auto` is this process's GPU if there is one"""

    def __post_init__(self) -> None:
        check_ranges(self, {"batch_size": COUNT}, "cmmd")
        check_names(self, {"estimator": ESTIMATORS})


def settle(case: Case, config: Config, named: bool) -> Config:
    """Outside of the embedded world, the paper's CLIP."""
    if config.model is not None or of_canvas(case):
        return config
    return replace(config, model="ViT-L-14-336", pretrained=config.pretrained or "openai")


def _clip(config: Config) -> clip.Clip:
    return clip.load_clip(
        clip.Config(
            model=config.model,
            pretrained=config.pretrained,
            quick_gelu=config.quick_gelu,
            device=config.device,
        )
    )


def check(case: Case, config: Config) -> None:
    """Refuse what `evaluate` would refuse."""
    retained_pairs(case)
    _clip(config)
    if config.reference is not None:
        reference_files(config.reference)


def evaluate(case: Case, config: Config) -> list[Score]:
    """`CMMD to base`, and `CMMD to reference` where a folder is given.

    Returns:
        Distances over the prompts that ask for no forgotten concept, lower is better, n images,
        with a jackknife's interval. The one to the base is paired by prompt and seed, and is zero
        for the base itself.

    Raises:
        ErasureError: too few such prompts, a CLIP that cannot be loaded, a folder without images.
    """
    pairs, model = retained_pairs(case), _clip(config)

    def features(rows: range) -> tuple[np.ndarray, np.ndarray]:
        return pairs.features(rows, model.embed)

    parts = in_shares(len(pairs.rows), config.batch_size, features, "CMMD", "pair")
    base, own = (np.concatenate(part) for part in zip(*parts, strict=True))
    scores = [_score("base", base, own, model.name, config, paired=True)]
    if config.reference is not None:
        others = reference_features(config.reference, model.embed, config.batch_size)
        scores.append(_score("reference", others, own, model.name, config, paired=False))
    return scores


def _score(
    to: str, first: np.ndarray, own: np.ndarray, model: str, config: Config, *, paired: bool
) -> Score:
    biased = config.estimator == "as-published"
    found = mmd(first, own, gaussian, paired=paired, biased=biased)
    value, low, high = (SCALE * number for number in found)
    evaluator = f"open_clip {model}, {config.estimator}"
    return Score(f"CMMD to {to}", value, len(own), False, low, high, "", evaluator)


CMMD = Evaluator("cmmd", Config(), evaluate, check, settle=settle, packages=("open_clip_torch",))
