"""The training loop's guarantees: the mask acts on the update, the base stays, a resumed run is the
run."""

import os
import time
import weakref
from dataclasses import replace

import pytest
import torch

from erase.mask import SaliencyMask
from erase.models.scopes import SCOPES, select
from erase.models.sd import StableDiffusion
from erase.prompts.errors import ErasureError
from erase.tensors import pack
from erase.training.checkpoint import Checkpoint
from erase.training.config import TrainConfig, TunedConfig
from erase.training.loop import fit, make_accelerator
from erase.training.optimizers import make_optimizer
from erase.training.running import running
from erase.training.trainable import Trainable
from tests.launching import PROGRAMS, environment, launch, start

QUICK = TrainConfig(steps=4, lr=1e-3, batch_size=4)


@pytest.fixture
def model(make_pico_pipeline):
    return StableDiffusion(make_pico_pipeline())


def task(model, scope="full"):
    """Parameters, whole batches by step, and a loss that moves every weight."""
    params = select(model.parameters(), scope)
    cond, t = model.encode(["a red heart"] * 4), torch.tensor([10, 300, 600, 990])

    def batches(step):
        generator = torch.Generator().manual_seed(step)
        return torch.randn(4, *model.latent_shape, generator=generator), torch.arange(4)

    def loss(batch, base):
        x, rows = batch
        return {"forget": model.predict(x, t[rows], cond[rows]).square().mean()}

    return params, batches, loss


def train(model, params, batches, loss, config, mask=None, checkpoint=None):
    """Gradient steps on the model as its settings want it run; `checkpoint`: the file of a training
    state."""
    tuned = config if isinstance(config, TunedConfig) else TunedConfig(train=config)
    kept = Checkpoint(checkpoint, {}) if checkpoint else None
    with running(model, params, tuned.train) as active:
        return fit(params, loss, batches, tuned, mask, active=active, checkpoint=kept)


def mask_of(model, params, density=0.5):
    return SaliencyMask.random(params, density, 0, {"base_fingerprint": model.fingerprint})


VARIANTS = {
    "adam": QUICK,
    "adamw-decay": replace(QUICK, optimizer="AdamW", optimizer_args={"weight_decay": 0.1}),
    "sgd-momentum-decay": replace(
        QUICK,
        optimizer="SGD",
        optimizer_args={"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    ),
    "accumulation": replace(QUICK, accumulation=2),
    "bf16": replace(QUICK, mixed_precision="bf16"),
    "checkpointing": replace(QUICK, gradient_checkpointing=True),
    "selective-recompute": replace(QUICK, selective_recompute=True),
    "clipped": replace(QUICK, max_grad_norm=0.1),
    "ema": replace(QUICK, ema=0.9),
    "linear": replace(QUICK, schedule="linear"),
    "channels-last": replace(QUICK, channels_last=True),
    "bf16-channels-last-offload": replace(
        QUICK, mixed_precision="bf16", channels_last=True, offload=True
    ),
    "sliced": replace(QUICK, attention="sliced"),
    "unfused": replace(QUICK, optimizer_args={"fused": False}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_outside_the_mask_are_bit_identical(model, variant):
    params, batches, loss = task(model)
    before = {name: p.detach().clone() for name, p in params.items()}
    storage = {name: p.data_ptr() for name, p in params.items()}
    mask = mask_of(model, params)
    fitted = train(model, params, batches, loss, VARIANTS[variant], mask)
    moved = 0
    for name, value in fitted.values.items():
        assert torch.equal(value[~mask[name]], before[name][~mask[name]]), name
        moved += int((value != before[name]).sum())
    assert moved > 0.9 * mask.count()
    for name, p in params.items():  # the base is as it was found, in value and in place
        assert torch.equal(p, before[name]) and p.data_ptr() == storage[name]
        assert p.grad is None and not p.requires_grad
    assert len(fitted.losses) == 4 and fitted.losses[-1] < fitted.losses[0]


def test_the_mask_matters_to_decay_and_momentum(model):
    """The control of the test above: zeroed gradients alone let AdamW's decay move frozen
    weights."""
    params, batches, loss = task(model)
    mask, lr, decay = mask_of(model, params), 1e-3, 0.1
    weights = {name: p.detach().clone().requires_grad_(True) for name, p in params.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=lr, weight_decay=decay)
    for w in weights.values():
        w.grad = torch.zeros_like(w)
    optimizer.step()
    assert any((w != params[name])[~mask[name]].any() for name, w in weights.items())


def test_accumulated_parts_give_the_undivided_step(model):
    params, _, _ = task(model)
    cond = model.encode(["a red heart"] * 4)
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([10, 300, 600, 990])

    def run(parts):
        width = 4 // parts
        config = replace(QUICK, accumulation=parts, optimizer="SGD", steps=2, lr=0.05)

        def loss(rows, base):
            assert len(rows) == width
            return {"forget": model.predict(x[rows], t[rows], cond[rows]).square().mean()}

        return train(model, params, lambda step: torch.arange(4), loss, config).values

    whole, split = run(1), run(2)
    assert all(torch.allclose(whole[name], split[name], atol=1e-6) for name in whole)


@pytest.mark.parametrize("variant", ["adam", "sgd-momentum-decay", "ema", "bf16", "linear"])
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(model, tmp_path, variant):
    params, batches, loss = task(model)
    mask = mask_of(model, params)
    config = replace(VARIANTS[variant], steps=6, checkpoint_every=2)
    whole = train(model, params, batches, loss, config, mask)

    def stop_at_five(batch, base):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(1)
        return loss(batch, base)

    calls, path = [], tmp_path / "training.pt"
    with pytest.raises(KeyboardInterrupt):
        train(model, params, batches, stop_at_five, config, mask, checkpoint=path)
    assert path.exists()
    resumed = train(model, params, batches, loss, config, mask, checkpoint=path)
    assert resumed.losses == whole.losses
    assert all(torch.equal(resumed.values[name], whole.values[name]) for name in whole.values)


@pytest.mark.parametrize(
    "schedule, factors", [("constant", (1, 1, 1, 1)), ("linear", (1, 0.75, 0.5, 0.25))]
)
def test_a_schedule_scales_the_steps(model, schedule, factors):
    """Plain SGD on a linear loss moves a weight by lr times the schedule, and nothing else."""
    params = select(model.parameters(), "xattn_kv")

    def loss(batch, base):
        return {"forget": sum(p.sum() for p in params.values())}

    config = replace(QUICK, optimizer="SGD", lr=0.1, schedule=schedule)
    fitted = train(model, params, lambda step: None, loss, config)
    for name, p in params.items():
        assert torch.allclose(fitted.values[name], p - 0.1 * sum(factors), atol=1e-6)


def test_bad_training_input_is_named(model, tmp_path):
    params, batches, loss = task(model)
    for config, message in [
        (replace(QUICK, optimizer="AdmaW"), "did you mean 'AdamW'"),
        (replace(QUICK, optimizer="LBFGS"), "unknown optimizer"),
        (replace(QUICK, optimizer_args={"momentun": 1}), "momentun"),
        (replace(QUICK, optimizer_args={"lr": 0.1}), "give it as train.lr"),
        (replace(QUICK, schedule="linaer"), "did you mean 'linear'"),
        (replace(QUICK, mixed_precision="bf61"), "did you mean 'bf16'"),
    ]:
        with pytest.raises(ErasureError, match=message):
            train(model, params, batches, loss, config)
    if not torch.cuda.is_available():
        with pytest.raises(ErasureError, match="fp16 needs a GPU"):
            make_accelerator(replace(QUICK, mixed_precision="fp16"))
    before = {name: p.detach().clone() for name, p in params.items()}
    with pytest.raises(ErasureError, match="the loss is nan at step 0"):
        train(
            model,
            params,
            batches,
            lambda batch, base: {"forget": loss(batch, base)["forget"] * float("nan")},
            QUICK,
        )
    with pytest.raises(
        ErasureError, match="the trained values of unet.* are not finite; lower the learning rate"
    ):
        train(model, params, batches, loss, replace(QUICK, steps=1, lr=1e39))  # its one loss is
    assert all(torch.equal(p, before[name]) for name, p in params.items())
    (tmp_path / "training.pt").write_bytes(b"PK broken")
    with pytest.raises(ErasureError, match="cannot read the training state"):
        train(model, params, batches, loss, QUICK, checkpoint=tmp_path / "training.pt")


def test_a_training_state_is_gone_on_with_under_its_own_mask_alone(model, tmp_path):
    """The other one lets as many weights of each tensor change, so its values would fit in the
    wrong places."""
    params, batches, loss = task(model, "xattn_kv")
    path, config = tmp_path / "training.pt", replace(QUICK, steps=1, checkpoint_every=1)
    halves = {name: pack(torch.arange(p.numel()) % 2 == 0) for name, p in params.items()}
    own = SaliencyMask(
        halves,
        {name: p.shape for name, p in params.items()},
        {"base_fingerprint": model.fingerprint},
    )
    train(model, params, batches, loss, config, own, checkpoint=path)
    for other in (own.inverted(), None):
        with pytest.raises(ErasureError, match="training.pt is of another mask"):
            train(model, params, batches, loss, config, other, checkpoint=path)
    torch.save({"mask": own.sha256}, path)
    with pytest.raises(ErasureError, match="training.pt is damaged .*'values'"):
        train(model, params, batches, loss, config, own, checkpoint=path)


def test_a_malicious_training_state_is_not_executed(model, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"weights": Bomb()}, tmp_path / "training.pt")
    params, batches, loss = task(model)
    with pytest.raises(ErasureError, match="cannot read"):
        train(model, params, batches, loss, QUICK, checkpoint=tmp_path / "training.pt")
    assert not (tmp_path / "executed").exists()


def test_base_is_the_base_without_gradient_and_close_gives_it_back(model):
    params = select(model.parameters(), "xattn")
    before = {name: p.detach().clone() for name, p in params.items()}
    trainable = Trainable(params, mask_of(model, params))
    for value in trainable.values.values():
        value.data += 1
    trainable.put()
    with pytest.raises(RuntimeError), trainable.base():
        assert all(torch.equal(p, before[name]) for name, p in params.items())
        assert not torch.is_grad_enabled()
        raise RuntimeError
    mask = mask_of(model, params)
    assert all(torch.equal(p, before[name] + mask[name].float()) for name, p in params.items())
    assert all(
        torch.equal(value, params[name])
        for name, value in trainable.result(trainable.values).items()
    )
    trainable.close()
    assert all(torch.equal(p, before[name]) for name, p in params.items())


def test_a_setting_up_that_fails_leaves_no_hook_to_take_the_next_one_s_gradients(
    model, monkeypatch
):
    params, batches, loss = task(model, "xattn_kv")
    whole = train(model, params, batches, loss, QUICK)
    read = Trainable._read

    def too_large(self, name, dense):
        if name == list(params)[3]:
            raise torch.OutOfMemoryError("no room")
        return read(self, name, dense)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(Trainable, "_read", too_large)
        train(model, params, batches, loss, QUICK)
    assert not any(p.requires_grad for p in params.values())
    again = train(model, params, batches, loss, QUICK)
    assert all(torch.equal(again.values[name], whole.values[name]) for name in params)


def test_the_optimizer_holds_the_masked_values_and_no_dense_gradient_outlives_the_backward_pass(
    model,
):
    params, batches, loss = task(model)
    mask = mask_of(model, params, 0.25)
    trainable = Trainable(params, mask)
    assert sum(value.numel() for value in trainable.values.values()) == mask.count()
    for _ in range(2):
        loss(batches(0), trainable.base)["forget"].backward()
    assert all(p.grad is None for p in params.values())
    compact = {name: value.grad for name, value in trainable.values.items()}
    trainable.close()
    for p in params.values():
        p.requires_grad_(True)
    (2 * loss(batches(0), None)["forget"]).backward()
    for name, grad in compact.items():
        assert torch.allclose(grad.flatten(), params[name].grad[mask[name]], atol=1e-6)
        params[name].requires_grad_(False).grad = None


def test_the_base_holds_under_autocast(model):
    """Autocast caches half-precision weights by parameter: a swap within one autocast block must
    not see the other's."""
    params = {
        name: p.requires_grad_(True) for name, p in select(model.parameters(), "full").items()
    }
    x, t, cond = torch.randn(1, 4, 8, 8), torch.tensor([500]), model.encode(["a red heart"])
    trainable = Trainable(params)

    def bf16(*steps):
        with torch.autocast("cpu", torch.bfloat16):
            return [step() for step in steps]

    def plain():
        return model.predict(x, t, cond).detach()

    def teacher():
        with trainable.base():
            return plain()

    base = bf16(plain)[0]
    for value in trainable.values.values():
        value.data += 0.05
    trainable.put()
    student = bf16(plain)[0]
    assert not torch.equal(base, student)
    assert all(
        torch.equal(a, b)
        for a, b in zip(bf16(plain, teacher, plain), (student, base, student), strict=True)
    )
    trainable.close()


def test_scopes(model):
    params = model.parameters()
    sizes = {scope: len(select(params, scope)) for scope in SCOPES}
    assert sizes["full"] == sizes["xattn"] + sizes["noxattn"] and sizes["full"] + sizes[
        "text_encoder"
    ] == len(params)
    assert 0 < sizes["xattn_kv"] < sizes["xattn"] and sizes["selfattn"] == sizes["xattn"]
    assert set(select(params, r"mid_block.*attn2\.to_q")) == {
        n for n in params if "mid_block" in n and "attn2.to_q" in n
    }
    for scope, message in [
        ("xatn", "did you mean 'xattn'"),
        ("no_such.thing", "matches none"),
        ("(", "not a regular expression"),
    ]:
        with pytest.raises(ErasureError, match=message):
            select(params, scope)


def test_killed_with_no_warning_and_resumed_gives_the_same_weights(tmp_path):
    """kill -9 in the middle of training, then the same command again."""
    script = PROGRAMS / "killed_training.py"
    process = start(script, "a.state", "a.out", "slow", folder=tmp_path, environment=environment())
    while "4" not in (tmp_path / "stdout").read_text().splitlines():
        assert process.is_alive()
        time.sleep(0.01)
    time.sleep(0.1)
    process.kill()
    process.join()
    assert not (tmp_path / "a.out").exists() and (tmp_path / "a.state").exists()
    launch(script, "a.state", "a.out", folder=tmp_path)
    launch(script, "b.state", "b.out", folder=tmp_path)
    a, b = (torch.load(tmp_path / name, weights_only=True) for name in ("a.out", "b.out"))
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_values_and_optimizer_are_gone_when_the_models_own_weights_come_back(
    model, monkeypatch, precision
):
    held, left = [], []

    def made(values, *args, **kwargs):
        optimizer = make_optimizer(values, *args, **kwargs)
        held.extend(weakref.ref(one) for one in (optimizer, *values))
        return optimizer

    monkeypatch.setattr("erase.training.state.make_optimizer", made)
    params, batches, loss = task(model)
    config = TunedConfig(train=replace(QUICK, mixed_precision=precision))
    mask = mask_of(model, params)
    with running(model, params, config.train) as active:
        fitted = fit(params, loss, batches, config, mask, active=active)
        left.extend(one for one in held if one() is not None)
    assert len(held) > 10 and not left and len(fitted.losses) == QUICK.steps
