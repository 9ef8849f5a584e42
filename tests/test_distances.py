"""Distances of features: closed forms, the libraries' own values, literal formulas, and the
coverage of the intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from erase.eval.metrics import distances
from erase.eval.metrics.distances import BLOCK, frechet, frechet_interval, gaussian, mmd, polynomial


def features(n: int, d: int = 8, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (n, d))


def alike(first: np.ndarray, seed: int, rest: float = 0.5) -> np.ndarray:
    """Rows of the same distribution, each near its own partner: what one seed does to images."""
    noise = np.random.default_rng(seed).normal(size=first.shape)
    return np.sqrt(1 - rest**2) * first + rest * noise


# ---- Fréchet -------------------------------------------------------------------------------------


def test_two_gaussians_are_as_far_apart_as_the_closed_form_says() -> None:
    """Diagonal covariances: |m1 - m2|^2 + sum of (s1 - s2)^2. The samples are made to have their
    moments exactly."""
    sample = features(500, 3)
    sample = sample - sample.mean(0)
    white = sample @ np.linalg.inv(np.linalg.cholesky(np.cov(sample, rowvar=False))).T
    first = white * [1.0, 2.0, 3.0] + [0.0, 1.0, 5.0]
    second = white * [2.0, 2.0, 0.5] + [1.0, 1.0, 3.0]
    expected = (1 + 0 + 4) + (1 + 0 + 2.5**2)
    assert frechet(first, second) == pytest.approx(expected, abs=1e-9)
    assert frechet(first, first) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("n", [200, 5])
def test_fid_is_torch_fidelitys_to_the_last_digit(n: int) -> None:
    """Also with fewer rows than features, whose covariances are singular."""
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    first, second = features(n, seed=1), features(n + 7, seed=2, shift=0.3)
    stats = [fid.fid_features_to_statistics(torch.from_numpy(rows)) for rows in (first, second)]
    theirs = fid.fid_statistics_to_metric(*stats, False)["frechet_inception_distance"]
    assert frechet(first, second) == pytest.approx(theirs, rel=1e-9, abs=1e-6)


def test_the_jackknife_interval_of_fid_is_as_wide_as_fid_scatters() -> None:
    """Over fresh samples; and pairing narrows it where partners are alike."""
    found, paired, free = [], [], []
    for seed in range(40):
        first = features(300, 4, seed=2 * seed)
        second = alike(first, 2 * seed + 1) + 0.5
        value, low, high = frechet_interval(first, second, paired=True)
        found.append(value)
        paired.append((high - low) / 2)
        apart = frechet_interval(first, second, paired=False)
        free.append((apart[2] - apart[1]) / 2)
    two_errors = 2.09 * np.std(found)  # Student's quantile of 19 degrees of freedom
    assert np.mean(paired) == pytest.approx(two_errors, rel=0.35)
    assert np.mean(free) > 1.3 * np.mean(paired)


# ---- maximum mean discrepancy --------------------------------------------------------------------


def test_kid_is_torch_fidelitys_to_the_last_digit() -> None:
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    first, second = features(60, seed=1), features(60, seed=2, shift=0.3)
    theirs = kid.kid_features_to_metric(
        torch.from_numpy(first),
        torch.from_numpy(second),
        kid_subsets=1,
        kid_subset_size=60,
        verbose=False,
    )["kernel_inception_distance_mean"]
    assert mmd(first, second, polynomial, paired=False)[0] == pytest.approx(theirs, rel=1e-10)


@pytest.mark.parametrize("rows", [2, 512])
@pytest.mark.parametrize("kernel", [polynomial, gaussian])
def test_mmd_is_its_formula(kernel, rows, monkeypatch) -> None:
    """Gretton et al. 2012, equations 3, 4 and 5, sum by sum, in blocks of some rows."""
    monkeypatch.setattr(distances, "BLOCK", rows)
    x, y = features(5, 3, seed=1), features(5, 3, seed=2, shift=1.0)
    pairs = [(i, j) for i in range(5) for j in range(5)]
    others = [(i, j) for i, j in pairs if i != j]

    def k(a: np.ndarray, b: np.ndarray) -> float:
        if kernel is polynomial:
            return float((a @ b / 3 + 1) ** 3)
        return float(np.exp(-((a - b) ** 2).sum() / (2 * 10**2)))

    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in others) / 20
    unbiased = within - 2 * sum(k(x[i], y[j]) for i, j in pairs) / 25
    of_pairs = within - 2 * sum(k(x[i], y[j]) for i, j in others) / 20
    biased = sum(k(x[i], x[j]) + k(y[i], y[j]) - 2 * k(x[i], y[j]) for i, j in pairs) / 25
    assert mmd(x, y, kernel, paired=False)[0] == pytest.approx(unbiased)
    assert mmd(x, y, kernel, paired=True)[0] == pytest.approx(of_pairs)
    for paired in (True, False):
        assert mmd(x, y, kernel, paired=paired, biased=True)[0] == pytest.approx(biased)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_the_error_is_the_jackknifes(paired: bool, biased: bool) -> None:
    """By leaving out each row in turn and measuring again."""
    from scipy.stats import t

    x, y = features(6, 3, seed=1), features(6, 3, seed=2, shift=1.0)

    def again(first: np.ndarray, second: np.ndarray) -> float:
        return mmd(first, second, polynomial, paired=paired, biased=biased)[0]

    def variance(values: list[float]) -> float:
        return 5 / 6 * float(np.sum((np.array(values) - np.mean(values)) ** 2))

    drop = lambda rows, i: np.delete(rows, i, 0)  # noqa: E731
    if paired:
        total = variance([again(drop(x, i), drop(y, i)) for i in range(6)])
    else:
        total = variance([again(drop(x, i), y) for i in range(6)])
        total += variance([again(x, drop(y, i)) for i in range(6)])
    value, low, high = mmd(x, y, polynomial, paired=paired, biased=biased)
    half = float(t.ppf(0.975, 5)) * np.sqrt(total)
    assert (low, high) == pytest.approx((value - half, value + half))


def test_equal_sets_are_at_zero_and_pairs_of_one_distribution_around_it() -> None:
    """The estimate for independent sets would call alike pairs nearer than nothing."""
    same = features(50)
    assert mmd(same, same, polynomial, paired=True) == (0, 0, 0)
    many = features(2 * BLOCK + 3)
    assert mmd(many, many, polynomial, paired=True) == (0, 0, 0)
    paired, apart, covered = [], [], 0
    for seed in range(100):
        first = features(60, seed=2 * seed)
        second = alike(first, 2 * seed + 1)
        value, low, high = mmd(first, second, polynomial, paired=True)
        paired.append(value)
        covered += low <= 0 <= high
        apart.append(mmd(first, second, polynomial, paired=False)[0])
    error = np.std(paired) / 10
    assert abs(np.mean(paired)) < 3 * error and np.mean(apart) < -10 * error
    assert covered >= 93


def test_the_interval_of_mmd_covers_the_true_distance() -> None:
    """CMMD's kernel between Gaussians has a closed form."""
    d, shift = 4, 0.8

    def mean_kernel(distance: float) -> float:  # of x - y ~ N(distance, 2 I), sigma 10
        return (100 / 102) ** (d / 2) * float(np.exp(-(distance**2) / (2 * 102)))

    true = 2 * mean_kernel(0) - 2 * mean_kernel(shift * np.sqrt(d))
    covered = 0
    for seed in range(200):
        first, second = features(80, d, 2 * seed), features(80, d, 2 * seed + 1, shift)
        _, low, high = mmd(first, second, gaussian, paired=False)
        covered += low <= true <= high
    assert 182 <= covered <= 200
