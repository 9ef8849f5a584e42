"""Every family through every format: load, erase two steps, export, load in stock diffusers, same
image. The table is docs/formats.md."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline

from erase.delta import ErasedDelta
from erase.export import (
    export_components,
    export_delta,
    export_diffusers,
    export_lora,
    export_single_file,
)
from erase.export.lora import extract_lora
from erase.latents.prepare import LatentConfig
from erase.methods.salun import SalUnConfig
from erase.models import LoadConfig, load_model
from erase.models.single_file import write_single_file
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.run import EraseConfig, erase_concept
from erase.training.config import MaskConfig, TrainConfig
from tests.families import tiny_flux, tiny_sd1, tiny_sd2, tiny_sd3, tiny_sdxl

FAMILIES = {
    "sd1": tiny_sd1,
    "sd2": tiny_sd2,
    "sd2-v": lambda: tiny_sd2(prediction="v_prediction"),
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
}
# SD 3 is read and written as a folder only, and of FLUX.1 a single file holds the transformer alone
# (tests/test_flux_files.py)
SINGLE = [family for family in FAMILIES if family not in ("sd3", "flux")]
CONCEPT = ConceptSpec("heart", "star", retain=("a red house", "a blue moon"))
QUICK = EraseConfig(latents=LatentConfig(n_forget=4, n_retain=4, steps=2))
METHOD = SalUnConfig(
    mask=MaskConfig(batch_size=4), train=TrainConfig(steps=2, batch_size=2, lr=1e-3)
)


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


class Made:
    """A family's base folder, its delta, and the erased model's image in memory."""

    def __init__(self, family: str, folder) -> None:
        self.base, self.kind = folder / "base", type(FAMILIES[family]()).__name__
        FAMILIES[family]().save_pretrained(self.base)
        model = load_model(self.base)
        self.plain = image(model.pipeline())
        self.delta = erase_concept(CONCEPT, QUICK, METHOD, model=model, out=folder / "run")
        self.image = image(self.delta.apply(model).pipeline())

    def stock(self, path) -> DiffusionPipeline:
        """A single file through stock diffusers, its configs from the base's folder."""
        return getattr(diffusers, self.kind).from_single_file(
            path, config=str(self.base), local_files_only=True
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    found: dict[str, Made] = {}

    def make(family: str) -> Made:
        if family not in found:
            found[family] = Made(family, tmp_path_factory.mktemp(family))
        return found[family]

    return make


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
    denoiser = "transformer" if family in ("sd3", "flux") else "unet"
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


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("family", SINGLE)
def test_a_base_in_one_file_gives_the_same_delta(made, family, suffix, tmp_path):
    it, path = made(family), tmp_path / f"base{suffix}"
    write_single_file(FAMILIES[family](), tmp_path / "base.safetensors")
    if suffix == ".ckpt":
        from safetensors.torch import load_file

        torch.save({"state_dict": load_file(tmp_path / "base.safetensors")}, path)
    config = EraseConfig(
        model=str(path), latents=QUICK.latents, load=LoadConfig(config=str(it.base))
    )
    delta = erase_concept(CONCEPT, config, METHOD, out=tmp_path / "run")
    assert delta.sha256 == it.delta.sha256
    # the base is read as the delta says it was
    export_diffusers(delta, str(path), tmp_path / "out")
    assert np.array_equal(image(DiffusionPipeline.from_pretrained(tmp_path / "out")), it.image)


def test_stable_diffusion_3_in_one_file_is_refused(made, tmp_path):
    it = made("sd3")
    with pytest.raises(
        ErasureError, match="StableDiffusion3Pipeline cannot be written as a single file"
    ):
        export_single_file(it.delta, str(it.base), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
