"""FLUX.1's transformer in one file, in the layout of Black Forest Labs: a bijection, the one that
diffusers knows; in, out, and as what another program erased. And its LoRAs."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers as convert,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from erase.export import export_single_file
from erase.export.lora import extract_lora
from erase.models import load_model
from erase.models.single_file import write_single_file
from erase.prompts.errors import ErasureError
from tests.families import tiny_flux
from tests.test_clients import moved
from tests.test_round_trips import image
from tests.transformer_files import (
    check_drawn_by_its_card,
    check_read_as_erased,
    options,
    same,
    state,
)

WIDTH = 32
"""of the miniature, where diffusers' converter has 3072 written into it"""


@pytest.fixture(params=[True, False], ids=["dev", "schnell"])
def pipeline(request):
    return tiny_flux(guidance=request.param)


@pytest.fixture
def narrow(monkeypatch):
    """diffusers' converter for the miniature's width."""
    code = convert.__code__
    assert code.co_consts.count(3072) == 1
    constants = tuple(WIDTH if one == 3072 else one for one in code.co_consts)
    monkeypatch.setattr(convert, "__code__", code.replace(co_consts=constants))


@pytest.fixture
def folder(tmp_path):
    tiny_flux().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def file(tmp_path):
    return write_single_file(tiny_flux(), tmp_path / "flux.safetensors")


@pytest.mark.usefixtures("narrow")
def test_the_layout_is_the_one_that_diffusers_converts(pipeline, tmp_path):
    written = load_file(write_single_file(pipeline, tmp_path / "flux.safetensors"))
    assert same(convert(dict(written)), state(pipeline))


def test_the_header_tells_the_family(pipeline, tmp_path):
    with safe_open(write_single_file(pipeline, tmp_path / "flux.safetensors"), "pt") as opened:
        header = opened.metadata()
    dev = pipeline.transformer.config.guidance_embeds
    assert header["modelspec.architecture"] == ("flux-1-dev" if dev else "flux-1-schnell")
    assert header["modelspec.implementation"] == "https://github.com/black-forest-labs/flux"
    assert "modelspec.prediction_type" not in header


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_a_file_is_read_as_the_folder_is(pipeline, prefix, tmp_path):
    pipeline.save_pretrained(tmp_path / "base")
    tensors = load_file(write_single_file(pipeline, tmp_path / "flux.safetensors"))
    path = tmp_path / "named.safetensors"
    save_file({prefix + key: tensor for key, tensor in tensors.items()}, path)
    whole = load_model(tmp_path / "base")
    shutil.rmtree(tmp_path / "base/transformer")
    (tmp_path / "base/transformer").mkdir()
    pipeline.transformer.save_config(tmp_path / "base/transformer")  # no weights are needed there
    model = load_model(path, options=options(tmp_path / "base"))
    assert same(state(model.pipeline()), state(pipeline))
    assert model.fingerprint == whole.fingerprint
    cond = model.encode(["a moon"])
    given = torch.ones(1, *model.latent_shape), torch.tensor([500])
    assert torch.equal(model.predict(*given, cond), whole.predict(*given, cond))


@pytest.mark.usefixtures("narrow")
def test_an_erased_transformer_draws_in_stock_diffusers_what_it_draws_here(folder, tmp_path):
    check_drawn_by_its_card(folder, tmp_path, image)


def test_a_delta_of_a_text_encoder_is_refused(folder, tmp_path):
    delta = moved(load_model(folder), "mlp.fc1")
    with pytest.raises(ErasureError, match="its transformer alone, and .* changes text_encoder"):
        export_single_file(delta, str(folder), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_what_another_program_erased_is_read_from_its_file(tmp_path):
    check_read_as_erased(tiny_flux, tmp_path)


# ---- what is refused ----


def test_a_file_needs_the_folder_of_the_rest(file, folder, tmp_path):
    with pytest.raises(ErasureError, match="FLUX.1's transformer, and not its whole"):
        load_model(file)
    with pytest.raises(ErasureError, match="load.prediction says nothing"):
        load_model(file, options=options(folder, prediction="epsilon"))
    broken = tiny_flux()
    broken.vae.decoder.conv_in.bias[0] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ErasureError, match="vae.decoder.conv_in.bias holds 1 values that are not"):
        load_model(file, options=options(tmp_path / "broken"))
    tiny_flux(guidance=False).save_pretrained(tmp_path / "schnell")
    with pytest.raises(ErasureError, match="has no place, the first is guidance_in.in_layer.bias"):
        load_model(file, options=options(tmp_path / "schnell"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("img_in.weight"), "lacks 1 of the .*img_in.weight"),
        (lambda t: t.update(stranger=torch.ones(1)), "has no place, the first is stranger"),
        (lambda t: t.update({"x.scale_weight": torch.ones(1)}), "in scaled float8"),
        (lambda t: t["img_in.bias"].fill_(torch.nan), "NaN or infinite"),
        (lambda t: t.update({"img_in.bias": torch.ones(3)}), "img_in.bias should have the shape"),
    ],
    ids=["missing", "surplus", "quantised", "nan", "shape"],
)
def test_damaged_files_are_named(change, message, file, folder, tmp_path):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, tmp_path / "damaged.safetensors")
    with pytest.raises(ErasureError, match=message):
        load_model(tmp_path / "damaged.safetensors", options=options(folder))


# ---- LoRA ----


def test_a_lora_holds_what_its_programs_load(folder, tmp_path):
    """All linear layers of the transformer and of CLIP, under the names of diffusers, which ComfyUI
    reads too; diffusers has no place for a T5's."""
    base = load_model(folder)
    lora = extract_lora(moved(base), base, rank=4)
    lora.save(tmp_path / "lora.safetensors")
    parts = {name.split(".")[0] for name in lora.down}
    assert lora.layout == "diffusers" and parts == {"transformer", "text_encoder"}
    linear = {
        f"transformer.{name}"
        for name, module in base.component("transformer").named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert {name for name in lora.down if name.startswith("transformer.")} == linear
    assert any(name.startswith("text_encoder_2.") for name in lora.left_out)
    with safe_open(tmp_path / "lora.safetensors", "pt") as opened:
        keys, header = set(opened.keys()), opened.metadata()
    names = {name.replace("text_encoder.", "text_encoder.text_model.") for name in lora.down}
    assert {f"{name}.lora_{factor}.weight" for name in names for factor in "AB"} == keys
    assert header["modelspec.architecture"] == "flux-1-dev/lora"
