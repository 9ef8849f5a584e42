"""Distances between two sets of image features: Fréchet, and maximum mean discrepancy (MMD), with
intervals that know which images are of one prompt and seed. No images, no models."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from erase.eval.metrics.intervals import LEVEL

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(n, d) and (m, d) features -> (n, m)"""
GROUPS = 20
"""of the jackknife of a Fréchet distance: each leaves out one of so many"""


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): the squared Wasserstein-2 distance of two
    Gaussians (Dowson and Landau 1982), as FID takes it (Heusel et al. 2017, equation 6).

    Biased upwards, by about 1/n (Chong and Forsyth 2020); with fewer rows than features the
    covariances are singular, which the trace of the root can bear.

    Args:
        first: features, shape (n, d), n >= 2.
        second: likewise, (m, d).
    """
    means = first.mean(0), second.mean(0)
    covariances = [np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (first, second)]
    # the eigenvalues of C1 C2 are those of a positive semidefinite matrix: any rest is rounding
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(min=0))
    traces = sum(float(np.trace(covariance)) for covariance in covariances)
    return max(float(((means[0] - means[1]) ** 2).sum() + traces - 2 * roots.sum()), 0.0)


def frechet_interval(
    first: np.ndarray, second: np.ndarray, paired: bool
) -> tuple[float, float, float]:
    """The Fréchet distance and its 95 % interval, by a grouped jackknife.

    20 groups are left out in turn (Shao and Wu 1989), drawn always alike. The interval is that of
    sampling; the bias of `frechet` stays. A bootstrap would not do: rows drawn twice shrink the
    covariances.

    Args:
        first: features, shape (n, d), n >= 3.
        second: likewise, (m, d).
        paired: row i of both is of one prompt and seed, and is left out of both.

    Returns:
        distance, low, high.
    """
    from scipy.stats import t

    value = frechet(first, second)
    groups = min(GROUPS, len(first), len(second))
    places = [_groups(len(rows), groups, seed) for seed, rows in enumerate((first, second))]
    if paired:
        places[1] = places[0]
    without = [
        frechet(first[places[0] != group], second[places[1] != group]) for group in range(groups)
    ]
    error = math.sqrt(_jackknife(np.array(without)))
    half = float(t.ppf((1 + LEVEL) / 2, groups - 1)) * error
    return value, max(value - half, 0.0), value + half


def _groups(n: int, groups: int, seed: int) -> np.ndarray:
    """The group of each row, of equal sizes to within one."""
    return np.random.default_rng(seed).permutation(np.arange(n) % groups)


# ---- maximum mean discrepancy --------------------------------------------------------------------


def polynomial(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(x . y / d + 1)^3: KID's kernel (Bińkowski et al. 2018, section 4)."""
    kernel: np.ndarray = (first @ second.T / first.shape[1] + 1) ** 3
    return kernel


def gaussian(first: np.ndarray, second: np.ndarray, sigma: float = 10.0) -> np.ndarray:
    """exp(-|x - y|^2 / 2 sigma^2): CMMD's kernel (Jayasumana et al. 2024, section 5)."""
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * first @ second.T
    return np.exp(-squares.clip(min=0) / (2 * sigma**2))


def mmd(
    first: np.ndarray, second: np.ndarray, kernel: Kernel, *, paired: bool, biased: bool = False
) -> tuple[float, float, float]:
    """The squared MMD of two sets and its 95 % interval (Gretton et al. 2012).

    - Two independent sets: the unbiased estimate, their equation 3.
    - Pairs: the U-statistic over pairs, their equation 4. Two images of one prompt and seed are
      alike, so the product of a pair with itself is left out; it would make the distance too small,
      and negative for two equal sets.
    - Biased: their equation 5, which keeps every product. Published CMMD figures are this one.

    The interval is Student's, with the error of a jackknife over rows (Arvesen 1969).

    Args:
        first: features, shape (n, d), n >= 3.
        second: likewise, (m, d), m >= 3.
        kernel: of two sets of rows.
        paired: row i of both is of one prompt and seed; n = m.
        biased: keep the products of rows with themselves.

    Returns:
        value, low, high.
    """
    from scipy.stats import t

    own, other = kernel(first, first), kernel(second, second)
    cross = kernel(first, second)
    if paired:
        value, without = _within(own + other - cross - cross.T, biased)
        variance = _jackknife(without)
    else:
        value, variance = _of_two_sets(own, other, cross, biased)
    half = float(t.ppf((1 + LEVEL) / 2, min(len(first), len(second)) - 1)) * math.sqrt(variance)
    return value, value - half, value + half


def _of_two_sets(
    own: np.ndarray, other: np.ndarray, cross: np.ndarray, biased: bool
) -> tuple[float, float]:
    """Mean within both less twice the mean between, and its jackknife variance; each set's rows are
    left out by themselves."""
    within, without_within = zip(*(_within(block, biased) for block in (own, other)), strict=True)
    between, (n, m) = cross.mean(), cross.shape
    rest = [
        (cross.sum() - cross.sum(1)) / ((n - 1) * m),
        (cross.sum() - cross.sum(0)) / (n * (m - 1)),
    ]
    variance = sum(
        _jackknife(without - 2 * left) for without, left in zip(without_within, rest, strict=True)
    )
    return float(sum(within) - 2 * between), variance


def _within(block: np.ndarray, biased: bool) -> tuple[float, np.ndarray]:
    """Mean of the products of a set's rows, (n, n), and that of the others without each."""
    n, diagonal = len(block), np.diagonal(block)
    rows = block.sum(1)
    if biased:
        return float(rows.sum() / n**2), (rows.sum() - 2 * rows + diagonal) / (n - 1) ** 2
    rows = rows - diagonal
    return float(rows.sum() / (n * (n - 1))), (rows.sum() - 2 * rows) / ((n - 1) * (n - 2))


def _jackknife(without: np.ndarray) -> float:
    """Variance of an estimate from its values without each row, or each group of rows."""
    n = len(without)
    return float((n - 1) / n * ((without - without.mean()) ** 2).sum())
