"""Options of every method that takes gradient steps: each has its theorem, and is a no-op, bit for
bit, where it is off."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from erase.mask import SaliencyMask
from erase.parallel.layout import ActiveWeights, Layout
from erase.prompts.errors import ErasureError
from erase.training.checkpoint import Checkpoint
from erase.training.config import TrainConfig, TunedConfig
from erase.training.confine import confined, drawn_back, null_space, second_moment, spectrum
from erase.training.gradients import behind_barrier, moved, restrain, soften, without_conflict
from erase.training.loop import fit
from erase.training.trainable import Trainable

SGD = TrainConfig(steps=1, lr=0.5, batch_size=4, optimizer="SGD")
PLAIN = TunedConfig(train=SGD)


@pytest.fixture
def params():
    """No diffusion model: any parameters train through the same loop."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (6, 5), "a.bias": (6,), "b.weight": (3, 6)}
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator), requires_grad=False)
        for name, shape in shapes.items()
    }


INPUTS = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


def network(params, x):
    return torch.tanh(x @ params["a.weight"].T + params["a.bias"]) @ params["b.weight"].T


def loss_of(params):
    """Two terms that disagree."""

    def loss(x, base):
        found = network(params, x)
        return {"forget": (found - 1).square().mean(), "retain": 0.7 * (found + 2).square().mean()}

    return loss


def train(params, config, mask=None, **further):
    return fit(params, loss_of(params), lambda step: INPUTS, config, mask, **further)


def gradients(params, *names, at=None):
    """Gradients of some terms by plain autograd, at these values or at the parameters'."""
    values = {k: (at or params)[k].detach().clone().requires_grad_(True) for k in params}
    terms = loss_of(values)(INPUTS, None)
    total = sum(terms[name] for name in names)
    return dict(zip(values, torch.autograd.grad(total, list(values.values())), strict=True))


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in other)


def whole(x):
    return x


# ---- gradient surgery ----------------------------------------------------------------------------


def test_surgery_leaves_of_the_forget_gradient_what_is_orthogonal_to_the_retain_gradient(params):
    forget, retain = gradients(params, "forget"), gradients(params, "retain")
    both = {name: forget[name] + retain[name] for name in params}
    conflicts = [name for name in params if (forget[name] * retain[name]).sum() < 0]
    assert 0 < len(conflicts) < len(params)

    kept = without_conflict(both, retain, whole)
    assert all(torch.equal(kept[name], both[name]) for name in params if name not in conflicts)
    for name in conflicts:
        left = kept[name] - retain[name]
        assert abs((left * retain[name]).sum()) < 1e-5 * left.norm() * retain[name].norm()
        apart = left - forget[name]  # along the retain gradient alone
        assert torch.allclose(
            apart,
            (apart * retain[name]).sum() / retain[name].square().sum() * retain[name],
            atol=1e-6,
        )


def test_surgery_without_conflict_changes_no_bit(params):
    retain = gradients(params, "retain")
    both = {name: 3 * gradient for name, gradient in retain.items()}
    assert equal(without_conflict(both, retain, whole), both)
    assert equal(without_conflict(both, {}, whole), both)


def test_a_step_with_surgery_is_the_literal_one(params):
    fitted = train(params, replace(PLAIN, combine="surgery")).values
    forget, retain = gradients(params, "forget"), gradients(params, "retain")
    for name, param in params.items():
        f, r = forget[name], retain[name]
        f = f - min((f * r).sum() / (r * r).sum(), torch.zeros(())) * r
        assert torch.allclose(fitted[name], param - 0.5 * (f + r), atol=1e-6)


# ---- dynamic barrier -----------------------------------------------------------------------------


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


@pytest.mark.parametrize("rate", [0.0, 0.5, 3.0])
def test_behind_the_barrier_is_the_nearest_direction_along_which_forgetting_falls(params, rate):
    """The two conflict: the constraint is tight, and what is added to the retain gradient points
    along the forget gradient alone."""
    forget, retain = gradients(params, "forget"), gradients(params, "retain")
    f, r = flat(forget), flat(retain)
    mirrored = 2 * float(f @ r / (f @ f))
    retain = {name: retain[name] - mirrored * forget[name] for name in params}
    r = flat(retain)
    assert f @ r < 0
    found = flat(behind_barrier(forget, retain, rate, whole))
    assert f @ found == pytest.approx(float(rate * f @ f), rel=1e-5, abs=1e-6)
    added = found - r
    assert torch.allclose(added, (added @ f) / (f @ f) * f, atol=1e-6)


def test_where_forgetting_falls_by_itself_the_barrier_adds_nothing(params):
    retain = gradients(params, "retain")
    forget = {name: 0.5 * gradient for name, gradient in retain.items()}
    assert equal(behind_barrier(forget, retain, 1.9, whole), retain)
    assert equal(behind_barrier({}, retain, 1.0, whole), retain)
    assert equal(behind_barrier({n: 0 * g for n, g in retain.items()}, retain, 1.0, whole), retain)


def test_a_step_behind_the_barrier_is_the_literal_one(params):
    fitted = train(params, replace(PLAIN, combine="barrier", barrier=4.0))
    forget, retain = gradients(params, "forget"), gradients(params, "retain")
    f, r = flat(forget), flat(retain)
    factor = 4.0 - float(f @ r / (f @ f))
    assert factor > 0
    for name, param in params.items():
        expected = param - 0.5 * (retain[name] + factor * forget[name])
        assert torch.allclose(fitted.values[name], expected, atol=1e-6)
    terms = loss_of(params)(INPUTS, None)
    assert fitted.losses[0] == pytest.approx(float(sum(terms.values())), rel=1e-6)


def test_a_guarded_step_is_the_literal_one(params):
    """Where the sum would make the forget loss rise, what does so is removed; else it stays."""
    for weight in (0.1, -5.0):
        loss = loss_of(params)

        def scaled(x, base, loss=loss, weight=weight):
            terms = loss(x, base)
            return {"forget": terms["forget"], "retain": weight * terms["retain"]}

        config = replace(PLAIN, combine="guard")
        fitted = fit(params, scaled, lambda step: INPUTS, config).values
        forget, retain = gradients(params, "forget"), gradients(params, "retain")
        whole_step = {n: forget[n] + weight * retain[n] for n in params}
        f, s = flat(forget), flat(whole_step)
        factor = max(0.0, -float(f @ s / (f @ f)))
        assert (factor > 0) == (weight < 0)
        for name, param in params.items():
            expected = param - 0.5 * (whole_step[name] + factor * forget[name])
            assert torch.allclose(fitted[name], expected, atol=1e-5)


# ---- sharpness-aware minimisation and smoothing --------------------------------------------------


def test_sam_takes_the_forget_gradient_uphill(params):
    fitted = train(params, replace(PLAIN, sam=0.3)).values
    forget, retain = gradients(params, "forget"), gradients(params, "retain")
    norm = sum(g.square().sum() for g in forget.values()).sqrt()
    uphill = {name: params[name] + 0.3 * forget[name] / norm for name in params}
    there = gradients(params, "forget", at=uphill)
    for name, param in params.items():
        assert torch.allclose(fitted[name], param - 0.5 * (there[name] + retain[name]), atol=1e-6)


def test_smoothing_averages_over_displacements_that_the_seed_fixes(params):
    config = replace(PLAIN, smoothing=0.2, smoothing_draws=2)
    one, other = train(params, config, seed=3).values, train(params, config, seed=3).values
    assert equal(one, other)
    assert not equal(one, train(params, config, seed=4).values)

    generator = torch.Generator().manual_seed(~(3 * 1_000_003))
    drawn = [
        {
            name: param + 0.2 * torch.randn(param.shape, generator=generator)
            for name, param in params.items()
        }
        for _ in range(2)
    ]
    found = [gradients(params, "forget", at=at) for at in drawn]
    retain = gradients(params, "retain")
    for name, param in params.items():
        mean = (found[0][name] + found[1][name]) / 2
        assert torch.allclose(one[name], param - 0.5 * (mean + retain[name]), atol=1e-6)


def test_displaced_values_come_back_to_the_bit_also_after_an_error(params):
    mask = SaliencyMask.random(params, 0.5, 0)
    trainable = Trainable(params, mask)
    before = {name: param.detach().clone() for name, param in params.items()}
    by = {name: torch.full_like(value, 0.1) for name, value in trainable.values.items()}
    with pytest.raises(KeyboardInterrupt), moved(trainable, by):
        for name, param in params.items():
            assert torch.allclose(param, before[name] + 0.1 * mask[name])
        raise KeyboardInterrupt
    assert equal(params, before)
    trainable.close()


@pytest.mark.parametrize(
    "change",
    [{"sam": 0.0}, {"smoothing": 0.0, "smoothing_draws": 5}, {"prox_l1": 0.0, "prox_l2": 0.0}],
    ids=str,
)
def test_an_option_at_zero_is_no_option_bit_for_bit(params, change):
    config = replace(PLAIN, train=replace(SGD, optimizer="Adam", steps=5))
    plain, other = train(params, config), train(params, replace(config, **change))
    assert plain.losses == other.losses and equal(plain.values, other.values)


# ---- proximal steps ------------------------------------------------------------------------------


@pytest.mark.parametrize("pull", [0.0, 0.4])
def test_the_proximal_step_minimises_what_it_says(params, pull):
    """argmin_z |z - v|^2 / 2 + threshold |z - base|_1 + pull |z - base|^2 / 2, checked against a
    fine grid."""
    trainable = Trainable({"a.weight": params["a.weight"]})
    base = params["a.weight"].detach().clone()
    value = trainable.values["a.weight"]
    change = 0.3 * torch.randn(base.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        value += change
    soften(trainable, 0.1, pull)

    grid = torch.linspace(-2, 2, 40_001)
    cost = (grid[:, None] - change.flatten()).square() / 2 + 0.1 * grid.abs()[:, None]
    cost += pull * grid.square()[:, None] / 2
    best = grid[cost.argmin(0)].view(base.shape)
    assert torch.allclose(value - base, best, atol=2e-4)
    small = change.abs() < 0.0999
    assert torch.equal(value[small], base[small]) and small.any() and not small.all()
    trainable.close()


def test_prox_makes_the_edit_sparse_without_a_mask(params):
    config = replace(PLAIN, train=replace(SGD, steps=20, lr=0.05))
    dense = train(params, config).values
    sparse = train(params, replace(config, prox_l1=0.5)).values
    kept = [
        int((values[name] != params[name]).sum()) for values in (dense, sparse) for name in params
    ]
    assert sum(kept[3:]) < sum(kept[:3]) and sum(kept[3:]) > 0


def test_an_average_is_as_sparse_as_the_last_values(params):
    config = replace(PLAIN, train=replace(SGD, steps=20, lr=0.05), prox_l1=0.5)
    last = train(params, config).values
    mean = train(params, replace(config, train=replace(config.train, ema=0.9))).values
    for name, param in params.items():
        changed = last[name] != param
        assert torch.equal(mean[name] != param, changed)
    assert any(not torch.equal(mean[name], last[name]) for name in params)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_prox_l2_draws_every_step_back_to_the_base(params, optimizer):
    """By hand: the optimizer's own step, then each change over 1 + lr * weight; no momentum of the
    optimizer sees it."""
    config = replace(PLAIN, train=replace(SGD, optimizer=optimizer, lr=0.1, steps=6), prox_l2=3.0)
    hand = {name: param.detach().clone().requires_grad_(True) for name, param in params.items()}
    steps = getattr(torch.optim, optimizer)(hand.values(), lr=0.1)
    for _ in range(6):
        steps.zero_grad()
        sum(loss_of(hand)(INPUTS, None).values()).backward()
        steps.step()
        with torch.no_grad():
            for name, value in hand.items():
                value.copy_(params[name] + (value - params[name]) / 1.3)
    found = train(params, config).values
    assert all(torch.allclose(found[name], hand[name], atol=1e-5) for name in params)


# ---- null spaces ---------------------------------------------------------------------------------

STATES = torch.randn(3, 5, generator=torch.Generator().manual_seed(4))
MOMENT = second_moment(STATES)
SPACE = null_space(MOMENT, 1e-6).float()
SPACES = {"a.weight": partial(confined, SPACE)}


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_a_confined_matrix_answers_as_before_whatever_the_optimizer(params, optimizer):
    """Adam makes steps of another direction than the gradient's: projected gradients would leave
    the space."""
    config = replace(PLAIN, train=replace(SGD, optimizer=optimizer, lr=0.05, steps=8))
    free, held = (train(params, config, restraints=held).values for held in (None, SPACES))
    answers = [STATES @ (values["a.weight"] - params["a.weight"]).T for values in (free, held)]
    assert answers[0].abs().max() > 1e-2 and answers[1].abs().max() < 1e-5
    assert (held["a.weight"] - params["a.weight"]).abs().max() > 1e-2, "it is to learn elsewhere"
    assert not torch.equal(held["b.weight"], params["b.weight"])


def test_a_confined_matrix_stays_inside_its_mask(params):
    mask = SaliencyMask.random(params, 0.6, 0)
    config = replace(PLAIN, train=replace(SGD, lr=0.05))
    held = train(params, config, mask, restraints=SPACES).values["a.weight"]
    step = train(params, config, mask).values["a.weight"] - params["a.weight"]
    wanted = torch.where(mask["a.weight"], step @ SPACE, 0)
    assert torch.allclose(held - params["a.weight"], wanted, atol=1e-6) and wanted.any()
    assert torch.equal(held[~mask["a.weight"]], params["a.weight"][~mask["a.weight"]])


def test_a_step_that_draws_back_minimises_change_and_what_text_states_notice():
    """Against the gradient of the proximal problem itself, and no direction is drawn where the
    states have nothing."""
    change, lr, weight = torch.randn(4, 5, dtype=torch.float64), 0.3, 2.0
    squares, directions = spectrum(MOMENT)
    second = STATES.double().T @ STATES.double()
    second /= second.trace() / len(second)
    found = drawn_back(squares, directions, weight, change, lr).requires_grad_()
    problem = (found - change).square().sum() / 2 + lr * weight * (found @ second * found).sum() / 2
    assert torch.autograd.grad(problem, found)[0].abs().max() < 1e-12
    free = null_space(MOMENT, 1e-6)
    assert torch.allclose(found @ free, change @ free)
    assert (found @ STATES.double().T).norm() < 0.8 * (change @ STATES.double().T).norm()


def test_text_is_drawn_back_after_each_step_by_its_rate(params):
    restraints = {"a.weight": partial(drawn_back, *spectrum(MOMENT), 2.0)}
    config = replace(PLAIN, train=replace(SGD, lr=0.05))
    step = train(params, config).values["a.weight"] - params["a.weight"]
    held = train(params, config, restraints=restraints).values["a.weight"] - params["a.weight"]
    assert torch.allclose(held, drawn_back(*spectrum(MOMENT), 2.0, step, 0.05), atol=1e-6)
    assert not torch.allclose(held, step, atol=1e-4)


@pytest.mark.parametrize("density", [0.6, 1.0])
def test_rows_of_a_matrix_are_drawn_back_as_in_the_whole(params, density):
    """As in each process under FSDP."""

    class Rows(Layout):
        def rows(self, count):
            return slice(2, min(5, count))

        def local(self, tensor):
            return tensor.data[self.rows(len(tensor))]

    mask = SaliencyMask.random(params, density, 0) if density < 1 else None
    step = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    found = []
    for layout in (Layout(), Rows()):
        trainable = Trainable(params, mask, ActiveWeights(params, layout=layout))
        mine, name = layout.local(step), "a.weight"
        trainable.values[name].data += trainable.picked(name, mine)
        restrain(trainable, {name: partial(drawn_back, *spectrum(MOMENT), 2.0)}, 0.3)
        change = trainable.dense(name, trainable.values[name] - trainable.base_values(name))
        found.append(change.detach())
        trainable.close()
    assert torch.allclose(found[0][2:5], found[1], atol=1e-6) and found[1].any()


# ---- LoRA ----------------------------------------------------------------------------------------


def test_a_low_rank_change_has_that_rank_and_vectors_stay(params):
    config = replace(PLAIN, lora_rank=2, train=replace(SGD, optimizer="Adam", lr=1e-2, steps=10))
    fitted = train(params, config)
    for name in ("a.weight", "b.weight"):
        change = fitted.values[name] - params[name]
        assert change.any() and torch.linalg.matrix_rank(change, rtol=1e-4) <= 2
    assert "a.bias" not in fitted.values or torch.equal(fitted.values["a.bias"], params["a.bias"])
    assert fitted.losses[-1] < fitted.losses[0]


def test_factors_get_the_gradient_of_autograd(params):
    """Ten steps of SGD on the factors equal plain autograd through W + up @ down."""
    config = replace(PLAIN, lora_rank=2, train=replace(SGD, lr=0.05, steps=10))
    fitted = train(params, config, seed=5).values

    generator, factors = torch.Generator().manual_seed(5), {}
    for name in ("a.weight", "b.weight"):
        rows, columns = params[name].shape
        down = (2 * torch.rand(2, columns, generator=generator) - 1) / columns**0.5
        factors[name] = [torch.zeros(rows, 2, requires_grad=True), down.requires_grad_(True)]
    for _ in range(10):
        values = dict(params) | {
            name: params[name] + up @ down for name, (up, down) in factors.items()
        }
        sum(loss_of(values)(INPUTS, None).values()).backward()
        with torch.no_grad():
            for factor in (one for pair in factors.values() for one in pair):
                factor -= 0.05 * factor.grad
                factor.grad = None
    for name, (up, down) in factors.items():
        assert torch.allclose(fitted[name], params[name] + up @ down, atol=1e-5)


def test_a_masked_low_rank_change_is_zero_outside_the_mask(params):
    mask = SaliencyMask.random(params, 0.5, 0)
    config = replace(PLAIN, lora_rank=2, train=replace(SGD, lr=0.1, steps=5))
    fitted = train(params, config, mask).values
    for name, value in fitted.items():
        assert torch.equal(value[~mask[name]], params[name][~mask[name]])
        assert name == "a.bias" or (value[mask[name]] != params[name][mask[name]]).all()


def test_too_little_memory_for_the_factors_leaves_the_parameters_as_they_were(params, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    plain = train(params, PLAIN).values
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch, "rand", full)
        train(params, replace(PLAIN, lora_rank=2))
    assert not any(param.requires_grad for param in params.values())
    assert equal(train(params, PLAIN).values, plain), "no hook of the failed run is left"


def test_low_rank_of_vectors_alone_or_in_shards_is_refused(params):
    config = replace(PLAIN, lora_rank=2)
    with pytest.raises(ErasureError, match="factors matrices, of which the scope has none"):
        train({"a.bias": params["a.bias"]}, config)

    class Shards(Layout):
        collective_forward = True

    with pytest.raises(ErasureError, match="lora_rank does not go with FSDP"):
        train(params, config, active=ActiveWeights(params, layout=Shards()))


def test_a_mask_under_which_nothing_may_change_is_refused(params):
    whole = SaliencyMask.whole(params)
    for names, rank, message in (
        ((), 0, "no weight of the scope change"),
        (("a.bias",), 2, "no matrix, which lora_rank factors, change; widen the mask"),
    ):
        with pytest.raises(ErasureError, match=message):
            train(params, replace(PLAIN, lora_rank=rank), whole.within(names))
    assert not any(param.requires_grad for param in params.values())


# ---- all of them ---------------------------------------------------------------------------------

ALL = {
    "surgery": {"combine": "surgery"},
    "guard": {"combine": "guard"},
    "barrier": {"combine": "barrier", "barrier": 0.3},
    "sam": {"sam": 0.1},
    "smoothing": {"smoothing": 0.05},
    "prox": {"prox_l1": 0.01},
    "prox-both": {"prox_l1": 0.01, "prox_l2": 0.5},
    "lora": {"lora_rank": 2},
    "sam-surgery-prox": {"sam": 0.1, "combine": "surgery", "prox_l1": 0.01},
    "sam-barrier": {"sam": 0.1, "combine": "barrier"},
    "lora-smoothing-surgery": {"lora_rank": 2, "smoothing": 0.05, "combine": "surgery"},
}


@pytest.mark.parametrize("change", ALL.values(), ids=ALL)
@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_under_any_option_the_mask_holds_the_base_stays_and_a_resumed_run_is_the_run(
    params, tmp_path, change, optimizer
):
    mask = SaliencyMask.random(params, 0.6, 0)
    before = {name: param.detach().clone() for name, param in params.items()}
    train_config = replace(
        SGD, optimizer=optimizer, lr=0.01, steps=6, checkpoint_every=2, accumulation=2
    )
    config = TunedConfig(train=train_config, **change)
    plain = train(params, config, mask, seed=1)
    moved_some = False
    for name, value in plain.values.items():
        assert torch.equal(value[~mask[name]], before[name][~mask[name]])
        moved_some |= not torch.equal(value, before[name])
    assert moved_some and equal(params, before)

    def batches(step):
        if step == 5 and not resumed:
            raise KeyboardInterrupt
        return INPUTS

    resumed, kept = [], Checkpoint(tmp_path / "training.pt", {})
    with pytest.raises(KeyboardInterrupt):
        fit(params, loss_of(params), batches, config, mask, seed=1, checkpoint=kept)
    resumed.append(1)
    again = fit(params, loss_of(params), batches, config, mask, seed=1, checkpoint=kept)
    assert again.losses == plain.losses and equal(again.values, plain.values)
    assert equal(params, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sam": 0.1, "smoothing": 0.1}, "choose one"),
        ({"prox_l1": 0.1, "lora_rank": 4}, "choose one"),
        ({"prox_l2": 0.1, "lora_rank": 4}, "choose one"),
        ({"confine": 0.1, "lora_rank": 4}, "choose one"),
        ({"confine": 1.5}, "confine is 1.5"),
        ({"confine": 0.1, "prox_text": 1.0}, "choose one"),
        ({"prox_text": 1.0, "lora_rank": 4}, "choose one"),
        ({"prox_text": -1.0}, "prox_text is -1"),
        ({"combine": "sugery"}, "did you mean 'surgery'"),
        ({"combine": "surgery", "sam": -1}, "sam is -1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(change, message):
    with pytest.raises(ErasureError, match=message):
        TunedConfig(**change)


def test_values_to_begin_at_are_begun_at_and_stay_out_of_the_rest(params):
    mask = SaliencyMask.random(params, 0.5, 0)
    start = {name: param + 1 for name, param in params.items()}
    config = replace(PLAIN, train=replace(SGD, lr=1e-30))
    fitted = train(params, config, mask, start=start).values
    for name, value in fitted.items():
        assert torch.allclose(value, params[name] + mask[name].float())


# ---- the rate of each step -----------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_rises_over_the_first_steps_and_then_follows_its_schedule(params, schedule):
    """Under SGD and a loss of slope one every value falls by the sum of the rates."""

    def slope(x, base):
        return {"forget": sum(param.sum() for param in params.values())}

    steps, shares = 8, []
    for step in range(steps):
        falling = {
            "constant": 1.0,
            "linear": 1 - step / steps,
            "cosine": (1 + math.cos(math.pi * step / steps)) / 2,
        }
        shares.append(falling[schedule] * min(1, (step + 1) / 4))
    config = replace(PLAIN, train=replace(SGD, steps=steps, warmup=3, schedule=schedule))
    fitted = fit(params, slope, lambda step: INPUTS, config)
    for name, value in fitted.values.items():
        assert torch.allclose(params[name] - value, torch.tensor(0.5 * sum(shares)), atol=1e-5)
