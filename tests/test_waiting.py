"""Parts that wait in main memory: one at a time on the device, and the same numbers."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain

import pytest
import torch
from accelerate.hooks import ModelHook
from torch import nn
from torch.func import functional_call

from erase.eval.generate import GenerateConfig, generate
from erase.latents.sampling import sample_points
from erase.methods import get_method
from erase.methods.esd import ESDConfig
from erase.models import LoadConfig, load_model, wrap
from erase.models.by_block import innermost
from erase.models.pipelines import decode, denoiser, modules
from erase.models.scopes import select
from erase.models.waiting import CPU, Waiting, waiting
from erase.prompts.prompt_sets import of_prompts
from erase.run import EraseConfig, erase_concept
from erase.task import Task
from erase.training.config import TrainConfig
from erase.training.running import running
from erase.training.trainable import Trainable
from tests.fake_gpu import GPU, NoLevels, fake_gpu, needs_fake_gpu
from tests.flow_families import tiny_klein, tiny_qwen_image, tiny_z_image
from tests.made import CONCEPT, METHOD, QUICK
from tests.test_round_trips import FAMILIES

ALL = {**FAMILIES, "klein": tiny_klein, "qwen": tiny_qwen_image, "z-image": tiny_z_image}
DEVICE = torch.device("cpu", 0)
"""a second name of the one device that is here"""
ENGINE = torch.device("lazy", 0)
"""a device that is not there, and for which autograd starts no thread of its own"""
draw = partial(
    sample_points, seed=0, steps=2, guidance=3.0, trajectory=0, batch_size=2, what="test"
)
PROMPTS = ("a heart", "a star", "a heart")


def waiting_model(make: Callable[[], object], by_block: bool = False):
    pipeline = make()
    Waiting(pipeline, DEVICE, by_block)
    return wrap(pipeline)


@pytest.fixture
def there(monkeypatch):
    """The parts on the device, after each move."""
    now: dict[int, nn.Module] = {}
    seen: list[list[nn.Module]] = []

    def move(part: nn.Module, device: torch.device) -> None:
        now.pop(id(part), None)
        if device == DEVICE:
            now[id(part)] = part
        seen.append(list(now.values()))

    monkeypatch.setattr("erase.models.waiting._move", move)
    return seen


@pytest.mark.parametrize("by_block", [False, True], ids=["parts", "blocks"])
@pytest.mark.parametrize(
    "family, precision", [("sd1", "no"), *((family, "bf16") for family in ALL)]
)
def test_latents_are_the_same_bits(family, precision, by_block):
    plain, moved = wrap(ALL[family]()), waiting_model(ALL[family], by_block)
    expected = draw(plain, PROMPTS, precision=precision)[0]
    assert torch.equal(draw(moved, PROMPTS, precision=precision)[0], expected)
    assert {param.dtype for param in moved.parameters().values()} == {torch.float32}


@pytest.mark.parametrize("family", ALL)
def test_no_two_parts_are_there_together(family, there):
    model = waiting_model(ALL[family])
    pipeline = model.pipeline()
    latents = model.sample(list(PROMPTS), [1, 2, 3], 2, 3.0)
    decode(pipeline, latents, "no")
    model.encode_images(torch.zeros(1, 3, model.image_size, model.image_size))
    assert max(map(len, there)) == 1
    called = {id(parts[0]) for parts in there if parts}
    assert called == {id(part) for part in modules(pipeline).values()}


def test_text_encoders_run_once_and_leave(there, monkeypatch):
    model = waiting_model(FAMILIES["sdxl"])
    asked: list[str] = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda texts: asked.extend(texts) or encode(texts))
    draw(model, PROMPTS, precision="bf16")
    assert asked == ["", "a heart", "a star"]
    assert there[-1] == []


@needs_fake_gpu
@pytest.mark.filterwarnings("ignore:User provided device_type")
@pytest.mark.parametrize("family", ["sdxl", "klein"])
def test_on_a_gpu_that_is_not_there(family):
    """Each part is where its inputs are, and what trains is there with what it becomes."""
    pipeline = ALL[family]()
    model = wrap(pipeline)

    def gpu() -> set[str]:
        parts = modules(pipeline).items()
        return {name for name, part in parts if next(part.parameters()).device == GPU}

    with fake_gpu(pipeline):
        here = torch.randn(1, *model.latent_shape), torch.tensor([5]), model.encode(["a heart"])
        denoiser(pipeline).to(GPU)
        with pytest.raises((RuntimeError, ValueError), match="device"):
            model.predict(*here)
        Waiting(pipeline, GPU)
        assert model.device == GPU and gpu() == set()
        model.sampler = lambda: NoLevels(pipeline.scheduler.config)
        latents, *_ = draw(model, PROMPTS[:1], precision="no")
        assert latents.device == CPU and gpu() == set()
        cond = model.encode(["a heart"])
        params = select(model.parameters(), "xattn")
        with running(model, params, TrainConfig(offload=True)) as active:
            assert gpu() == {next(iter(params)).split(".")[0]}
            noisy = torch.randn(1, *model.latent_shape, device=GPU)
            assert model.predict(noisy, torch.full((1,), 5, device=GPU), cond).device == GPU
            trainable = Trainable(params, None, active)
            with trainable.base():
                assert {value.device for value in trainable.values.values()} == {GPU}
            trained = trainable.result(trainable.values)
            trainable.close()
        assert gpu() == set()
        assert {value.device for value in trained.values()} == {CPU}
        assert model.sample(["a heart"], [1], 1, 3.0).device == GPU


@pytest.fixture
def brought(monkeypatch):
    """Numbers of weights on the device, whenever a block's come there."""
    held, most = Counter(), []

    def call(body, here, args, keywords):
        for name, copy in here.items():
            held[name] += copy.numel()
            weakref.finalize(copy, held.subtract, {name: copy.numel()})
        most.append(held.total())
        return functional_call(body, here, args, keywords)

    monkeypatch.setattr("erase.models.by_block.functional_call", call)
    return most


@needs_fake_gpu
@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux", "klein"])
def test_block_by_block_on_a_gpu_that_is_not_there(family, brought, monkeypatch):
    """What runs is there, a block at a time in both directions; what trains is not. (Qwen-Image and
    Z-Image go by the values of their masks.)"""
    # whose random state a checkpoint would keep
    monkeypatch.setattr(torch, "lazy", torch.cuda, raising=False)
    pipeline = ALL[family]()
    model, module = wrap(pipeline), denoiser(pipeline)
    inner = list(map(count, innermost(module)))
    with fake_gpu(pipeline):
        Waiting(pipeline, ENGINE, by_block=True)
        cond = model.encode(["a heart"])
        params = select(model.parameters(), "full")
        with running(model, params, TrainConfig(gradient_checkpointing=True)) as active:
            trainable = Trainable(params, None, active)
            brought.clear()
            noisy = torch.randn(1, *model.latent_shape, device=ENGINE)
            out = model.predict(noisy, torch.full((1,), 5, device=ENGINE), cond)
            assert out.device == ENGINE
            out.sum().backward()
            assert max(brought) <= count(module) - sum(inner) + max(inner) < count(module)
            for value in trainable.values.values():
                assert value.device == CPU and value.grad.device == CPU
            trainable.close()
        assert {param.device for param in model.parameters().values()} == {CPU}


def count(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in chain(module.parameters(), module.buffers()))


@needs_fake_gpu
@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize("method, family", [("uce", "sdxl"), ("rece", "klein")])
def test_a_closed_form_on_a_gpu_that_is_not_there(method, family, by_block):
    """The text is read there, and the weights change where they wait."""
    pipeline = ALL[family]()
    model = wrap(pipeline)
    with fake_gpu(pipeline):
        Waiting(pipeline, GPU, by_block)
        task = Task(model, [replace(CONCEPT, templates=("{}",))])
        edit = get_method(method).edit(task, get_method(method).settings(None))
        assert {value.device for value in edit.values.values()} == {CPU}
        assert {param.device for param in model.parameters().values()} >= {CPU}


def test_a_held_part_stays_and_is_as_it_was(there):
    model = waiting_model(FAMILIES["sd1"])
    pipeline, unet = model.pipeline(), denoiser(model.pipeline())
    forward = type(unet).forward
    with waiting(pipeline).held([unet]):
        assert not hasattr(unet, "_hf_hook") and unet.forward.__func__ is forward
        with waiting(pipeline).held([unet]):  # as a method samples between its steps
            model.sample(["a heart"], [1], 2, 3.0)
        assert not hasattr(unet, "_hf_hook")
        assert unet not in [part for parts in there for part in parts]
    assert waiting(pipeline) is unet._hf_hook
    with pytest.raises(KeyError), waiting(pipeline).held([unet]):
        raise KeyError
    assert isinstance(unet._hf_hook, ModelHook)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_what_trains_is_held_and_the_rest_leaves(part, there):
    model = waiting_model(FAMILIES["sd1"])
    model.encode(["a heart"])
    assert there[-1] == [model.component("text_encoder")]
    params = select(model.parameters(), f"{part}.*weight")
    with running(model, params, TrainConfig()):
        assert not hasattr(model.component(part), "_hf_hook")
        assert all(held is model.component(part) for held in there[-1])
    assert there[-1] == [] or part == "text_encoder"
    assert waiting(model.pipeline())


def test_stand_ins_go_to_the_device_and_the_weights_stay(monkeypatch):
    """The float32 weights never move: what goes is a copy in the precision of the steps."""
    model = waiting_model(FAMILIES["sd1"])
    held = {name: param.data_ptr() for name, param in model.parameters("unet").items()}
    config = TrainConfig(mixed_precision="bf16", offload=True)
    params = select(model.parameters(), "xattn")
    with running(model, params, config) as active:
        kernel = model.parameters()["unet.conv_in.weight"]
        assert kernel.dtype == torch.bfloat16
        assert active.own["unet.conv_in.weight"].data_ptr() == held["unet.conv_in.weight"]
    after = {name: param.data_ptr() for name, param in model.parameters("unet").items()}
    assert after == held


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    FAMILIES["sd1"]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def here():
    """Deltas of models that wait nowhere, by method and precision, each made once."""
    return {}


@pytest.mark.parametrize("offload", [True, "blocks"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    "method, settings",
    [("salun", METHOD), ("esd", ESDConfig(train=METHOD.train)), ("uce", None), ("fia", None)],
    ids=["salun", "esd", "uce", "fia"],
)
def test_an_erasure_is_the_same_bits(method, settings, precision, offload, base, here, tmp_path):
    latents = replace(QUICK.latents, mixed_precision=precision)
    config = EraseConfig(method=method, model=str(base), latents=latents)
    if settings:
        settings = replace(settings, train=replace(settings.train, mixed_precision=precision))
    if (method, precision) not in here:
        here[method, precision] = erase_concept(CONCEPT, config, settings)
    plain = here[method, precision]
    config = replace(config, load=LoadConfig(offload=offload))
    moved = erase_concept(CONCEPT, config, settings, out=tmp_path)
    assert moved.sha256 == plain.sha256
    assert moved.metadata["config"] == plain.metadata["config"]


def test_training_that_offloads_loads_part_by_part(base, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "erase.run.load_model",
        lambda name, device, options: asked.append(options) or load_model(name, device, options),
    )
    config = replace(QUICK, model=str(base))
    erase_concept(CONCEPT, config, replace(METHOD, train=replace(METHOD.train, offload=True)))
    erase_concept(CONCEPT, config, METHOD)
    assert [options.offload for options in asked] == [True, False]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_images_are_the_same_bytes(dtype, tmp_path):
    made = []
    for offload in (False, True, "blocks"):
        model = load_model("canvas", CPU, LoadConfig(dtype=dtype, offload=offload))
        out = tmp_path / str(offload)
        rows = of_prompts(["a Sketch of a red heart", "a Neon of a blue star"], 0)
        generate(model.pipeline(), rows, out, GenerateConfig(steps=2), {"model": model.name})
        made.append({path.name: path.read_bytes() for path in out.glob("*.png")})
    assert made[0] == made[1] == made[2] and len(made[0]) == 2
