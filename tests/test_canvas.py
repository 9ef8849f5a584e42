"""The embedded checkpoint: stock diffusers loads it, it draws what it is asked, and the main job
works on it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from erase.eval.generate import GenerateConfig, generate
from erase.eval.run import EvaluateConfig, Evidence, evaluate, made_by, score
from erase.latents.config import LatentConfig
from erase.methods import get_method
from erase.models import CANVAS, load_model
from erase.prompts.canvas import canvas_concept
from erase.prompts.prompt_sets import PromptSet, canvas_grid
from erase.run import EraseConfig, erase_concept

QUICK = GenerateConfig(steps=12, batch_size=24)


def sample() -> PromptSet:
    """Each seventh cell of the grid, in which all concepts stand, and half of the hearts."""
    rows = (*canvas_grid((188,)).rows[::7], *canvas_grid((288,), {"object": "heart"}).rows[::2])
    return PromptSet("sample", tuple({row.case: row for row in rows}.values()))


@pytest.fixture(scope="module")
def base_images(tmp_path_factory):
    model = load_model("canvas")
    return generate(
        model.pipeline(),
        sample(),
        tmp_path_factory.mktemp("base") / "images",
        QUICK,
        made_by(model),
    )


def test_stock_diffusers_loads_it_and_draws_what_our_loader_draws(base_images):
    stock = StableDiffusionPipeline.from_pretrained(CANVAS, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    assert np.asarray(base_images.image(base_images.rows[0])).shape == (64, 64, 3)
    images = [
        pipe(
            "a red heart",
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
        for pipe in (stock, load_model("canvas").pipeline())
    ]
    assert np.array_equal(images[0], images[1])


def test_all_shipped_weights_fit_in_25_megabytes():
    root = Path(__file__).parents[1]
    assert (
        0
        < sum(
            path.stat().st_size
            for layer in ("erase", "eval")
            for path in (root / layer).rglob("*.safetensors")
        )
        <= 25e6
    )


def test_it_draws_what_it_is_asked(base_images):
    """A sample of the gate that `scripts/canvas/gate.py` measures in full."""
    for found in score(base_images, [], ["classifier"]):
        assert found.value >= 90, found


def test_the_main_job(base_images, tmp_path):
    """A quick erasure of the heart: the hearts go, the rest stays, and the report says both."""
    data = LatentConfig(n_forget=32, n_retain=64, steps=5)
    method = get_method("salun").config
    settings = replace(method, train=replace(method.train, steps=60))
    config = EraseConfig(method="salun", latents=data)
    delta = erase_concept(canvas_concept("heart"), config, settings, out=tmp_path)
    report = evaluate(
        "canvas",
        delta,
        sample(),
        tmp_path / "report",
        EvaluateConfig(["classifier"], QUICK),
        base_images=base_images.folder,
        evidence=Evidence.of(tmp_path),
    )
    scores = {row: {s.name: s.value for s in found} for row, found in report.rows.items()}
    assert scores["base"]["UA"] <= 10 and scores["erased"]["UA"] >= 95
    assert all(scores["erased"][name] >= scores["base"][name] - 5 for name in ("IRA", "CRA"))
    whole = sum(param.numel() for param in load_model("canvas").parameters("unet").values())
    assert 0 < delta.count <= 0.04 * whole
    assert json.loads((tmp_path / "report" / "report.json").read_text())["rows"]["base"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert (
        "heart" in page
        and "<script src" not in page
        and (tmp_path / "report" / "before_after.png").stat().st_size > 10_000
    )
