"""Freezes: the manifest, relearning under one, and FreezeAsGuard's choice against its equation."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

from erase.attacks.relearning import relearn
from erase.delta import ErasedDelta
from erase.eval.case import Case
from erase.eval.evaluators import relearning
from erase.eval.report.conclusion import states
from erase.eval.scores import proportion
from erase.latents.latent_set import Given, LatentSet
from erase.models import Cond, load_model
from erase.prompts.canvas import canvas_concept
from erase.prompts.errors import ErasureError
from erase.run import EraseConfig, erase_concept
from erase.scripts import run_freeze
from erase.scripts.canvas.freezing import table
from erase.scripts.cli import run
from erase.task import Task
from erase.training.batches import row_batches
from erase.training.config import TrainConfig, TunedConfig
from erase.training.freeze import Freeze
from erase.training.freezing import FreezeConfig, _Learner, fill, find_freeze, soft_mask
from tests.test_clients import BLOCK, ROOT, moved
from tests.test_relearning import (  # noqa: F401  # fixtures
    CONCEPT,
    SMALL,
    case,
    latents,
    model,
    same,
    weights,
)
from tests.test_report_verdict import told

TUNED = TunedConfig(train=TrainConfig(lr=1e-3, batch_size=2))
SHORT = FreezeConfig(rounds=2, steps=3, lr=1e-3, batch_size=2)


def freeze_of(model, names):  # noqa: F811
    params = model.parameters()
    return Freeze({name: tuple(params[name].shape) for name in names}, model.fingerprint)


def every_second(model):  # noqa: F811
    return list(model.parameters("unet"))[::2]


def task_of(model, latents, seed=0):  # noqa: F811
    return Task(model, [CONCEPT], Given(latents, latents), seed)


# ---- the manifest --------------------------------------------------------------------------------


def test_what_is_written_is_read(model, tmp_path):  # noqa: F811
    freeze = replace(freeze_of(model, every_second(model)), made={"ratio": 0.5, "seed": 3})
    freeze.save(tmp_path / "freeze.json")
    read = Freeze.load(tmp_path / "freeze.json")
    assert read == freeze and read.sha256 == freeze.sha256
    assert list(read.shapes) == list(freeze.shapes)
    read.check(model)
    assert replace(read, fingerprint="other").sha256 != read.sha256


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fingerprint": "0" * 64}, "is for another model"),
        ({"frozen": {"unet.conv_in.weigth": [16, 4, 3, 3]}}, "did you mean 'unet.conv_in.weight'"),
        ({"frozen": {"unet.conv_in.weight": [16, 4, 3]}}, r"has the shape \(16, 4, 3\), but"),
        ({"frozen": {"unet.conv_in.weight": [16, True]}}, "is damaged"),
        ({"frozen": {}}, "names no model or no tensors"),
        ({"frozen": ["unet.conv_in.weight"]}, "is damaged"),
        ({"made": None}, "is damaged"),
        ({"format": "mask"}, "is not a freeze"),
    ],
)
def test_another_s_or_a_damaged_manifest_is_refused(model, tmp_path, change, said):  # noqa: F811
    path = tmp_path / "freeze.json"
    freeze_of(model, ["unet.conv_in.weight"]).save(path)
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8"
    )
    with pytest.raises(ErasureError, match=said):
        Freeze.load(path).check(model)


def test_what_is_no_json_is_refused(tmp_path):
    path = tmp_path / "freeze.json"
    for text in ("", "{", "[" * 100_000, "[]"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ErasureError, match=r"make it again with erase-freeze"):
            Freeze.load(path)
    with pytest.raises(ErasureError, match="cannot read"):
        Freeze.load(tmp_path / "none.json")


# ---- relearning under a freeze -------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("optimizer", ["Adam", "AdamW"])
def test_frozen_tensors_keep_their_bits_and_the_others_move(model, latents, rank, optimizer):  # noqa: F811
    before, frozen = weights(model), every_second(model)
    arguments = {"weight_decay": 0.1} if optimizer == "AdamW" else {}
    train = replace(TUNED.train, optimizer=optimizer, optimizer_args=arguments)
    config = replace(TUNED, lora_rank=rank, train=train)
    ((_, after),) = relearn(model, [CONCEPT], latents, config, [2], freeze=freeze_of(model, frozen))
    assert all(torch.equal(after[name], before[name]) for name in frozen if name in after)
    trained = [name for name in model.parameters("unet") if name not in frozen and name in after]
    moved = [name for name in trained if not torch.equal(after[name], before[name])]
    assert moved == [name for name in trained if before[name].dim() > 1 or not rank]
    assert same(weights(model), before)


def test_it_is_training_of_a_scope_without_them(model, latents):  # noqa: F811
    frozen = [name for name in model.parameters("unet") if ".attn" in name]
    freeze = freeze_of(model, frozen)
    ((_, under),) = relearn(model, [CONCEPT], latents, TUNED, [3], freeze=freeze)
    scope = replace(TUNED, scope=r"^unet\.(?!.*\.attn)")
    ((_, within),) = relearn(model, [CONCEPT], latents, scope, [3])
    assert all(torch.equal(under[name], value) for name, value in within.items())


def test_a_freeze_of_all_that_is_trained_is_refused(model, latents):  # noqa: F811
    matrices = [name for name, p in model.parameters("unet").items() if p.dim() > 1]
    freeze = freeze_of(model, matrices)
    next(relearn(model, [CONCEPT], latents, TUNED, [1], freeze=freeze))
    with pytest.raises(ErasureError, match=f"freezes all of the {len(matrices)} tensors"):
        next(relearn(model, [CONCEPT], latents, replace(TUNED, lora_rank=2), [1], freeze=freeze))


# ---- the evaluator and the report ----------------------------------------------------------------


def test_the_evaluator_freezes_both_rows_and_says_so(case, model, tmp_path, monkeypatch):  # noqa: F811
    frozen, before = every_second(model), weights(model)
    freeze_of(model, frozen).save(tmp_path / "freeze.json")
    config = replace(SMALL, kinds=["full"], images=[2], freeze=str(tmp_path / "freeze.json"))
    moved, shown = [], relearning.Attempts.shown

    def look(self, current, **named):
        moved.append({n for n, p in current.parameters().items() if not torch.equal(p, before[n])})
        return shown(self, current, **named)

    monkeypatch.setattr(relearning.Attempts, "shown", look)
    relearning.check(case, config)
    names = [score.name for score in relearning.evaluate(case, config)]
    assert names[1] == f"UA after 1 steps (full, 2 images, {len(frozen)} tensors frozen)"
    assert not moved[0] and moved[1] and all(found.isdisjoint(frozen) for found in moved)
    assert case.extras["relearning"][0]["frozen"] == len(frozen)

    moved.clear()  # what was found under a freeze is kept apart from what was found without
    again = Case(case.images, [CONCEPT], base=model, folder=case.folder)
    relearning.evaluate(again, replace(config, freeze=None))
    assert not moved[1].isdisjoint(frozen)


def test_a_freeze_of_another_model_is_refused_before_any_work(case, model, tmp_path):  # noqa: F811
    freeze_of(model, every_second(model)).save(tmp_path / "base.json")
    config = replace(SMALL, freeze=str(tmp_path / "base.json"))
    values = {name: 2 * value for name, value in weights(model).items()}
    metadata = {"base_fingerprint": model.fingerprint}
    delta = ErasedDelta.between(model.parameters(), values, metadata)
    erased = Case(case.images, [CONCEPT], base=model, delta=delta)
    with pytest.raises(ErasureError, match=r"base\.json is for another model"):
        relearning.check(erased, config)
    with delta.applied(model):
        freeze_of(model, every_second(model)).save(tmp_path / "base.json")
    relearning.check(erased, config)
    relearning.check(Case(case.images, [CONCEPT], base=model), config)  # the control's row


def test_the_verdict_does_not_take_a_freeze_for_a_property_of_the_weights():

    def verdict(left, about):
        name = f"UA after 50 steps ({about})"
        (found,) = [
            state
            for state in states(told([proportion(name, left, 16)], [proportion(name, 2, 16)]))
            if state.question == "Relearning"
        ]
        return found

    assert verdict(16, "full, 16 images").word == "robust"
    found = verdict(16, "full, 16 images, 65 tensors frozen")
    assert (found.word, found.tone) == ("conditional", "unknown")
    assert "where 65 tensors are frozen" in found.said
    assert verdict(0, "full, 16 images, 65 tensors frozen").word == "broken"


# ---- the choice ----------------------------------------------------------------------------------


def test_the_soft_mask_meets_its_budget_and_is_a_logistic_of_the_scores():
    draw = torch.Generator().manual_seed(0)
    for spread in (1e-6, 1.0, 1e4):
        values = (spread * torch.randn(50, generator=draw, dtype=torch.float64)).tolist()
        scores = {str(place): value for place, value in enumerate(values)}
        costs = dict(
            zip(scores, torch.randint(1, 10_000, (50,), generator=draw).tolist(), strict=True)
        )
        for ratio in (0.01, 0.2, 0.9):
            found = soft_mask(scores, costs, ratio)
            mean = sum(costs[name] * m for name, m in found.items()) / sum(costs.values())
            assert mean == pytest.approx(ratio, abs=1e-6)
            ranked = sorted(scores, key=scores.get)
            assert all(found[a] <= found[b] for a, b in zip(ranked, ranked[1:], strict=False))
    found = soft_mask({"a": 0.3, "b": -0.1, "c": 0.0}, {"a": 1, "b": 5, "c": 2}, 0.4)
    logit = {name: math.log(m / (1 - m)) for name, m in found.items()}
    assert 0.2 * (logit["a"] - logit["b"]) == pytest.approx(0.4)  # tau = 0.2


def test_the_best_are_filled_in_as_long_as_they_fit():
    scores = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 2.0, "e": 0.0}
    ones = dict.fromkeys(scores, 1)
    assert fill(scores, ones, 0.6) == {"b", "c", "d"}  # floor(0.6 * 5), ties in order
    assert fill(scores, ones, 0.59) == {"b", "c"}
    costs = {"a": 1, "b": 4, "c": 4, "d": 1, "e": 10}
    assert fill(scores, costs, 0.3) == {"b", "d", "a"}  # of 6: 4, not another 4, 1, 1
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        sizes = torch.randint(1, 1000, (30,), generator=draw).tolist()
        costs = {str(i): size for i, size in enumerate(sizes)}
        order = dict(zip(costs, torch.rand(30, generator=draw).tolist(), strict=True))
        taken = fill(order, costs, 0.4)
        room = math.floor(0.4 * sum(sizes)) - sum(costs[name] for name in taken)
        assert 0 <= room < min((costs[n] for n in costs if n not in taken), default=1)


def test_the_slope_is_the_gradient_of_the_loss_in_m(model, latents):  # noqa: F811
    """d L(m theta_0 + (1 - m) theta_user) / d m by autograd, after each of Adam's steps."""
    task, params = task_of(model, latents), model.parameters("unet")
    costs = {name: param.numel() for name, param in params.items()}
    draw = torch.Generator().manual_seed(1)
    mask = dict(
        zip(params, (0.1 + 0.8 * torch.rand(len(params), generator=draw)).tolist(), strict=True)
    )
    batches = row_batches(task, latents, 2)
    before = weights(model)
    found = _Learner(task, SHORT, params, costs).slopes(batches, mask, 5)
    assert same(weights(model), before)

    unet, base = model.component("unet"), {n: p.detach().clone() for n, p in params.items()}
    user = {name: value.clone().requires_grad_() for name, value in base.items()}
    adam, sums = torch.optim.Adam(user.values(), lr=SHORT.lr), dict.fromkeys(params, 0.0)
    for step in range(5, 8):
        m = {name: torch.tensor(mask[name], requires_grad=True) for name in params}
        theta = {name: m[name] * base[name] + (1 - m[name]) * user[name] for name in params}
        rows, prompts = batches(step)
        inputs = (rows.noisy, rows.t, task.cond(prompts).embeddings)
        held = {name.removeprefix("unet."): value for name, value in theta.items()}
        loss = (functional_call(unet, held, inputs).sample - rows.target).square().mean()
        slopes = torch.autograd.grad(loss, [*m.values(), *user.values()])
        for name, slope in zip(params, slopes, strict=False):
            sums[name] += float(slope) / 3
        for value, gradient in zip(user.values(), slopes[len(params) :], strict=True):
            value.grad = gradient
        adam.step()
    largest = max(map(abs, sums.values()))
    assert largest > 0
    # Adam turns a gradient near 0 into a step of either sign, so a few entries may differ a little
    assert all(found[name] == pytest.approx(sums[name], abs=0.01 * largest) for name in params)


class Stub:
    """A denoiser of three numbers: `concept` answers prompts with a heart, `innocent` those
    without, `idle` none."""

    fingerprint, timesteps, device = "stub", 10, torch.device("cpu")

    def __init__(self):
        names = ("unet.concept", "unet.innocent", "unet.idle")
        self.params = {name: torch.nn.Parameter(torch.zeros(1)) for name in names}

    def parameters(self, component=None):
        return self.params

    def encode(self, prompts, prefix=None):
        return Cond(torch.tensor([[[float("heart" in prompt)]] for prompt in prompts]))

    def add_noise(self, x0, noise, t):
        return noise

    def target(self, x0, noise, t):
        return noise

    def predict(self, xt, t, cond):
        named = cond.embeddings[..., None]
        concept, innocent, _ = self.params.values()
        return xt * (concept * named + innocent * (1 - named))


def test_the_tensor_that_only_the_concept_needs_is_frozen():
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(4, 1, 4, 4, generator=draw)
    sets = Given(LatentSet(values, None, ("a heart",) * 4), LatentSet(values, None, ("a sun",) * 4))
    for seed in range(3):
        stub = Stub()
        task = Task(stub, [CONCEPT], sets, seed)
        found = find_freeze(task, replace(SHORT, ratio=0.34, of="tensors"))
        assert list(found.shapes) == ["unet.concept"]
        found = find_freeze(task, replace(SHORT, ratio=0.67, of="tensors"))
        assert set(found.shapes) == {"unet.concept", "unet.idle"}
        assert not any(param.any() for param in stub.params.values())


@pytest.mark.parametrize("of", ["parameters", "tensors"])
@pytest.mark.parametrize("rule", ["learned", "random"])
def test_the_size_is_the_ratio_and_the_model_stays_as_it_was(model, latents, rule, of):  # noqa: F811
    before, config = weights(model), replace(SHORT, rule=rule, ratio=0.4, of=of)
    found = find_freeze(task_of(model, latents), config)
    sizes = {name: param.numel() for name, param in model.parameters("unet").items()}
    if of == "tensors":
        assert len(found.shapes) == math.floor(0.4 * len(sizes))
    else:
        left = min(size for name, size in sizes.items() if name not in found.shapes)
        assert 0 <= math.floor(0.4 * sum(sizes.values())) - found.count < left
    assert find_freeze(task_of(model, latents), config) == found, "bit-equal when repeated"
    other = find_freeze(task_of(model, latents, seed=1), config)
    assert other.shapes != found.shapes or rule == "learned"
    assert same(weights(model), before)
    assert not any(param.requires_grad for param in model.parameters().values())
    assert found.made["seed"] == 0 and found.made["rule"] == rule
    found.check(model)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ratio": 1.0}, "ratio is 1.0"),
        ({"ratio": 0.0}, "ratio is 0.0"),
        ({"rule": "lerned"}, "did you mean 'learned'"),
        ({"of": "weights"}, "unknown of 'weights'"),
        ({"steps": 1}, "steps is 1; it must be 2 or more"),
    ],
)
def test_an_impossible_choice_is_refused(settings, said):
    with pytest.raises(ErasureError, match=said):
        FreezeConfig(**settings)


def test_a_ratio_that_freezes_nothing_and_a_loss_that_breaks_are_refused(model, latents):  # noqa: F811
    task = task_of(model, latents)
    little = replace(SHORT, rule="random", ratio=0.001, of="tensors")
    with pytest.raises(ErasureError, match="freezes none of the"):
        find_freeze(task, little)
    before = weights(model)
    with pytest.raises(ErasureError, match="the loss of a simulated user is"):
        find_freeze(task, replace(SHORT, lr=1e30))
    assert same(weights(model), before)


@pytest.mark.slow
def test_the_command_writes_a_freeze_of_the_erased_model(tmp_path, capsys):
    delta = erase_concept(canvas_concept("heart"), EraseConfig(method="uce"), out=tmp_path)
    erased = delta.inverse(load_model("canvas")).metadata["base_fingerprint"]
    flags = ["--delta", str(tmp_path), "--scope", "xattn_kv", "--ratio", "0.3"]
    few = "--latents.n_forget 2 --latents.n_retain 2 --latents.steps 1 --rounds 1 --steps 2".split()
    for rule in ("random", "learned"):
        out = tmp_path / f"{rule}.json"
        assert run(run_freeze.main, [*flags, *few, "--rule", rule, "--out", str(out)]) == 0
        assert "it binds whoever honours it" in capsys.readouterr().out
        found = Freeze.load(out)
        assert found.fingerprint == erased
        assert found.made["concepts"] == ["heart"] and found.made["rule"] == rule
    assert run(run_freeze.main, [*flags, "--out", str(tmp_path / "x.yaml")]) == 2
    assert "name a .json file" in capsys.readouterr().err


def test_a_file_that_is_there_is_not_overwritten_and_a_folder_gets_a_name(tmp_path, capsys):
    (tmp_path / "freeze.json").write_text("mine")
    for out, said in (
        (f"{tmp_path}/freeze.json", "freeze.json exists already"),
        (f"{tmp_path}/", f"e.g. {tmp_path}/freeze.json"),
        (f"{tmp_path}/x", f"e.g. {tmp_path}/x.json"),
    ):
        assert run(run_freeze.main, ["--delta", "D", "--out", out]) == 2
        assert said in capsys.readouterr().err
    assert (tmp_path / "freeze.json").read_text() == "mine"


def test_the_code_of_its_page_runs_as_it_stands(tmp_path, monkeypatch):
    model = load_model("canvas")  # noqa: F811
    delta = moved(model, "unet.mid_block")
    (tmp_path / "runs/heart").mkdir(parents=True)
    delta.save(tmp_path / "runs/heart/delta.safetensors")
    with delta.applied(model):
        freeze_of(model, every_second(model)).save(tmp_path / "runs/heart/freeze.json")
    (code,) = BLOCK.findall((ROOT / "docs/freezing.md").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    made = {}
    exec(compile(code, "freezing.md", "exec"), made)
    assert len(made["trained"]) == len(model.parameters()) - len(every_second(model))


def test_the_table_has_a_line_for_each_kind_and_the_range_of_its_draws():
    facts = {"tensors": 80, "share": 0.2, "n": 24, "innocent": 0.025}
    rows = [
        {"freeze": "none", **facts, "tensors": 0, "share": 0, "forgotten": {"10": 24, "50": 6}},
        {"freeze": "random 0.2 0", **facts, "forgotten": {"10": 24, "50": 6}},
        {"freeze": "random 0.2 1", **facts, "tensors": 90, "forgotten": {"10": 24, "50": 12}},
    ]
    assert table(rows).splitlines()[2:] == [
        "| none | 0 | 0 | 100 | 25 | 25.0 |",
        "| random 0.2 | 80 to 90 | 20 | 100 | 25 to 50 | 25.0 |",
    ]
