"""The embedded flow transformer: stock diffusers loads it, it draws what it is asked, one null
state was trained for many, and an erasure works on it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from transformers import CLIPTokenizer

from erase.attacks.relearning import changed_to
from erase.eval.generate import GenerateConfig, generate
from erase.eval.run import score
from erase.methods import get_method
from erase.models import CANVAS, CANVAS_FLOW, load_model
from erase.prompts.canvas import canvas_concept
from erase.prompts.prompt_sets import canvas_grid
from erase.scripts.canvas.train_flow import (
    NULLS,
    OneNull,
    build_text_encoder,
    build_transformer,
    states_of,
)
from erase.task import Task

QUICK = GenerateConfig(steps=12, batch_size=24)


@pytest.fixture(scope="module")
def base():
    return load_model("canvas-flow")


def drawn(model, prompts, folder):
    return generate(model.pipeline(), prompts, folder, QUICK, {"fingerprint": model.fingerprint})


def test_stock_diffusers_loads_it_and_draws_what_our_loader_draws(base):
    stock = StableDiffusion3Pipeline.from_pretrained(
        CANVAS_FLOW,
        vae=AutoencoderKL.from_pretrained(CANVAS / "vae"),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    given = {"num_inference_steps": 4, "max_sequence_length": 32, "output_type": "np"}
    images = [
        pipe("a red heart", generator=torch.Generator().manual_seed(0), **given).images
        for pipe in (stock, base.pipeline())
    ]
    assert np.array_equal(images[0], images[1])


@pytest.mark.parametrize("count", NULLS)
def test_one_null_state_stands_for_as_many_as_the_pipeline_gives(count):
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(CANVAS / "tokenizer")
    encoders = [build_text_encoder(tokenizer, 96), build_text_encoder(tokenizer, 64)]
    transformer = build_transformer()
    ids = tokenizer(["a red heart"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        text, pooled = states_of(encoders, ids, transformer.config.joint_attention_dim)
        given = {"timestep": torch.tensor([500.0]), "pooled_projections": pooled}
        x, rest = torch.randn(1, 4, 16, 16), text[:, -1:].expand(-1, count - 1, -1)
        many = torch.cat([text, rest], dim=1)
        stock = transformer(x, encoder_hidden_states=many, **given).sample
        plain = transformer(x, encoder_hidden_states=text, **given).sample
        one = OneNull()
        one.counts = torch.tensor([count])
        transformer.set_attn_processor(one)
        ours = transformer(x, encoder_hidden_states=text, **given).sample
    assert torch.allclose(ours, stock, atol=1e-5)
    assert not torch.allclose(plain, stock, atol=1e-3)


def test_it_draws_what_it_is_asked(base, tmp_path):
    """A sample of the gate that `scripts/canvas/gate.py --model canvas-flow` measures in full."""
    grid = canvas_grid(seeds=(188,))
    images = drawn(base, replace(grid, rows=grid.rows[::11]), tmp_path / "base")
    for found in score(images, [], ["classifier"]):
        assert found.value >= 85, found


def test_a_closed_form_takes_a_concept_out_of_it(base, tmp_path):
    heart = canvas_concept("heart")
    edit = get_method("uce").edit(Task(base, [heart]), get_method("uce").config)
    grid = canvas_grid((188,))
    hearts = [row for row in grid.rows if row.labels["object"] == "heart"]
    others = [row for row in grid.rows if row not in hearts]
    prompts = replace(grid, rows=(*hearts[::3], *others[::20]))
    shown = {"base": drawn(base, prompts, tmp_path / "base")}
    with changed_to(base, edit.values):
        shown["erased"] = drawn(base, prompts, tmp_path / "erased")
    ua, kept = {}, {}
    for row, images in shown.items():
        found = {one.name: one.value for one in score(images, [heart], ["classifier"])}
        ua[row], kept[row] = found["UA"], min(found["IRA"], found["CRA"])
    assert ua["base"] <= 20 and ua["erased"] >= 80
    assert kept["base"] >= 85 and kept["erased"] >= 80
