"""TIES against its paper, written once more on whole vectors; and its limits."""

import pytest
import torch

from erase.compose import compose
from erase.compose.ties import trimmed
from erase.prompts.errors import ErasureError
from erase.scripts import run_export
from tests.test_delta import copies, make, model, patched, places  # noqa: F401  # a fixture


def literal(vectors, keep):
    """Yadav et al. 2023, algorithm 1, on task vectors of all weights: trim to the largest, elect
    the sign of the sum, mean over those of that sign that are not zero."""
    left = []
    for vector in vectors:
        count = int(keep * vector.count_nonzero())
        least = vector.abs().sort(descending=True).values[count - 1]
        left.append(torch.where(vector.abs() >= least, vector, 0))
    stacked = torch.stack(left)
    sign = stacked.sum(0).sign()
    agree = (stacked.sign() == sign) & (stacked != 0)
    return (stacked * agree).sum(0) / agree.sum(0).clamp_min(1)


def vector_of(model, delta):  # noqa: F811
    base, changed = copies(model), patched(model, delta)
    moves = [(changed[name].double() - base[name].double()).flatten() for name in base]
    return torch.cat(moves)


@pytest.mark.parametrize("density", [1.0, 0.5, 0.05])
@pytest.mark.parametrize("keep", [0.2, 0.7, 1.0])
def test_ties_is_the_paper_s(model, density, keep):  # noqa: F811
    names = ("heart", "star", "moon")
    deltas = [make(model, name, seed, density) for seed, name in enumerate(names)]
    found = vector_of(model, compose(model, [(one, 1.0) for one in deltas], "ties", keep))
    expected = literal([vector_of(model, one) for one in deltas], keep)
    assert expected.any() and torch.allclose(found, expected, rtol=0, atol=1e-7)


def test_a_scale_of_all_scales_the_merged_change(model):  # noqa: F811
    """The paper's lambda."""
    deltas = [make(model, seed=seed) for seed in range(3)]
    once, twice = (
        vector_of(model, compose(model, [(one, scale) for one in deltas], "ties", 0.5))
        for scale in (1.0, 2.0)
    )
    assert torch.allclose(twice, 2 * once, rtol=0, atol=1e-6)


def test_one_part_is_itself_and_trimming_keeps_the_largest_of_all_tensors(model):  # noqa: F811
    delta = make(model)
    assert compose(model, [(delta, 1.0)], "ties", 1.0).sha256 == delta.sha256
    fewer = trimmed(model.parameters(), delta, 0.1)
    whole, left = vector_of(model, delta).abs(), vector_of(model, fewer).abs()
    assert fewer.count == int(0.1 * delta.count) == left.count_nonzero()
    assert left[left > 0].min() >= whole[left == 0].max()
    fewer.check(model)
    assert all(
        (place <= places(model, delta)[n]).all() for n, place in places(model, fewer).items()
    )


def test_changes_that_cancel_leave_the_base(model):  # noqa: F811
    delta = make(model)
    assert compose(model, [(delta, 1.0), (delta, -1.0)], "ties", 1.0).count == 0


def test_what_was_merged_is_told_and_order_does_not_matter(model):  # noqa: F811
    deltas = [make(model, "heart"), make(model, "star", seed=1)]
    forth = compose(model, [(one, 1.0) for one in deltas], "ties", 0.5)
    back = compose(model, [(one, 1.0) for one in reversed(deltas)], "ties", 0.5)
    assert forth.sha256 == back.sha256 and forth.title == "heart, star"
    assert forth.origin.config["on_conflict"] == "ties" and forth.origin.config["keep"] == 0.5


@pytest.mark.parametrize("keep", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(model, keep):  # noqa: F811
    with pytest.raises(ErasureError, match="fraction of each delta's changes"):
        compose(model, [(make(model), 1.0)], "ties", keep)


def test_keep_without_ties_is_refused(tmp_path):
    argv = ["--delta", "a", "--delta", "b", "--keep", "0.5", "--out", str(tmp_path / "out")]
    with pytest.raises(ErasureError, match="--keep is for --on_conflict ties"):
        run_export.main(argv)
