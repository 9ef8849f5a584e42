"""The classifier bench: its columns have known answers, its rows follow their equations, and its
settings are chosen on seeds that it does not report."""

import json
from collections import Counter

import pytest
import torch
from torch.nn.functional import cross_entropy

from erase.prompts.errors import ErasureError
from erase.scripts.bench.classifier import SEEDS, TUNING_SEEDS, Record
from erase.scripts.bench.classifier_data import Samples, digits, network, split
from erase.scripts.bench.classifier_methods import (
    MATCHED,
    STEPS,
    Row,
    World,
    dampen,
    grid,
    masked,
    rows,
    statistics,
    terms,
    tuned,
)
from erase.scripts.bench.classifier_scores import accuracy, confidence, gap, mia, scores
from erase.scripts.bench.classifier_tables import around, comparison, table


@pytest.fixture
def world():
    """With an untrained base."""
    made = World("random", 3)
    made.__dict__["base"] = network(3)
    statistics.cache_clear()
    return made


# ---- columns -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("like_members", "share"), [(20, 0.0), (0, 100.0), (5, 75.0)])
def test_mia_is_the_share_of_the_forgotten_that_is_taken_for_unseen(like_members, share):
    members = torch.linspace(0.97, 1.0, 60)
    others = torch.linspace(0.2, 0.4, 60)
    forgotten = torch.cat([members[:like_members], others[: 20 - like_members]])
    assert mia(members, others, forgotten) == share


def test_ua_counts_wrong_answers_and_confidence_is_that_of_the_label():
    class Constant(torch.nn.Module):
        def forward(self, images):
            return torch.tensor([0.0, torch.log(torch.tensor(3.0))]).expand(len(images), 2)

    samples = Samples(torch.zeros(4, 1), torch.tensor([1, 1, 1, 0]))
    assert accuracy(Constant(), samples) == 75
    assert torch.allclose(confidence(Constant(), samples), torch.tensor([0.75, 0.75, 0.75, 0.25]))


def test_the_gap_is_the_mean_distance_whatever_its_sign():
    own = {"UA": 90.0, "RA": 100.0, "TA": 99.0, "MIA": 50.0}
    retrain = {"UA": 100.0, "RA": 98.0, "TA": 99.0, "MIA": 46.0}
    assert gap(own, retrain) == gap(retrain, own) == 4.0
    assert gap(own, own) == 0


def test_retrain_does_not_know_the_class_that_it_never_saw_and_the_base_does():
    made = World("class", 4)
    exact = scores(made.retrain[0], made.split)
    assert exact["UA"] == 100 and exact["MIA"] == 100
    assert exact["RA"] > 98 and exact["TA"] > 94
    assert scores(made.base, made.split)["UA"] < 5


# ---- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", ["class", "random"])
def test_no_image_is_on_two_sides(scenario):
    part = split(scenario, 7)
    everything = Counter(image.numpy().tobytes() for image in digits().images)
    parts = torch.cat([part.forget.images, part.retain.images, part.test.images])
    assert not Counter(image.numpy().tobytes() for image in parts) - everything
    assert len(part.train) == 1078
    if scenario == "class":
        assert set(part.forget.labels.tolist()) == {7}
        assert (
            set(part.retain.labels.tolist())
            == set(part.test.labels.tolist())
            == set(range(10)) - {7}
        )
    else:
        assert (len(part.forget), len(part.test)) == (107, 719)


def test_wrong_labels_are_never_right_and_all_others_occur():
    made = World("class", 2)
    wrong = torch.cat([made.batch(step).wrong for step in range(20)])
    assert set(wrong.tolist()) == set(range(10)) - {2}


def test_a_batch_is_a_function_of_its_step(world):
    one, same, other = world.batch(5), World("random", 3).batch(5), world.batch(6)
    assert all(torch.equal(vars(one)[name], vars(same)[name]) for name in vars(one))
    assert not torch.equal(one.forget, other.forget)
    assert float(one.progress[0]) == pytest.approx(5 / STEPS)


# ---- rows ----------------------------------------------------------------------------------------


def test_terms_follow_their_equations(world):
    net, batch = network(0), world.batch(10)
    retain = cross_entropy(net(batch.retain), batch.retain_labels)
    assert terms(net, batch, {}, "fine-tune") == {"retain": retain}

    ascent = terms(net, batch, {}, "ascent")
    assert ascent == {"forget": -cross_entropy(net(batch.forget), batch.labels)}

    relabelled = terms(net, batch, {}, "random-label")
    expected = 107 / 971 * cross_entropy(net(batch.forget), batch.wrong)
    assert torch.allclose(relabelled["forget"], expected) and relabelled["retain"] == retain

    sparse = terms(net, batch, {"gamma": 0.01}, "l1-sparse")["sparse"]
    norm = sum(float(param.detach().abs().sum()) for param in net.parameters())
    assert float(sparse.detach()) == pytest.approx(0.01 * (1 - 10 / STEPS) * norm, rel=1e-4)


def test_dampening_is_foster_equations_weight_by_weight():
    generator = torch.Generator().manual_seed(0)
    value, own, every = (torch.randn(50, generator=generator) for _ in range(3))
    own, every = own.square(), every.square()
    own[0] = every[0] = 0.0
    found = dampen(value, own, every, alpha=1.5, strength=0.7)
    for place in range(50):
        expected = value[place]
        if own[place] > 1.5 * every[place]:
            expected = expected * min(0.7 * every[place] / own[place], 1)
        assert torch.allclose(found[place], expected)
    assert 5 < int((found != value).sum()) < 45


@pytest.mark.parametrize(("source", "sign"), [("forget-each", 1), ("forget", -1)])
def test_statistics_are_those_of_plain_autograd(world, source, sign):
    net, samples = world.base, world.split.forget
    size = 1 if source == "forget-each" else 32
    total, square = 0, 0
    for start in range(0, len(samples), size):
        images, labels = samples.images[start : start + size], samples.labels[start : start + size]
        loss = sign * cross_entropy(net(images), labels)
        (gradient,) = torch.autograd.grad(loss, [net.layers[0].weight])
        total, square = total + gradient, square + gradient.square()
    found, _ = statistics(world, source)
    assert torch.allclose(found["sum"]["layers.0.weight"], total, rtol=1e-3, atol=1e-6)
    assert torch.allclose(found["square"]["layers.0.weight"], square, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("rule", ["forget", "benefit", f"{MATCHED}benefit", "random"])
def test_a_mask_bounds_what_moves_and_the_base_stays(world, rule):
    before = [param.detach().clone() for param in world.base.parameters()]
    net, _ = masked(world, {"lr": 1e-2}, rule, 0.01)
    pairs = list(zip(before, net.parameters(), strict=True))
    moved = sum(int((old != new).sum()) for old, new in pairs)
    total = sum(old.numel() for old in before)
    assert 0.5 * int(0.01 * total) < moved <= int(0.01 * total)
    assert all(map(torch.equal, before, world.base.parameters()))


def test_matched_random_has_as_many_weights_in_each_tensor_elsewhere(world):
    nets = [masked(world, {"lr": 1e-2}, rule, 0.1)[0] for rule in ("benefit", f"{MATCHED}benefit")]
    base = world.base.layers[4].weight
    ours, control = (net.layers[4].weight != base for net in nets)
    assert int(control.sum()) == pytest.approx(int(ours.sum()), rel=0.1)
    assert int((ours & control).sum()) < 0.6 * int(ours.sum())


def test_a_row_is_the_same_again(world):
    one, other = (tuned(world, {"lr": 1e-3}, "random-label")[0] for _ in range(2))
    assert all(map(torch.equal, one.parameters(), other.parameters()))


# ---- the record and its tables -------------------------------------------------------------------


def line(seed, gap, row="SSD", **setting):
    columns = dict.fromkeys(("UA", "RA", "TA", "MIA"), 50.0)
    about = {"scenario": "class", "seed": seed, "row": row, "setting": setting}
    return {**about, **columns, "gap": gap, "seconds": 1.0}


def test_every_row_that_chooses_has_the_same_budget():
    budgets = {len(row.settings) for row in rows().values() if row.settings != ({},)}
    assert budgets == {4}
    assert not set(SEEDS) & set(TUNING_SEEDS)


def test_the_setting_is_chosen_on_tuning_seeds_alone(tmp_path):
    record, row = Record(tmp_path / "classifier.jsonl"), Row(grid({"lr": (2.0, 1.0)}), tuned)
    record.add(line(100, 4.0, lr=1.0))
    record.add(line(101, 2.0, lr=1.0))
    record.add(line(100, 1.0, lr=2.0))
    with pytest.raises(ErasureError, match="not measured on all tuning seeds of class"):
        record.best("class", "SSD", row)
    record.add(line(101, 6.0, lr=2.0))
    record.add(line(0, 0.0, lr=2.0))
    assert record.best("class", "SSD", row) == {"lr": 1.0}


def test_a_record_goes_on_with_what_is_in_its_file(tmp_path):
    path = tmp_path / "classifier.jsonl"
    Record(path).add(line(0, 1.0, lr=0.01))
    again = Record(path)
    assert again.has(World("class", 0), "SSD", {"lr": 0.01})
    assert not again.has(World("class", 0), "SSD", {"lr": 0.02})
    assert not again.has(World("class", 1), "SSD", {"lr": 0.01})
    assert [json.loads(text) for text in path.read_text().splitlines()] == [line(0, 1.0, lr=0.01)]


def test_rules_are_compared_seed_by_seed():
    found = [line(seed, seed + 1.0, "SalUn, benefit 1 %") for seed in range(3)]
    found += [line(seed, seed + 3.0, "SalUn, forget 1 %") for seed in range(3)]
    found += [line(0, 9.0, "SalUn, random 10 %")]
    lines = comparison(found).splitlines()
    assert lines[0] == "| gap of benefit - gap of | 1 % | 10 % |"
    assert lines[2:] == ["| forget | -2.00 ± 0.00 |  |", "| random |  |  |"]


def test_the_gap_of_means_lets_seeds_cancel_and_the_gap_does_not():
    exact = [line(seed, 0.0, "Retrain") for seed in range(2)]
    around_it = [line(0, 1.0) | {"UA": 54.0}, line(1, 1.0) | {"UA": 46.0}]
    last = table(exact + around_it).splitlines()[-1]
    assert last.startswith("| SSD |") and "| 1.00 ± 0.00 |" in last and last.endswith("| 0.00 |")


def test_cells_have_a_mean_and_half_of_an_interval():
    # Student: 4.303 * 1 / sqrt(3)
    assert around([1.0, 2.0, 3.0]) == "2.00 ± 2.48"
    assert "| SSD | lr 0.01 | 3 |" in table([line(seed, 1.0, lr=0.01) for seed in range(3)])
