"""Z-Image's transformer in one file, as ComfyUI reads it: a bijection, the one that diffusers
knows; in, out, and as what another program erased."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_z_image_transformer_checkpoint_to_diffusers as convert,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from erase.export import export_single_file
from erase.models import load_model
from erase.models.single_file import write_single_file
from erase.prompts.errors import ErasureError
from tests.families import tiny_flux
from tests.flow_families import tiny_z_image
from tests.test_clients import moved
from tests.test_flow_files import image
from tests.transformer_files import (
    check_drawn_by_its_card,
    check_read_as_erased,
    options,
    same,
    state,
)

pytestmark = pytest.mark.usefixtures("short_chat")


@pytest.fixture
def folder(tmp_path):
    tiny_z_image().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def file(tmp_path):
    return write_single_file(tiny_z_image(), tmp_path / "z_image.safetensors")


def test_the_layout_is_the_one_that_diffusers_converts(file):
    assert same(convert(load_file(file)), state(tiny_z_image()))
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    assert header["modelspec.architecture"] == "Z-Image"
    assert header["modelspec.implementation"] == "https://github.com/Tongyi-MAI/Z-Image"


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_a_file_is_read_as_the_folder_is(prefix, file, folder, tmp_path):
    tensors = load_file(file) | {"norm_final.weight": torch.ones(32)}  # of published files
    path = tmp_path / "named.safetensors"
    save_file({prefix + key: tensor for key, tensor in tensors.items()}, path)
    whole = load_model(folder)
    shutil.rmtree(folder / "transformer")
    (folder / "transformer").mkdir()
    tiny_z_image().transformer.save_config(folder / "transformer")  # no weights are needed there
    model = load_model(path, options=options(folder))
    assert same(state(model.pipeline()), state(tiny_z_image()))
    assert model.fingerprint == whole.fingerprint
    given = torch.ones(1, *model.latent_shape), torch.tensor([500]), model.encode(["a moon"])
    assert torch.equal(model.predict(*given), whole.predict(*given))


def test_an_erased_transformer_draws_in_stock_diffusers_what_it_draws_here(folder, tmp_path):
    check_drawn_by_its_card(folder, tmp_path, image)


def test_a_delta_of_a_text_encoder_is_refused(folder, tmp_path):
    delta = moved(load_model(folder), "up_proj")
    with pytest.raises(ErasureError, match="Z-Image holds its .* alone, and .* changes text_enc"):
        export_single_file(delta, str(folder), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_what_another_program_erased_is_read_from_its_file(tmp_path):
    check_read_as_erased(tiny_z_image, tmp_path)


# ---- what is refused ----


def test_a_file_needs_the_folder_of_the_rest(file, tmp_path):
    with pytest.raises(ErasureError, match="Z-Image's transformer, and not its whole"):
        load_model(file)
    tiny_flux().save_pretrained(tmp_path / "flux")
    with pytest.raises(ErasureError, match="is a FluxPipeline; name a folder of Z-Image"):
        load_model(file, options=options(tmp_path / "flux"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("x_embedder.weight"), "lacks 1 of the .*x_embedder.weight"),
        (lambda t: t.update(stranger=torch.ones(1)), "has no place, the first is stranger"),
        (lambda t: t.update({"x.scale_weight": torch.ones(1)}), "in scaled float8"),
        (lambda t: t["x_embedder.bias"].fill_(torch.nan), "NaN or infinite"),
        (lambda t: t.update({"x_embedder.bias": torch.ones(3)}), "bias should have the shape"),
    ],
    ids=["missing", "surplus", "quantised", "nan", "shape"],
)
def test_damaged_files_are_named(change, message, file, folder, tmp_path):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, tmp_path / "damaged.safetensors")
    with pytest.raises(ErasureError, match=message):
        load_model(tmp_path / "damaged.safetensors", options=options(folder))
