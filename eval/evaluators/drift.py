"""How far each retained prompt's image moved from the base's of the same seed: in pixels, in
structure, and on the embedded world in its CLIP's eyes. Needs no weights elsewhere.

SSIM: Wang et al. 2004, with their Gaussian window (11 pixels, sigma 1.5), by scikit-image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean, stdev

import numpy as np

from erase.eval.case import Case
from erase.eval.evaluators import Evaluator, clip
from erase.eval.evaluators.labelled import of_canvas
from erase.eval.evaluators.published import needs
from erase.eval.evaluators.retained import Pair, retained_pairs
from erase.eval.metrics.intervals import LEVEL
from erase.eval.scores import Score, mean_score
from erase.parallel.processes import in_shares
from erase.prompts.errors import COUNT, ErasureError, check_ranges
from erase.tensors import exact

WINDOW = 11
"""pixels a side of SSIM's window"""


@dataclass
class Config:
    """drift: how far images of prompts that must stay moved from the base's."""

    batch_size: int = 64
    """pairs looked at together; no score depends on it"""

    def __post_init__(self) -> None:
        check_ranges(self, {"batch_size": COUNT}, "drift")


@dataclass(frozen=True)
class Moved:
    """One image beside the base's of the same prompt and seed."""

    absolute: float
    """mean absolute difference of the values, of 255"""
    squared: float
    """mean squared difference"""
    ssim: float
    cosine: float
    """of CLIP's embeddings; NaN outside of the embedded world"""


def moved(pairs: Sequence[Pair], embedded: bool) -> list[Moved]:
    """How far the second image of each pair is from the first.

    Raises:
        ErasureError: an image too small for SSIM's window.
    """
    cosines = [math.nan] * len(pairs)
    if embedded:
        model = clip.load_clip(clip.Config())
        first, second = (model.embed(images) for images in zip(*pairs, strict=True))
        cosines = (exact(first) * exact(second)).sum(-1).tolist()
    return [_moved(pair, cosine) for pair, cosine in zip(pairs, cosines, strict=True)]


def _moved(pair: Pair, cosine: float) -> Moved:
    with needs("scikit-image"):
        from skimage.metrics import structural_similarity

    if min(pair[0].size) < WINDOW:
        raise ErasureError(
            f"an image of {pair[0].width} x {pair[0].height} pixels is too small for SSIM's window "
            f"of {WINDOW}; generate larger ones"
        )
    first, second = (np.asarray(image, dtype=np.float64) for image in pair)
    difference = second - first
    ssim = structural_similarity(
        first,
        second,
        channel_axis=2,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    return Moved(
        float(np.abs(difference).mean()), float((difference**2).mean()), float(ssim), cosine
    )


def check(case: Case, config: Config) -> None:
    """Refuse what `evaluate` would refuse before it sees images."""
    retained_pairs(case)
    with needs("scikit-image"):
        import skimage.metrics  # noqa: F401


def evaluate(case: Case, config: Config) -> list[Score]:
    """`pixel drift` (mean absolute difference, of 255), `PSNR to base`, `SSIM to base` and, on the
    embedded world, `CLIP cosine to base`.

    Returns:
        Means over the prompts that ask for no forgotten concept, n images, with Student's interval.
        PSNR is that of the mean squared error of all images together, which an identical image does
        not make infinite; where all are identical, as the base's own, there is none.

    Raises:
        ErasureError: too few such prompts, scikit-image is absent, images too small or of two
            sizes.
    """
    pairs, embedded = retained_pairs(case), of_canvas(case)

    def look(rows: range) -> list[Moved]:
        return moved(pairs.images(rows), embedded)

    parts = in_shares(len(pairs.rows), config.batch_size, look, "drift", "pair")
    seen, cases = list(chain.from_iterable(parts)), pairs.cases
    scores = [
        mean_score(
            "pixel drift",
            [one.absolute for one in seen],
            higher_is_better=False,
            evaluator="mean absolute difference, of 255",
            cases=cases,
        ),
        *_psnr([one.squared for one in seen]),
        mean_score(
            "SSIM to base",
            [one.ssim for one in seen],
            evaluator="scikit-image, Gaussian window",
            cases=cases,
        ),
    ]
    if embedded:
        cosines = [one.cosine for one in seen]
        evaluator = f"open_clip {clip.CANVAS}"
        scores.append(mean_score("CLIP cosine to base", cosines, evaluator=evaluator, cases=cases))
    return scores


def _psnr(squared: Sequence[float]) -> list[Score]:
    """10 log10(255^2 / mean squared error), with Student's interval of the mean carried over to
    its logarithm (delta method)."""
    from scipy.stats import t

    mean, n = fmean(squared), len(squared)
    if not mean:
        return []
    value = 10 * math.log10(255**2 / mean)
    error = 10 / math.log(10) * stdev(squared) / math.sqrt(n) / mean
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * error
    evaluator = "of the mean squared error"
    return [Score("PSNR to base", value, n, True, value - half, value + half, "dB", evaluator)]


DRIFT = Evaluator("drift", Config(), evaluate, check)
