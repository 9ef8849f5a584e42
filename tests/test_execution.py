"""How a model is run while it trains: the same steps to rounding, and a model that is given back as
it was found."""

import importlib.util
import io
import warnings
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from erase.models import autocast, wrap
from erase.models.pipelines import denoiser, modules
from erase.models.scopes import select
from erase.models.sd import StableDiffusion
from erase.prompts.errors import ErasureError
from erase.scripts import run_erase
from erase.scripts.cli import run
from erase.training.optimizers import FUSED, make_optimizer
from erase.training.recompute import SavedActivations
from erase.training.running import attention, running
from erase.training.trainable import Trainable
from tests.families import FAMILIES, tiny_sd3
from tests.test_training import QUICK, mask_of, task, train

# moves weights in proportion to gradients, which Adam's signs do not
SGD = replace(QUICK, optimizer="SGD", lr=0.05, steps=2)
HAS_8BIT = importlib.util.find_spec("bitsandbytes") is not None


@pytest.fixture
def model(make_pico_pipeline):
    return StableDiffusion(make_pico_pipeline())


def state(model):
    """Everything that an option might leave changed."""
    unet = denoiser(model.pipeline())
    weights = {
        name: (p, p.data_ptr(), p.dtype, p.stride()) for name, p in model.parameters().items()
    }
    hooks = sum(
        len(layer._forward_hooks)
        for part in modules(model.pipeline()).values()
        for layer in part.modules()
    )
    return (
        weights,
        {name: type(one) for name, one in unet.attn_processors.items()},
        unet.training,
        "forward" in vars(unet),
        hooks,
    )


def trained(model, config, density=0.5):
    params, batches, loss = task(model)
    return train(model, params, batches, loss, config, mask_of(model, params, density))


def close(a, b, start, tolerance):
    """Whether two trainings lie within this fraction of what they changed."""
    apart = sum((a.values[name] - b.values[name]).square().sum() for name in a.values).sqrt()
    moved = sum((a.values[name] - start[name]).square().sum() for name in a.values).sqrt()
    assert moved > 0
    return apart < tolerance * moved


@pytest.mark.parametrize(
    "options",
    [{"attention": "sdpa"}, {"attention": "sliced"}, {"channels_last": True}, {"offload": True}],
    ids=str,
)
def test_an_option_changes_the_steps_by_rounding_alone(model, options):
    before = state(model)
    for density in (0.5, 1):  # of what is taken whole, gradients and values are not gathered
        plain = trained(model, SGD, density)
        other = trained(model, replace(SGD, **options), density)
        assert close(plain, other, model.parameters(), 1e-3)
    assert state(model)[1:] == before[1:]
    for name, (p, *rest) in before[0].items():
        assert [p.data_ptr(), p.dtype, p.stride()] == rest, name


def test_weights_that_do_not_fit_their_places_would_be_seen(model):
    """The control of the test above: channels-last weights written in memory order are other
    weights."""
    params, _, _ = task(model)
    name = "unet.conv_in.weight"
    dense = params[name].data.clone(memory_format=torch.channels_last)
    trainable = Trainable({name: nn.Parameter(dense)}, mask_of(model, {name: params[name]}))
    assert torch.equal(dense, params[name])
    trainable.put()
    assert torch.equal(dense, params[name])
    memory_order = dense.permute(0, 2, 3, 1).flatten()
    assert not torch.equal(memory_order, params[name].flatten())


@pytest.mark.parametrize("kind", ["auto", "sdpa", "sliced"])
def test_attention_predicts_the_same_and_is_given_back(model, kind):
    params = select(model.parameters(), "full")
    x = torch.randn(2, 4, 8, 8)
    t = torch.tensor([10, 900])
    cond = model.encode(["a red heart", "a blue star"])
    unet = model.component("unet")
    found, expected = dict(unet.attn_processors), model.predict(x, t, cond).detach()
    with running(model, params, replace(QUICK, attention=kind)):
        kinds = {type(one).__name__ for one in unet.attn_processors.values()}
        assert torch.allclose(model.predict(x, t, cond), expected, atol=1e-5)
    assert kinds == {
        {"auto": "AttnProcessor", "sdpa": "AttnProcessor2_0", "sliced": "SlicedAttnProcessor"}[kind]
    }
    assert dict(unet.attn_processors) == found


def test_joint_attention_keeps_its_processors():
    model = wrap(tiny_sd3(t5=False), "sd3")
    transformer, params = model.component("transformer"), select(model.parameters(), "full")
    found = dict(transformer.attn_processors)
    with running(model, params, QUICK):
        assert dict(transformer.attn_processors) == found
    with (
        pytest.raises(ErasureError, match="no sliced attention for a SD3Transformer2DModel"),
        running(model, params, replace(QUICK, attention="sliced")),
    ):
        pass
    assert dict(transformer.attn_processors) == found


def test_weights_in_half_precision_give_the_gradients_of_autocast_bit_for_bit(model):
    """Autocast rounds each weight for its use; stand-ins are rounded once."""
    params, batches, loss = task(model)
    batch = batches(0)

    def gradients():
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(batch, None)["forget"]
        value.backward()
        found = {name: p.grad.float() for name, p in params.items()}
        for p in params.values():
            p.grad = None
        return value, found

    for p in params.values():
        p.requires_grad_(True)
    with running(model, params, QUICK):
        expected, autocast = gradients()
    with running(model, params, replace(QUICK, mixed_precision="bf16")) as active:
        assert (
            params["unet.conv_in.weight"].dtype == torch.bfloat16
            and params["unet.conv_norm_out.weight"].dtype == torch.float32
        )
        found, ours = gradients()
    own = active.own
    assert own and all(params[name].data_ptr() == value.data_ptr() for name, value in own.items())
    assert torch.equal(found, expected) and all(
        torch.equal(ours[name], autocast[name]) for name in params
    )


def test_weights_outside_the_scope_stand_in_half_precision_too(model):
    params = select(model.parameters(), "xattn_kv")
    with running(model, params, replace(QUICK, mixed_precision="bf16")):
        assert model.component("unet").conv_in.weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters().values()} == {torch.float32}


def test_the_denoiser_runs_as_told_where_a_text_encoder_trains(model):
    params, unet = select(model.parameters(), "text_encoder"), model.component("unet")
    told = replace(QUICK, mixed_precision="bf16", gradient_checkpointing=True)
    with running(model, params, told):
        assert unet.is_gradient_checkpointing and unet.conv_in.weight.dtype == torch.bfloat16
    assert not unet.is_gradient_checkpointing and unet.conv_in.weight.dtype == torch.float32


def test_offload_moves_what_the_steps_do_not_use(model, monkeypatch):
    moved, to = [], nn.Module.to
    monkeypatch.setattr(
        nn.Module,
        "to",
        lambda self, *args, **further: moved.append((self, args)) or to(self, *args, **further),
    )
    pipeline = model.pipeline()
    with running(model, select(model.parameters(), "full"), replace(QUICK, offload=True)):
        away = [part for part, _ in moved]
        assert {id(part) for part in away} == {id(pipeline.vae), id(pipeline.text_encoder)}
        assert all(args == ("cpu",) for _, args in moved)
    assert [part for part, _ in moved[2:]] == away and all(
        args == (torch.device("cpu"),) for _, args in moved[2:]
    )


@pytest.mark.parametrize("kind", FUSED, ids=lambda kind: kind.__name__)
def test_the_fused_step_is_the_plain_one(model, kind):
    config = replace(QUICK, optimizer=kind.__name__)
    fused = trained(model, config)
    plain = trained(model, replace(config, optimizer_args={"fused": False}))
    assert close(fused, plain, model.parameters(), 1e-3)
    assert make_optimizer(
        [nn.Parameter(torch.zeros(1))], kind.__name__, 1e-3, {}, fuse=True
    ).defaults["fused"]


def test_what_is_not_installed_is_named(model, monkeypatch):
    params, batches, loss = task(model)
    for options, message in [
        ({"attention": "sdp"}, "did you mean 'sdpa'"),
        ({"attention": "xformers"}, r"pip install .*\[xformers\]"),
        ({"optimizer": "AdamW8bit"}, r"pip install .*\[8bit\]"),
        ({"compile": True}, "install g"),
    ]:
        if HAS_8BIT and "optimizer" in options:
            continue
        with monkeypatch.context() as patched, pytest.raises(ErasureError, match=message):
            if "compile" in options:
                patched.setenv("PATH", "")
            train(model, params, batches, loss, replace(QUICK, **options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("installed", [True, False])
def test_xformers_without_a_gpu_is_refused_before_there_are_latents(
    monkeypatch, capsys, tmp_path, installed
):
    monkeypatch.setattr("erase.training.running.find_spec", lambda name: installed or None)
    monkeypatch.setattr(
        "erase.latents.prepare.Plan.forget", lambda *args: pytest.fail("latents were made")
    )
    assert (
        run(
            run_erase.main,
            ["--concept", "heart", "--train.attention", "xformers", "--out", str(tmp_path)],
        )
        == 2
    )
    error = capsys.readouterr().err
    assert (
        "needs a GPU" in error
        and "trains on the cpu; use attention sdpa" in error
        and "Traceback" not in error
    )


@pytest.mark.parametrize(
    "error",
    [
        ImportError("no xformers"),
        OSError("libcudart.so.12: cannot open shared object file"),
        ValueError("torch.cuda.is_available() should be True but is False."),
        NotImplementedError("No operator found for this input:\n  query: shape=(1, 2, 40)\n"),
        RuntimeError("CUDA error: no kernel image is available"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_xformers_that_cannot_be_used_is_a_sentence(model, monkeypatch, error):
    module = model.component("unet")
    monkeypatch.setattr("erase.training.running.check_attention", lambda kind, device: None)
    monkeypatch.setattr(
        module, "enable_xformers_memory_efficient_attention", Mock(side_effect=error), raising=False
    )
    found = dict(module.attn_processors)
    with pytest.raises(ErasureError) as refused, attention(model, "xformers"):
        pass
    said = str(refused.value)
    assert (
        str(error).split("\n")[0] in said
        and said.endswith("use attention sdpa")
        and "\n" not in said
    )
    assert module.attn_processors == found


@pytest.mark.skipif(not HAS_8BIT, reason="bitsandbytes is not installed")
def test_eight_bit_state_keeps_the_mask_and_resumes(model, tmp_path):
    params, batches, loss = task(model, r"\.ff\.net\.|conv")
    mask = mask_of(model, params)
    before = {name: p.detach().clone() for name, p in params.items()}
    config = replace(QUICK, optimizer="AdamW8bit", steps=4, checkpoint_every=2)
    whole = train(model, params, batches, loss, config, mask)
    for name, value in whole.values.items():
        assert torch.equal(value[~mask[name]], before[name][~mask[name]]) and torch.equal(
            params[name], before[name]
        )
    assert any(not torch.equal(value, before[name]) for name, value in whole.values.items())
    calls = []

    def stop(batch, base):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return loss(batch, base)

    with pytest.raises(KeyboardInterrupt):
        train(model, params, batches, stop, config, mask, checkpoint=tmp_path / "training.pt")
    resumed = train(model, params, batches, loss, config, mask, checkpoint=tmp_path / "training.pt")
    assert all(torch.equal(resumed.values[name], whole.values[name]) for name in whole.values)


@pytest.mark.skipif(not HAS_8BIT, reason="bitsandbytes is not installed")
def test_eight_bit_state_takes_a_byte_for_each_moment():
    """Also where the number of values is no multiple of anything, as under a mask."""
    value = nn.Parameter(torch.randn(10_007))
    value.grad = torch.randn(10_007)
    optimizer = make_optimizer([value], "AdamW8bit", 1e-3, {}, fuse=True)
    optimizer.step()
    moments = [
        v
        for v in optimizer.state[value].values()
        if torch.is_tensor(v) and v.numel() == value.numel()
    ]
    assert [moment.dtype for moment in moments] == [torch.uint8] * 2
    torch.save(optimizer.state_dict(), buffer := io.BytesIO())
    assert buffer.tell() < 3 * value.numel()


@pytest.mark.slow
def test_compiled_steps_are_the_eager_ones(model):
    """With gradient hooks and weights that are swapped in place for the teacher."""
    params, batches, plain = task(model)

    def loss(batch, base):
        with base():
            target = plain(batch, base)["forget"]
        found = plain(batch, base)["forget"]
        return {"forget": found + (found - target).square()}

    mask = mask_of(model, params)
    eager = train(model, params, batches, loss, SGD, mask)
    compiled = train(model, params, batches, loss, replace(SGD, compile=True), mask)
    assert close(eager, compiled, params, 1e-3)
    assert model.component("unet")._compiled_call_impl is None


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_processor_without_the_precision_is_warned_of(monkeypatch, precision):
    cpu, no = torch.device("cpu"), {"avx512_bf16": False, "avx512_fp16": False, "avx2": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: no, raising=False)
    with pytest.warns(UserWarning, match=f"no {precision} of its own"):
        autocast(cpu, precision)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        autocast(cpu, "no")
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda: {**no, f"avx512_{precision}": True}
        )
        autocast(cpu, precision)
        monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in torch 2.9: nothing is known
        autocast(cpu, precision)


class Watched(SavedActivations):
    """Notes which operations' outputs are not kept."""

    def __init__(self):
        super().__init__()
        self.left_out = set()

    def pack(self, tensor):
        found = super().pack(tensor)
        if found is not tensor:
            self.left_out.add(found.node.name().removesuffix("Backward0"))
        return found


@pytest.mark.usefixtures("short_t5")
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    ("family", "left_out"),
    [
        ("sd1", {"NativeGroupNorm", "NativeLayerNorm", "Silu", "Gelu", "Mul"}),
        ("sdxl", {"NativeGroupNorm", "NativeLayerNorm", "Silu", "Gelu", "Mul"}),
        ("sd3", {"NativeLayerNorm", "Silu", "Gelu", "Mul"}),
        ("flux", {"NativeLayerNorm", "Silu", "Gelu", "Mul"}),
    ],
)
def test_what_is_made_again_has_the_same_bits(family, left_out, precision, monkeypatch):
    monkeypatch.setattr("erase.training.recompute.SMALL", 0)  # norms' means too are offered then
    memory = Watched()
    monkeypatch.setattr("erase.training.running.SavedActivations", lambda: memory)
    model = wrap(FAMILIES[family](), family)
    config = replace(SGD, mixed_precision=precision, accumulation=2)
    plain, before = trained(model, config), state(model)
    again = trained(model, replace(config, selective_recompute=True))
    assert plain.losses == again.losses
    assert all(torch.equal(plain.values[name], again.values[name]) for name in plain.values)
    assert memory.left_out == left_out
    assert state(model)[1:] == before[1:]


@pytest.mark.parametrize(
    ("see", "kept"), [(lambda y: y.bfloat16(), False), (lambda y: y.bfloat16().float(), True)]
)
def test_what_a_cast_rounded_off_is_not_brought_back(see, kept):
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    seen, memory = see(nn.functional.silu(x)).view(4096), SavedActivations()
    found = memory.pack(seen)
    assert (found is seen) == kept
    assert torch.equal(memory.unpack(found), seen)


def test_two_ways_to_recompute_are_refused():
    for other in ("gradient_checkpointing", "compile"):
        with pytest.raises(ErasureError, match=f"selective_recompute and {other}"):
            replace(QUICK, selective_recompute=True, **{other: True})
