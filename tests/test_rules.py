"""Rules of saliency: statistics against plain autograd, each rule against its formula, files, and
who draws what."""

import errno
import os
from dataclasses import replace

import pytest
import torch

from erase.latents.batches import noised
from erase.latents.latent_set import Given, LatentSet, epoch_rows
from erase.mask import SaliencyMask
from erase.methods import get_method
from erase.methods.salun import SalUnConfig
from erase.models import wrap
from erase.objectives.remap import Remap
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.task import Task
from erase.tensors import kth_largest
from erase.training.config import CONTROLS, MaskConfig, TrainConfig
from erase.training.config import RULES as NAMES
from erase.training.rules import ENOUGH, LADDER, RULES, find_density, held, overlap, scores
from erase.training.saliency import Objective, choose_mask, compute_saliency, compute_statistics
from erase.training.statistics import Accumulator, Statistics, in_memory, on_disk

CONCEPT = ConceptSpec("heart", "star", retain=("a moon", "a tree"))
CONFIG = SalUnConfig(
    mask=MaskConfig(batches=3, batch_size=4), train=TrainConfig(steps=3, batch_size=4, lr=1e-3)
)
ALL = ("objective.sum", "objective.square", "retain.square")


@pytest.fixture
def task(make_pico_pipeline):
    generator = torch.Generator().manual_seed(0)
    forget = LatentSet(
        torch.randn(6, 4, 8, 8, generator=generator),
        None,
        ("a heart",) * 6,
        ("a star",) * 6,
        torch.arange(6) > 2,
    )
    retain = LatentSet(
        torch.randn(5, 4, 8, 8, generator=generator),
        None,
        ("a moon", "a tree", "a moon", "a tree", "a moon"),
    )
    return Task(wrap(make_pico_pipeline()), [CONCEPT], Given(forget, retain))


def objective_of(task, config=CONFIG):
    remap = Remap(task, config)
    return Objective(remap.loss, remap.batches)


def gradients(task, loss):
    params = task.weights("full")
    for param in params.values():
        param.requires_grad_(True)
    found = torch.autograd.grad(loss(), list(params.values()), allow_unused=True)
    for param in params.values():
        param.requires_grad_(False)
    return dict(zip(params, found, strict=True))


# ---- statistics ----------------------------------------------------------------------------------


def test_statistics_are_sums_over_the_batches_that_training_will_see(task):
    objective = objective_of(task)
    found = compute_statistics(task, CONFIG, ALL, objective).values

    remaps = [
        gradients(
            task, lambda step=step: objective.loss(objective.batches(step), torch.no_grad)["forget"]
        )
        for step in range(3)
    ]
    retained = []
    for step in range(3):
        retain, generator = task.retain(), torch.Generator().manual_seed(step)
        rows = epoch_rows(len(retain), step * 4, 4, 1)
        t = torch.randint(1000, (4,), generator=generator)
        noise = torch.randn(4, 4, 8, 8, generator=generator)
        seen = noised(task.model, retain.latents[rows], noise, t)
        prompts = [retain.prompts[row] for row in rows]

        def loss(seen=seen, prompts=prompts, noise=noise):
            return (task.predict(seen, prompts) - noise).square().mean()

        retained.append(gradients(task, loss))

    for name in task.weights("full"):
        total, square = found["objective.sum"][name], found["objective.square"][name]
        assert torch.allclose(total, sum(g[name] for g in remaps), atol=1e-6, rtol=1e-3)
        assert torch.allclose(square, sum(g[name] ** 2 for g in remaps), atol=1e-9, rtol=1e-3)
        assert torch.allclose(
            found["retain.square"][name], sum(g[name] ** 2 for g in retained), atol=1e-9, rtol=1e-3
        )


@pytest.mark.parametrize("names", [ALL, ("forget.sum",)])
def test_statistics_leave_the_model_and_are_the_same_again(task, names):
    before = {name: param.detach().clone() for name, param in task.model.parameters().items()}
    one, other = (compute_statistics(task, CONFIG, names, objective_of(task)) for _ in range(2))
    for statistic in names:
        assert all(
            torch.equal(one.values[statistic][n], value)
            for n, value in other.values[statistic].items()
        )
    for name, param in task.model.parameters().items():
        assert torch.equal(param, before[name]) and not param.requires_grad and param.grad is None


def test_a_batch_in_parts_has_the_statistics_of_the_whole(task):
    split = replace(CONFIG, train=replace(CONFIG.train, accumulation=2))
    whole = compute_statistics(task, CONFIG, ALL, objective_of(task)).values
    parts = compute_statistics(task, split, ALL, objective_of(task, split)).values
    for statistic, values in whole.items():
        scale = max(float(value.abs().max()) for value in values.values())
        for name, value in values.items():
            assert torch.allclose(parts[statistic][name], value, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize("collecting", [False, True], ids=["by hand", "as they come"])
def test_gradients_are_summed_signed_and_squared_one_by_one(collecting):
    param = torch.nn.Parameter(torch.zeros(3))
    totals = Accumulator({"p": param}, None, ("sum", "square"))
    for gradient in ([1.0, 2.0, -1.0], [-1.0, 1.0, -2.0]):
        if collecting:
            with totals.collecting():
                (param * torch.tensor(gradient)).sum().backward()
        else:
            (param * torch.tensor(gradient)).sum().backward()
            totals.add()
        assert param.grad is None
    found = totals.finish()
    assert found["sum"]["p"].tolist() == [0.0, 3.0, -3.0] and found["square"]["p"].tolist() == [
        2.0,
        5.0,
        5.0,
    ]


@pytest.mark.parametrize("where", ["memory", "disk", "temporary"])
def test_sums_wait_elsewhere(where, tmp_path):
    zeros = in_memory if where == "memory" else on_disk(tmp_path if where == "disk" else None)
    held = {"p": torch.nn.Parameter(torch.empty(3, device="meta"))}  # a device that is not the CPU
    assert Accumulator(held, None, ("sum",), zeros).finish()["sum"]["p"].tolist() == [0] * 3
    params = {"p": torch.nn.Parameter(torch.zeros(3)), "q": torch.nn.Parameter(torch.ones(1, 2))}
    totals = Accumulator(params, None, ("square",), zeros)
    with totals.collecting():
        (params["p"] * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    found = totals.finish()["square"]
    assert found["p"].tolist() == [1.0, 4.0, 9.0] and found["q"].tolist() == [[0.0, 0.0]]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_for_sums_is_said_at_once(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(
        ErasureError, match=f"cannot write to {tmp_path}: No space.*free some space"
    ):
        on_disk(tmp_path)({"p": torch.zeros(3)})
    assert list(tmp_path.iterdir()) == []


def test_statistics_on_disk_are_those_in_memory(task):
    plain = compute_statistics(task, CONFIG, ALL, objective_of(task)).values
    config = replace(CONFIG, mask=replace(CONFIG.mask, on_disk=True))
    found = compute_statistics(task, config, ALL, objective_of(task, config)).values
    for statistic, values in plain.items():
        assert all(torch.equal(found[statistic][name], value) for name, value in values.items())


def test_what_is_not_finite_is_refused():
    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.tensor([1.0, torch.nan, 0.0])
    totals = Accumulator({"unet.p": param}, None, ("sum",))
    totals.add()
    with pytest.raises(ErasureError, match=r"unet\.p is not finite"):
        totals.finish()


# ---- rules ---------------------------------------------------------------------------------------


def made(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (40, 5), "b": (30,)}

    def draw(positive=False):
        values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        return {name: value.square() for name, value in values.items()} if positive else values

    names = {
        "forget.sum": draw(),
        "objective.sum": draw(),
        "objective.square": draw(True),
        "retain.square": draw(True),
    }
    return Statistics(names, {"base_fingerprint": "f"}), draw()


def test_every_rule_is_its_formula():
    statistics, weights = made()
    f, g, g2, r2 = (
        torch.cat([v.flatten() for v in statistics.values[n].values()])
        for n in ("forget.sum", "objective.sum", "objective.square", "retain.square")
    )
    theta = torch.cat([w.flatten() for w in weights.values()])
    floor = 0.1 * r2.sqrt().sort().values[len(r2) - (len(r2) + 1) // 2]
    expected = {
        "forget": f.abs(),
        "remap": g.abs(),
        "benefit": g.abs() / (r2.sqrt() + floor),
        "fisher-ratio": g2 / (r2 + floor**2),
        "weight-gradient": (g * theta).abs(),
        "agreement": g.abs() / g2.sqrt(),
    }
    assert set(expected) == set(RULES) == set(NAMES)
    for rule, value in expected.items():
        found = scores(statistics, rule, weights).values
        assert torch.allclose(torch.cat([v.flatten() for v in found.values()]), value, rtol=1e-5), (
            rule
        )


@pytest.mark.parametrize("rule", ["benefit", "fisher-ratio"])
@pytest.mark.parametrize("costly", [0, 3])
def test_weights_without_any_gradient_rank_last_however_many_they_are(rule, costly):
    """Of a table of embeddings, most rows are of tokens that no prompt holds."""
    gain, cost = torch.zeros(100), torch.zeros(100)
    gain[[5, 20, 40, 60]] = torch.tensor([1e-12, 1e-9, 1e-10, 1e-11])
    cost[[20, 40, 70][:costly]] = 1e-16
    squares = {"objective.square": {"a": gain.square()}, "retain.square": {"a": cost}}
    found = scores(Statistics({"objective.sum": {"a": gain}, **squares}), rule)
    assert found.values["a"].isfinite().all()
    assert found.cut(0.04)["a"].nonzero()[:, 0].tolist() == [5, 20, 40, 60]


def test_the_kth_largest_is_exact():
    values = {"a": torch.rand(1000), "b": torch.rand(77)}
    ordered = torch.cat(list(values.values())).sort(descending=True).values
    for count in (1, 2, 500, 1077):
        assert kth_largest(values, count) == ordered[count - 1]


@pytest.mark.parametrize("rule", [*NAMES, *CONTROLS])
def test_every_rule_masks_a_salun(task, rule, tmp_path):
    """Exactly the density changes, at most; a stopped run finds its statistics again."""
    density = 0.1
    config = replace(CONFIG, mask=replace(CONFIG.mask, rule=rule, density=density))
    task.folder = tmp_path
    found = get_method("salun").edit(task, config)
    base = task.weights("full")
    changed = sum(int((value != base[name]).sum()) for name, value in found.values.items())
    total = sum(param.numel() for param in base.values())
    if rule == "none":
        assert found.mask is None and changed > 0.9 * total
        return
    kept = total - int(density * total) if rule == "inverted" else int(density * total)
    assert found.mask.count() == kept and 0 < changed <= kept
    again = choose_mask(task, config)  # no objective: from the file, where there must be one
    assert again.sha256 == found.mask.sha256
    assert (tmp_path / "saliency.safetensors").exists() == (rule != "random")


def test_a_matched_random_mask_lies_where_its_rule_lies(task):
    benefit, matched = (
        choose_mask(
            task,
            replace(CONFIG, mask=replace(CONFIG.mask, rule=rule, density=0.05)),
            objective_of(task),
        )
        for rule in ("benefit", "matched-random")
    )
    assert all(benefit[name].sum() == matched[name].sum() for name in benefit.bits)
    assert benefit.sha256 != matched.sha256


def test_statistics_of_one_run_are_cut_by_any_rule_they_hold(task, tmp_path):
    compute_statistics(task, CONFIG, ALL, objective_of(task)).save(tmp_path / "s.safetensors")
    for rule in ("remap", "benefit", "agreement"):
        mask = replace(
            CONFIG.mask, rule=rule, density=0.2, saliency=str(tmp_path / "s.safetensors")
        )
        given = choose_mask(task, replace(CONFIG, mask=mask))
        own = choose_mask(
            task, replace(CONFIG, mask=replace(mask, saliency=None)), objective_of(task)
        )
        assert given.sha256 == own.sha256
    mask = MaskConfig(rule="forget", saliency=str(tmp_path / "s.safetensors"))
    with pytest.raises(
        ErasureError, match="mask.rule forget needs the statistics forget.sum, which are not among"
    ):
        choose_mask(task, replace(CONFIG, mask=mask))


def test_of_statistics_of_a_wider_scope_those_of_the_run_count(task, tmp_path):
    path = tmp_path / "s.safetensors"
    compute_statistics(task, CONFIG, ALL, objective_of(task)).save(path)
    xattn = task.weights("xattn")
    total = sum(weight.numel() for weight in xattn.values())
    for rule in ("benefit", "weight-gradient"):
        mask = replace(CONFIG.mask, rule=rule, density=0.1, saliency=str(path))
        found = choose_mask(task, replace(CONFIG, scope="xattn", mask=mask))
        assert list(found.bits) == list(xattn) and found.count() == int(0.1 * total)
        assert found.metadata["scope"] == "xattn"
    with pytest.raises(ErasureError, match=r"does not cover text_encoder\..* of scope"):
        choose_mask(task, replace(CONFIG, scope="text_encoder", mask=mask))


def test_statistics_of_another_objective_are_not_gone_on_with(task, tmp_path):
    task.folder = tmp_path
    mask = replace(CONFIG.mask, rule="benefit")
    choose_mask(task, replace(CONFIG, mask=mask), objective_of(task))
    for change in ({"alpha": 0.5}, {"mask": replace(mask, batches=4)}, {"scope": "xattn"}):
        with pytest.raises(ErasureError, match=r"saliency\.safetensors is of another run"):
            choose_mask(task, replace(CONFIG, **{"mask": mask, **change}), objective_of(task))


def test_statistics_survive_the_disk_in_order(tmp_path):
    statistics, weights = made()
    statistics.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    assert loaded.metadata == statistics.metadata
    for rule in RULES:
        one, other = (scores(each, rule, weights).cut(0.3) for each in (statistics, loaded))
        assert isinstance(one, SaliencyMask) and one.sha256 == other.sha256
        assert list(one.bits) == list(other.bits)


def test_the_papers_saliency_needs_no_objective(task):
    found = compute_saliency(task, CONFIG)
    assert (
        found.metadata["rule"] == "forget" and found.metadata["loss"] == "forgetting, guidance 7.5"
    )


# ---- overlap of what is forgotten and what is retained -------------------------------------------


def test_the_overlap_is_intersection_over_union():
    ones = {"a": torch.tensor([4.0, 3.0, -2.0, 1.0])}
    for retain, expected in (([4.0, 3.0, 2.0, 1.0], 1.0), ([1.0, 4.0, 2.0, 3.0], 1 / 3)):
        squares = {"a": torch.tensor(retain)}
        statistics = Statistics({"objective.sum": ones, "retain.square": squares})
        assert overlap(statistics, 0.5) == pytest.approx(expected)
    assert overlap(Statistics({"objective.sum": ones}), 0.5) is None


def test_random_statistics_overlap_as_chance_says():
    generator = torch.Generator().manual_seed(0)
    draws = [{"a": torch.rand(100_000, generator=generator)} for _ in range(2)]
    statistics = Statistics({"objective.sum": draws[0], "retain.square": draws[1]})
    assert overlap(statistics, 0.1) == pytest.approx(0.1 / 1.9, abs=0.005)


def test_a_mask_tells_its_overlap(task):
    mask = replace(CONFIG.mask, rule="benefit", density=0.2)
    chosen = choose_mask(task, replace(CONFIG, mask=mask), objective_of(task))
    assert 0 <= float(chosen.metadata["overlap"]) <= 1
    assert "overlap" not in choose_mask(task, CONFIG, objective_of(task)).metadata


# ---- how much of the benefit a mask holds, and the density that is found by it -------------------


def flat(values):
    return torch.cat([value.flatten() for value in values.values()])


def test_the_share_held_is_that_of_the_squared_benefit():
    statistics, _ = made()
    benefit = scores(statistics, "benefit")
    gain = flat({name: benefit.values[name] for name in benefit.values}).double().square()
    for density in (0.05, 0.5):
        mask = scores(statistics, "remap").cut(density)
        inside = flat({name: mask[name] for name in mask.bits})
        assert held(statistics, mask) == pytest.approx(float(gain[inside].sum() / gain.sum()))
    assert held(statistics, benefit.cut(1.0)) == pytest.approx(1.0)


def test_no_mask_of_the_same_size_holds_more_than_the_rule_benefit():
    statistics, weights = made()
    best = held(statistics, scores(statistics, "benefit").cut(0.1))
    for rule in RULES:
        assert held(statistics, scores(statistics, rule, weights).cut(0.1)) <= best + 1e-12


def test_the_density_found_is_the_first_that_holds_enough():
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(20_000, generator=generator)
    for power in (1, 3, 9):
        values = {"a": draw.sign() * draw.abs() ** power}
        statistics = Statistics(
            {"objective.sum": values, "retain.square": {"a": draw.new_ones(20_000)}}
        )
        shares = [held(statistics, scores(statistics, "benefit").cut(d)) for d in LADDER]
        expected = next((d for d, s in zip(LADDER, shares, strict=True) if s >= ENOUGH), LADDER[-1])
        assert find_density(statistics) == expected
    assert find_density(statistics) < LADDER[-1]


def test_a_density_can_be_found_while_erasing(task):
    mask = replace(CONFIG.mask, rule="benefit", density="auto")
    config, objective = replace(CONFIG, mask=mask), objective_of(task)
    chosen = choose_mask(task, config, objective)
    statistics = compute_statistics(task, config, RULES["benefit"].needs, objective)
    assert float(chosen.metadata["density"]) == find_density(statistics)
    assert get_method("salun").edit(task, config).mask.sha256 == chosen.sha256


def test_auto_is_refused_for_rules_that_weigh_nothing():
    with pytest.raises(ErasureError, match="mask.rule forget does not look at both; take benefit"):
        MaskConfig(rule="forget", density="auto")
    with pytest.raises(ErasureError, match="must be a fraction"):
        MaskConfig(density="automatic")


def test_the_complement_of_everything_is_refused():
    with pytest.raises(ErasureError, match="mask.density 1 leaves nothing out; use a lower"):
        MaskConfig(rule="inverted", density=1.0)
    with pytest.raises(ErasureError, match="mask.rule is remap; leave mask.like out"):
        MaskConfig(rule="remap", like="forget")
