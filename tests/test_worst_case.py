"""Worst-case forget sets: the projection against its optimality conditions, the search against
enumeration, the weighted erasure against its weights."""

from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from scipy.optimize import minimize

from erase.attacks.relearning import changed_to
from erase.latents.latent_set import LatentSet
from erase.latents.prepare import Given
from erase.methods.esd import ESDConfig
from erase.models import wrap
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.scripts.canvas.worst_case import table
from erase.task import Task
from erase.training.config import TrainConfig
from erase.worst_case import WeightedESD, WorstCaseConfig, project, select

WORDS = ("a heart", "a star", "a moon", "a sun")


@pytest.fixture
def erasing(make_pico_pipeline):
    latents = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = tuple(WORDS[row % 4] for row in range(12))
    data = LatentSet(latents, None, prompts)
    task = Task(wrap(make_pico_pipeline()), [ConceptSpec("heart", "star")], Given(data, data))
    train = TrainConfig(steps=6, lr=1e-2, batch_size=2)
    return WeightedESD(task, ESDConfig(train=train))


# ---- the projection ------------------------------------------------------------------------------


def points():
    draw = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1.0, 30.0):
        for n, budget in ((1, 1), (4, 2), (7, 0), (16, 2), (16, 15.5), (100, 10)):
            yield scale * torch.randn(n, generator=draw, dtype=torch.float64), budget
    yield torch.zeros(6, dtype=torch.float64), 2  # ties
    yield torch.tensor([5.0, 5.0, -5.0, 0.0]), 2  # a vertex
    yield 1e9 * torch.ones(3, dtype=torch.float64), 1


def test_the_projection_meets_the_conditions_of_the_nearest_point():
    """KKT: one shift is value - w wherever 0 < w < 1, at most value - 1 where w = 1, at least
    value where w = 0. They hold of the nearest point of this convex set and of no other."""
    for point, budget in points():
        found, size = project(point, budget), 1e-9 * max(1.0, float(point.abs().max()))
        assert 0 <= float(found.min()) and float(found.max()) <= 1
        assert float(found.sum()) == pytest.approx(budget, abs=len(point) * size)
        inner = (found > 0) & (found < 1)
        least = (point[found == 0]).max() if (found == 0).any() else -torch.inf
        most = (point[found == 1] - 1).min() if (found == 1).any() else torch.inf
        assert float(least) <= float(most) + size
        for shift in (point - found)[inner].tolist():
            assert float(least) - size <= shift <= float(most) + size
            assert shift == pytest.approx(float((point - found)[inner][0]), abs=2 * size)


def test_the_projection_is_what_a_quadratic_program_finds():
    draw = torch.Generator().manual_seed(1)
    for _ in range(5):
        point = 2 * torch.rand(5, generator=draw, dtype=torch.float64) - 0.5

        def distance(w, point=point):
            return float((torch.tensor(w) - point).square().sum())

        solved = minimize(
            distance,
            x0=[0.4] * 5,
            bounds=[(0, 1)] * 5,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 2},
            options={"ftol": 1e-14},
        )
        assert torch.allclose(project(point, 2), torch.tensor(solved.x), atol=1e-5)


@pytest.mark.parametrize(
    ("point", "budget", "said"),
    [
        (torch.zeros(3), 4, "3 weights of at most 1 cannot sum to 4"),
        (torch.zeros(3), -1, "cannot sum to -1"),
        (torch.tensor([0.0, torch.nan]), 1, "is not finite"),
    ],
)
def test_what_has_no_nearest_point_is_refused(point, budget, said):
    with pytest.raises(ErasureError, match=said):
        project(point, budget)


# ---- the search ----------------------------------------------------------------------------------


def resisting(resistance):
    """An erasure whose effect on a prompt grows with its weight, and spreads a little."""

    def losses(weights):
        return (weights + 0.1 * weights.mean()) / resistance

    return losses


@pytest.mark.parametrize("budget", [1, 2, 5])
def test_it_finds_the_set_that_enumeration_finds(budget):
    resistance = 1 + torch.arange(9.0).roll(4).double() ** 2
    losses = resisting(resistance)

    def least(chosen):
        weights = torch.zeros(9, dtype=torch.float64)
        weights[list(chosen)] = 1
        return float(losses(weights)[list(chosen)].sum())

    best = min(combinations(range(9), budget), key=least)
    found = select(losses, 9, WorstCaseConfig(budget, rounds=30))
    assert found.chosen == best and len(found.chosen) == budget
    assert sum(found.weights) == pytest.approx(budget) and len(found.losses) == 30
    assert select(losses, 9, WorstCaseConfig(budget, rounds=30)) == found


def test_only_differences_of_losses_matter_and_ridge_draws_the_weights_together():
    def raw(weights):
        return torch.arange(6.0).double()

    config = WorstCaseConfig(2, rounds=3)
    found = select(raw, 6, config)
    other = select(lambda weights: 100 + 7 * raw(weights), 6, config)
    assert other.weights == pytest.approx(found.weights) and found.chosen == (0, 1)
    drawn = select(raw, 6, replace(config, ridge=3.0))
    assert max(drawn.weights) < max(found.weights)


def test_the_budget_is_exact_where_all_are_alike():
    found = select(lambda weights: torch.zeros(5), 5, WorstCaseConfig(3))
    assert found.chosen == (0, 1, 2) and found.weights == pytest.approx([0.6] * 5)


@pytest.mark.parametrize(
    ("losses", "budget", "said"),
    [
        (torch.zeros(4), 4, "a worst-case set of 4 out of 4 prompts is no choice"),
        (torch.tensor([0.0, torch.inf, 0.0, 0.0]), 2, "not 4 finite numbers"),
        (torch.zeros(3), 2, "not 4 finite numbers"),
    ],
)
def test_what_cannot_be_searched_is_refused(losses, budget, said):
    with pytest.raises(ErasureError, match=said):
        select(lambda weights: losses, 4, WorstCaseConfig(budget))
    with pytest.raises(ErasureError, match="budget is 0"):
        WorstCaseConfig(budget=0)


# ---- the weighted erasure ------------------------------------------------------------------------


def test_each_prompt_is_drawn_in_proportion_to_its_weight(erasing):
    weights = torch.tensor([1.0, 0.5, 0.0, 0.25])
    batches = erasing._batches(weights)
    drawn = Counter(prompt for step in range(50) for prompt in batches(step)[1])
    for word, weight in zip(erasing.prompts, weights.tolist(), strict=True):
        assert abs(drawn[word] - 100 * weight / 1.75) <= 3
    assert erasing.prompts == WORDS and drawn["a moon"] == 0
    again = Counter(
        prompt for step in range(50) for prompt in erasing._batches(2 * weights)(step)[1]
    )
    assert again == drawn, "only proportions matter"


def error_of(task, word):
    """The denoising error on the rows of a prompt, once more: four levels, a noise for each row."""
    latents, generator, found = task.forget(), task.generator(0), []
    own = latents.latents[[row for row, prompt in enumerate(latents.prompts) if prompt == word]]
    for level in (0.2, 0.4, 0.6, 0.8):
        t = torch.full((len(own),), int(level * task.model.timesteps))
        noise = torch.randn(own.shape, generator=generator)
        noisy = task.model.add_noise(own, noise, t)
        with torch.no_grad():
            predicted = task.model.predict(noisy, t, task.model.encode([word] * len(own)))
        found.append(float((predicted - noise).square().mean()))
    return sum(found) / 4


def test_a_loss_is_the_rise_of_the_denoising_error_and_the_model_stays_as_it_was(erasing):
    task, weights = erasing.task, torch.tensor([1.0, 0.0, 0.5, 0.5])
    before = {n: p.detach().clone() for n, p in task.model.parameters().items()}
    rise = erasing.losses(weights)
    assert torch.equal(erasing.losses(weights), rise), "bit-equal when repeated"
    assert all(torch.equal(p, before[n]) for n, p in task.model.parameters().items())

    base = [error_of(task, word) for word in WORDS]
    with changed_to(task.model, erasing.edit(weights).values):
        after = [error_of(task, word) for word in WORDS]
    expected = [late - early for late, early in zip(after, base, strict=True)]
    assert max(map(abs, expected)) > 1e-4
    assert rise.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, 0.0, 0.0, -0.1], [0.0] * 4])
def test_weights_that_mean_no_erasure_are_refused(erasing, weights):
    with pytest.raises(ErasureError, match="4 prompts take as many weights"):
        erasing.edit(weights)


def test_the_table_ranks_the_sets_beside_the_base():
    rows = [
        {"set": "base", "seen": [8, 6, 8]},
        {"set": "random 0", "places": [0, 2], "prompts": ["a", "c"], "forgotten": 8, "n": 16},
        {"set": "random 1", "places": [1, 2], "prompts": ["b", "c"], "forgotten": 2, "n": 16},
        {"set": "worst case", "places": [0, 1], "prompts": ["a", "b"], "forgotten": 2, "n": 16},
    ]
    lines = table(rows).splitlines()
    assert lines[2:5] == [
        "| random 1 | b; c | 12 | 12 |",
        "| worst case | a; b | 12 | 12 |",
        "| random 0 | a; c | 50 | 0 |",
    ]
    assert lines[-1] == "0 of 2 random sets have a lower UA, 1 the same; their mean is 31"
