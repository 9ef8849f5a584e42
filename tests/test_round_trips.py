"""Every family through every format: load, erase two steps, export, load in stock diffusers, same
image. The table is docs/formats.md."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from safetensors.torch import load_file

from erase.delta import ErasedDelta
from erase.export import (
    export_components,
    export_delta,
    export_diffusers,
    export_lora,
    export_single_file,
)
from erase.export.lora import extract_lora
from erase.models import LoadConfig, load_model
from tests.families import tiny_flux, tiny_sd1, tiny_sd2, tiny_sd3, tiny_sdxl
from tests.made import maker
from tests.transformer_files import check_file_both_ways

FAMILIES = {
    "sd1": tiny_sd1,
    "sd2": tiny_sd2,
    "sd2-v": lambda: tiny_sd2(prediction="v_prediction"),
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
}
# the files of flow transformers hold no text encoders (tests/test_transformer_files.py)
FLOW = ("sd3", "flux")
SINGLE = [family for family in FAMILIES if family not in FLOW]


def image(pipeline) -> np.ndarray:
    """Pixels in [0, 1] of a stock call. Weights that diffusers maps from a file lie at odd
    addresses, which moves the last bits of sums; copied, the same weights give the same bits."""
    for part in pipeline.components.values():
        for weight in part.parameters() if isinstance(part, torch.nn.Module) else ():
            weight.data = weight.data.clone()
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    # FLUX's pipeline draws 1024 pixels whatever its parts say
    size = {"height": 64, "width": 64} if isinstance(pipeline, FluxPipeline) else {}
    return pipeline(
        "a red heart",
        **size,
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=generator,
        output_type="np",
    ).images[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return maker(FAMILIES, image, tmp_path_factory)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_folder(made, family, tmp_path):
    it = made(family)
    export_diffusers(it.delta, str(it.base), tmp_path / "out")
    assert np.array_equal(image(DiffusionPipeline.from_pretrained(tmp_path / "out")), it.image)
    assert not np.array_equal(it.plain, it.image)


@pytest.mark.parametrize("family", FAMILIES)
def test_components(made, family, tmp_path):
    it = made(family)
    export_components(it.delta, str(it.base), tmp_path / "out")
    denoiser = "transformer" if family in FLOW else "unet"
    kind = type(getattr(FAMILIES[family](), denoiser))
    part = kind.from_pretrained(tmp_path / "out" / denoiser)
    assert np.array_equal(
        image(DiffusionPipeline.from_pretrained(it.base, **{denoiser: part})), it.image
    )


@pytest.mark.parametrize("family", SINGLE)
def test_single_file(made, family, tmp_path):
    it = made(family)
    export_single_file(it.delta, str(it.base), tmp_path / "out.safetensors")
    assert np.array_equal(image(it.stock(tmp_path / "out.safetensors")), it.image)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora(made, family, tmp_path):
    """At full rank a LoRA holds all but biases and norms; stock diffusers with it draws what base +
    LoRA as a delta draws."""
    pytest.importorskip("peft")
    it = made(family)
    lora = extract_lora(it.delta, load_model(it.base), rank=8)
    export_lora(lora, tmp_path / "lora")
    pipeline = DiffusionPipeline.from_pretrained(it.base)
    pipeline.load_lora_weights(tmp_path / "lora")
    ours = image(lora.as_delta(load_model(it.base)).apply(load_model(it.base)).pipeline())
    assert np.abs(image(pipeline) - ours).max() < 1e-3
    assert not np.array_equal(ours, it.plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_delta(made, family, tmp_path):
    it = made(family)
    export_delta(it.delta, tmp_path / "out.safetensors")
    model = ErasedDelta.load(tmp_path / "out.safetensors").apply(load_model(it.base))
    assert np.array_equal(image(model.pipeline()), it.image)


@pytest.mark.parametrize("family", SINGLE)
def test_a_base_in_one_file_gives_the_same_delta(made, family, tmp_path):
    it, path = made(family), tmp_path / "base.safetensors"
    it.write_base(path)
    delta = it.from_one_file(path, tmp_path / "run")
    assert delta.sha256 == it.delta.sha256
    # the base is read as the delta says it was
    export_diffusers(delta, str(path), tmp_path / "out")
    assert np.array_equal(image(DiffusionPipeline.from_pretrained(tmp_path / "out")), it.image)


@pytest.mark.parametrize("family", SINGLE)
def test_a_pickled_base_in_one_file_is_the_same_base(made, family, tmp_path):
    it = made(family)
    weights = load_file(it.write_base(tmp_path / "base.safetensors"))
    torch.save({"state_dict": weights}, tmp_path / "base.ckpt")
    options = LoadConfig(config=str(it.base))
    model = it.delta.apply(load_model(tmp_path / "base.ckpt", options=options))
    assert np.array_equal(image(model.pipeline()), it.image)


@pytest.mark.parametrize("family", FLOW)
def test_a_transformer_in_a_file_gives_the_same_delta_and_image(made, family, tmp_path):
    check_file_both_ways(made(family), tmp_path, image)
