"""HiRM: where the text encoder is led, and who is moved."""

from dataclasses import replace

import pytest
import torch

from erase.methods import get_method
from erase.methods.hirm import last_attention
from erase.models import wrap
from erase.prompts.concepts import ConceptSpec
from erase.task import Task
from erase.training.config import TrainConfig
from tests.families import FAMILIES

CONCEPT = ConceptSpec("heart", "mushroom", templates=("a {}",), retain=("a moon",))
HIRM = get_method("hirm")


@pytest.fixture
def pipeline(make_pico_pipeline):
    return make_pico_pipeline()


def unit(width):
    u = torch.randn(width, generator=torch.Generator().manual_seed(0))
    return u / u.norm()


def test_hirm_takes_the_steps_of_its_equation(pipeline, make_pico_pipeline):
    """SGD on |h - 3 u|^2 over the first layer of the bare encoder, h read off by hand."""
    encoder = make_pico_pipeline().text_encoder
    ids = pipeline.tokenizer(
        "a heart", padding="max_length", max_length=32, return_tensors="pt"
    ).input_ids
    seen = []
    last = encoder.encoder.layers[-1].self_attn.out_proj
    last.register_forward_hook(lambda _, __, output: seen.append(output))
    trained = {
        f"text_encoder.{name}": p
        for name, p in encoder.named_parameters()
        if ".layers.0.self_attn." in name or ".layers.0.mlp." in name
    }
    for _ in range(3):
        encoder(ids)
        loss = (seen[-1] - 3 * unit(32)).square().mean()
        for p, slope in zip(
            trained.values(), torch.autograd.grad(loss, list(trained.values())), strict=True
        ):
            p.data -= 0.5 * slope

    train = TrainConfig(steps=3, lr=0.5, batch_size=2, optimizer="SGD")
    found = HIRM.edit(
        Task(wrap(pipeline), [CONCEPT]), replace(HIRM.config, strength=3, train=train)
    )
    assert found.values.keys() == trained.keys()
    for name, value in trained.items():
        assert torch.allclose(found.values[name], value, atol=1e-6), name


def test_retained_prompts_can_be_held(pipeline):
    """The concept's states move as far, the retained prompt's less."""
    model, moved = wrap(pipeline), {}
    train = TrainConfig(steps=30, lr=3e-3, batch_size=2)
    before = [model.encode([prompt]).embeddings for prompt in ("a heart", "a moon")]
    for alpha in (0.0, 100.0):
        config = replace(HIRM.config, strength=3, alpha=alpha, train=train)
        values = HIRM.edit(Task(model, [CONCEPT]), config).values
        params = model.parameters()
        old = {name: params[name].detach().clone() for name in values}
        for name, value in values.items():
            params[name].data.copy_(value)
        after = [model.encode([prompt]).embeddings for prompt in ("a heart", "a moon")]
        moved[alpha] = [float((a - b).norm()) for a, b in zip(after, before, strict=True)]
        for name, value in old.items():
            params[name].data.copy_(value)
    # the concept against what is retained
    assert moved[100.0][1] < 0.5 * moved[0.0][1]
    assert moved[100.0][0] / moved[100.0][1] > 1.5 * moved[0.0][0] / moved[0.0][1]


@pytest.mark.parametrize(("family", "count"), [("sd1", 1), ("sdxl", 2), ("sd3", 2)])
def test_every_clip_encoder_is_led_astray(family, count):
    """T5 has no such layer: what it says stays, as the paper's figures on FLUX have it."""
    model = wrap(FAMILIES[family](), family)
    with last_attention(model) as outputs:
        model.encode(["a heart"])
    assert len(outputs) == count
    found = HIRM.edit(
        Task(model, [CONCEPT]), replace(HIRM.config, train=TrainConfig(steps=2, batch_size=2))
    )
    assert {name.split(".")[0] for name in found.values} == {
        f"text_encoder{end}" for end in ("", "_2")[:count]
    }
