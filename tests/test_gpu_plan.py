"""What an erasure takes of a GPU, by arithmetic: the counts are what really stands in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from erase.models import CANVAS
from erase.scripts.bench.count_activations import WAYS, Counted, count
from erase.scripts.bench.plan import Size, of_a_block, stages
from erase.scripts.bench.published import MODELS, Published, weights

CONFIG = UNet2DConditionModel.load_config(CANVAS / "unet")


def given(made, time):
    side, width = CONFIG["sample_size"], CONFIG["cross_attention_dim"]
    text = made(1, 32, width)
    return {"sample": made(1, 4, side, side), "timestep": time, "encoder_hidden_states": text}


@pytest.mark.parametrize("way", [WAYS[0], WAYS[2]])
def test_counted_without_data_is_what_autograd_keeps(way):
    canvas = Published(lambda: UNet2DConditionModel.from_config(CONFIG), given, ())
    unet = UNet2DConditionModel.from_config(CONFIG).eval()
    if way == WAYS[2]:
        unet.enable_gradient_checkpointing()
        unet.train()
    counted = Counted(unet, selective=False)
    with saved_tensors_hooks(counted.pack, counted.unpack):
        unet(**given(torch.randn, torch.zeros(1))).sample.sum()
    assert count(canvas, "cpu", None, way)[0] == counted.bytes > 0


@pytest.mark.parametrize(
    ("model", "denoiser", "others"),
    [
        ("sd1", 859_520_964, 206_714_343),
        ("klein-4b", 3_875_544_576, 4_106_514_211),
        ("flux1-dev", 11_901_408_320, 5_100_787_110),
    ],
)
def test_published_sizes(model, denoiser, others):
    published = MODELS[model]()
    assert sum(param.numel() for param in published.network().parameters()) == denoiser
    assert sum(map(weights, published.others())) == pytest.approx(others, rel=1e-5)


def test_stages_of_a_model_that_can_be_added_up_by_hand():
    row = {None: 20.0, torch.bfloat16: 10.0}
    size = Size(denoiser=1000, beside=400, largest=100, row=row, block=3.0)
    one = stages(size, scope=800, density=0.5, rows=4, gpus=1)
    assert one == {"latents": 2000 + 12, "statistics": 4000 + 400 + 80, "steps": 2000 + 8800 + 40}
    two = stages(size, scope=800, density=0.5, rows=4, gpus=2)
    assert two["statistics"] == 2000 + 1600 + 1200 + 80 and two["steps"] == 1000 + 4400 + 600 + 40
    assert stages(size, 800, 1.0, 4, 1)["statistics"] == 0
    assert stages(replace(size, beside=600), 800, 0.5, 4, 2)["latents"] == 2400


def test_stages_block_by_block():
    row = {None: 20.0, torch.bfloat16: 10.0}
    size = Size(denoiser=150, beside=60, largest=100, row=row, block=3.0)
    found = stages(size, 800, 0.5, rows=4, gpus=1, by_block=True)
    assert found == {"latents": 300 + 12, "statistics": 600 + 400 + 80, "steps": 300 + 200 + 40}


def test_a_block_and_what_lies_outside_of_blocks():
    part = nn.ModuleDict(
        {
            "proj": nn.Linear(2, 3, bias=False),
            "layers": nn.ModuleList([nn.Linear(n, n, bias=False) for n in (4, 5, 3)]),
        }
    )
    assert of_a_block(part) == 6 + 25
    assert of_a_block(nn.Linear(2, 3, bias=False)) == 6
