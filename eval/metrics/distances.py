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
BLOCK = 512
"""rows of which the products with all others are held at once"""


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

    if paired:
        value, without = _within(*_of_pairs(first, second, kernel), biased)
        variance = _jackknife(without)
    else:
        value, variance = _of_two_sets(first, second, kernel, biased)
    half = float(t.ppf((1 + LEVEL) / 2, min(len(first), len(second)) - 1)) * math.sqrt(variance)
    return value, value - half, value + half


def _of_pairs(
    first: np.ndarray, second: np.ndarray, kernel: Kernel
) -> tuple[np.ndarray, np.ndarray]:
    """k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(y_i, x_j): sums over j, and i = j, (n,) each."""
    rows, diagonal = np.empty(len(first)), np.empty(len(first))
    for at in _blocks(len(first)):
        block = kernel(first[at], first) + kernel(second[at], second)
        block -= kernel(first[at], second) + kernel(second[at], first)
        rows[at], diagonal[at] = block.sum(1), np.diagonal(block[:, at])
    return rows, diagonal


def _of_two_sets(
    first: np.ndarray, second: np.ndarray, kernel: Kernel, biased: bool
) -> tuple[float, float]:
    """Mean within both less twice the mean between, and its jackknife variance; each set's rows are
    left out by themselves."""
    within, rest, (n, m) = [], [], (len(first), len(second))
    for own, other in ((first, second), (second, first)):
        rows, diagonal, across = np.empty(len(own)), np.empty(len(own)), np.empty(len(own))
        for at in _blocks(len(own)):
            block = kernel(own[at], own)
            rows[at], diagonal[at] = block.sum(1), np.diagonal(block[:, at])
            across[at] = kernel(own[at], other).sum(1)
        within.append(_within(rows, diagonal, biased))
        rest.append((across.sum() - across) / ((len(own) - 1) * len(other)))
    variance = sum(
        _jackknife(without - 2 * left) for (_, without), left in zip(within, rest, strict=True)
    )
    return sum(value for value, _ in within) - 2 * float(across.sum() / (n * m)), variance


def _blocks(n: int) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, n, BLOCK)]


def _within(rows: np.ndarray, diagonal: np.ndarray, biased: bool) -> tuple[float, np.ndarray]:
    """Mean of the products of a set's rows, of which the sums of each row and the squares are
    given, (n,) each; and that of the others without each."""
    n = len(rows)
    if biased:
        return float(rows.sum() / n**2), (rows.sum() - 2 * rows + diagonal) / (n - 1) ** 2
    rows = rows - diagonal
    return float(rows.sum() / (n * (n - 1))), (rows.sum() - 2 * rows) / ((n - 1) * (n - 2))


def _jackknife(without: np.ndarray) -> float:
    """Variance of an estimate from its values without each row, or each group of rows."""
    n = len(without)
    return float((n - 1) / n * ((without - without.mean()) ** 2).sum())
