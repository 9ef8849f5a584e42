"""Single-file checkpoints: what is written loads in stock diffusers, comes back bit for bit and
draws the same."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from erase.models import CANVAS
from erase.models.single_file import load_single_file, write_single_file
from erase.prompts.errors import ErasureError
from tests.single_file_fixtures import TINY, networks, same, weights
from tests.single_file_fixtures import made as made

# ---- written and read back ----


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return pipeline(
        "a red heart", num_inference_steps=2, generator=generator, output_type="np"
    ).images


@pytest.mark.parametrize("kind", TINY)
def test_what_is_written_comes_back_bit_for_bit_and_draws_the_same(made, kind):
    pipeline, config, path = made(kind)
    back = load_single_file(path, config=config)
    assert type(back) is type(pipeline) and same(weights(back), weights(pipeline))
    assert all(not module.training for module in networks(back).values())
    assert back.scheduler.config.prediction_type == pipeline.scheduler.config.prediction_type
    image = draw(back)
    assert image.std() > 0.05 and np.array_equal(image, draw(pipeline))


@pytest.mark.parametrize("kind", TINY)
def test_stock_diffusers_loads_what_is_written_and_draws_the_same(made, kind):
    pipeline, config, path = made(kind)
    stock = type(pipeline).from_single_file(str(path), config=str(config), local_files_only=True)
    assert same(weights(stock), weights(pipeline))
    for module in networks(stock).values():
        # it maps the file: weights at odd addresses take other kernels, with other rounding
        for weight in module.parameters():
            weight.data = weight.data.clone()
    assert np.array_equal(draw(stock), draw(pipeline))


def test_the_embedded_checkpoint_makes_the_journey_too(tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(CANVAS, dtype=torch.float32)
    path = write_single_file(pipeline, tmp_path / "canvas.safetensors", torch.float16)
    back = load_single_file(path, config=CANVAS)
    stock = StableDiffusionPipeline.from_single_file(
        str(path), config=str(CANVAS), local_files_only=True, dtype=torch.float32
    )
    # its values are float16
    assert same(weights(back), weights(pipeline)) and same(weights(stock), weights(pipeline))


def test_the_file_holds_what_the_originals_hold_beside_weights(made, tmp_path):
    with safe_open(made("sd1")[2], "pt") as file:
        assert (
            file.metadata()["modelspec.prediction_type"] == "epsilon"
            and file.metadata()["format"] == "pt"
        )
        ids = file.get_tensor("cond_stage_model.transformer.text_model.embeddings.position_ids")
    assert ids.dtype == torch.int64 and ids.tolist() == [list(range(32))]


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_the_file_tells_v_prediction_and_an_end_in_pure_noise(made, tmp_path, family):
    pipeline, config, _ = made(family)
    usual = pipeline.scheduler
    velocity = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    pipeline.scheduler = DDIMScheduler.from_config(usual.config, **velocity)
    try:
        path = write_single_file(
            pipeline, tmp_path / "v.safetensors", metadata={"modelspec.title": "a title"}
        )
    finally:
        pipeline.scheduler = usual
    with safe_open(path, "pt") as file:
        assert {"v_pred", "ztsnr"} <= set(file.keys())
        assert file.metadata()["modelspec.title"] == "a title"
    schedule = load_single_file(path, config=config, prediction="v_prediction").scheduler.config
    assert schedule.prediction_type == "v_prediction" and schedule.rescale_betas_zero_snr


def test_a_loaded_pipeline_saves_and_exports_again(made, tmp_path):
    """Nothing shares memory with anything else, which safetensors would refuse."""
    pipeline, config, path = made("sdxl")
    back = load_single_file(path, config=config)
    back.save_pretrained(tmp_path / "folder")
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path / "folder")
    assert same(weights(again), weights(pipeline))
    second = write_single_file(back, tmp_path / "again.safetensors")
    assert same(load_file(second), load_file(path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_precision_rounds_each_weight_once(made, tmp_path, dtype):
    pipeline, config, _ = made("sd1")
    path = write_single_file(pipeline, tmp_path / "half.safetensors", dtype)
    assert {t.dtype for t in load_file(path).values()} == {dtype, torch.int64}
    expected = {name: weight.to(dtype) for name, weight in weights(pipeline).items()}
    assert same(weights(load_single_file(path, dtype, config=config)), expected)
    assert same(
        weights(load_single_file(path, config=config)),
        {name: w.float() for name, w in expected.items()},
    )


# ---- refusals ----


def test_the_writer_refuses_and_leaves_nothing(made, tmp_path):
    pipeline, config, path = made("sd1")
    with pytest.raises(ErasureError, match="exists already"):
        write_single_file(pipeline, path)
    with pytest.raises(ErasureError, match=r"must end in \.safetensors"):
        write_single_file(pipeline, tmp_path / "model.ckpt")
    with pytest.raises(ErasureError, match="a Linear cannot be written"):
        write_single_file(nn.Linear(1, 1), tmp_path / "model.safetensors")
    back = load_single_file(path, config=config)
    encoder, back.text_encoder = back.text_encoder, None
    with pytest.raises(ErasureError, match="the pipeline has no text_encoder"):
        write_single_file(back, tmp_path / "model.safetensors")
    back.text_encoder = encoder
    with torch.no_grad():
        back.unet.conv_out.bias[0] = 1e5
    with pytest.raises(
        ErasureError, match=r"unet\.conv_out\.bias of the pipeline holds values up to 1e\+05"
    ):
        write_single_file(back, tmp_path / "model.safetensors", torch.float16)
    assert list(tmp_path.iterdir()) == []


# ---- memory ----

WRITE = """
import torch
from erase.models.single_file.architectures import shipped
from erase.models.single_file import write_single_file

architecture = shipped("sd1", "epsilon")
modules = architecture.modules()
for module in modules.values():
    for owner in module.modules():
        for name, weight in owner.named_parameters(recurse=False):
            value = torch.randn(weight.shape).mul_(0.02).half()
            owner.register_parameter(name, torch.nn.Parameter(value))
write_single_file(architecture.pipeline(modules), "{path}")
"""
LOAD = """
import resource, torch
from erase.models.single_file import load_single_file

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pipeline = load_single_file("{path}", {dtype})
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
size = sum(w.numel() * w.element_size() for part in parts for w in part.parameters())
print((peak - before) * 1024, size, before * 1024)
"""


def run_alone(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.slow
def test_a_stock_checkpoint_loads_within_one_copy_of_its_weights(tmp_path):
    """SD 1 at full size, without a configuration: 2.1 GB on disk, 2.1 or 4.3 GB in memory."""
    path = tmp_path / "sd1.safetensors"
    run_alone(WRITE.format(path=path))
    for dtype in ("torch.float16", "torch.float32"):
        grown, size, before = run_alone(LOAD.format(path=path, dtype=dtype))
        print(
            f"{dtype}: weights {size / 2**30:.2f} GiB, peak {grown / 2**30:.2f} GiB above the "
            f"{before / 2**30:.2f} GiB of the libraries"
        )
        assert 0.9 * size < grown < 1.15 * size
