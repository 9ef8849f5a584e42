"""Stable Diffusion 3 with its text encoders in one file, as `sd3_medium_incl_clips.safetensors` and
`..._t5xxlfp16.safetensors` have them."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import load_file, save_file

from erase.models import LoadConfig, load_model
from erase.models.pipelines import modules
from erase.models.single_file import mmdit
from erase.models.single_file.layouts import layout_of
from erase.models.single_file.ldm import UNET
from erase.prompts.errors import ErasureError
from tests.families import small_vae, tiny_sd3
from tests.single_file_fixtures import same, weights
from tests.transformer_files import check_read_as_erased, options


def square_sd3(**more):
    """One whose first CLIP has no projection, as all published ones have none."""
    pipeline = tiny_sd3(projection=16, **more)
    pipeline.text_encoder.text_projection.weight.copy_(torch.eye(16))
    return pipeline


def written(pipeline, path, spare=True):
    """All parts of a pipeline in one file, and what such files hold that no program uses."""
    layout, parts = layout_of(pipeline), modules(pipeline)
    states = weights(pipeline)
    tensors = {
        entry.key: entry.pack([states[name] for name in entry.names]).clone()
        for entry in layout.entries(parts, UNET)
    }
    if spare:
        tensors[mmdit.CLIP_L + "text_projection.weight"] = torch.ones(16, 16)
        tensors["text_encoders.clip_g.logit_scale"] = torch.ones(())
        tensors[mmdit.T5 + "encoder.embed_tokens.weight"] = torch.ones(1)
    save_file(tensors, path)
    return path


@pytest.fixture
def folder(tmp_path):
    """A folder without any weights."""
    square_sd3().save_pretrained(tmp_path / "base")
    for file in (tmp_path / "base").rglob("*.safetensors"):
        file.unlink()
    return tmp_path / "base"


@pytest.fixture
def file(tmp_path):
    return written(square_sd3(), tmp_path / "all.safetensors")


def test_all_parts_are_read_and_none_of_the_folder(file, folder):
    pipeline = load_model(file, options=options(folder)).pipeline()
    assert same(weights(pipeline), weights(square_sd3()))
    encoder = pipeline.text_encoder_3
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight


def test_the_keys_are_those_that_diffusers_converts(tmp_path):
    pipeline = square_sd3()
    tensors = load_file(written(pipeline, tmp_path / "all.safetensors", spare=False))
    for part, prefix in (("text_encoder", mmdit.CLIP_L), ("text_encoder_2", mmdit.CLIP_G)):
        found = theirs.convert_ldm_clip_checkpoint(dict(tensors), prefix)
        own = dict(getattr(pipeline, part).state_dict())
        if part == "text_encoder":
            del own["text_projection.weight"]
        assert same(found, own)
    own = dict(pipeline.text_encoder_3.state_dict())
    own.pop("encoder.embed_tokens.weight", None)
    assert same(theirs.convert_sd3_t5_checkpoint_to_diffusers(dict(tensors)), own)
    vae = theirs.convert_ldm_vae_checkpoint(dict(tensors), pipeline.vae.config)
    assert same(vae, pipeline.vae.state_dict())


def test_in_half_precision_the_same_layers_stay_wide_as_from_the_folder(file, folder):
    square_sd3().save_pretrained(folder)
    whole = load_model(folder, options=LoadConfig(dtype="float16"))
    model = load_model(file, options=options(folder, dtype="float16"))
    found, own = (weights(one.pipeline()) for one in (model, whole))
    assert {name: w.dtype for name, w in found.items()} == {n: w.dtype for n, w in own.items()}
    wide = {name for name, weight in found.items() if weight.dtype == torch.float32}
    assert wide and all(name.startswith("text_encoder_3.") for name in wide)
    assert same(found, own)


def test_what_another_program_erased_is_read_in_all_parts(tmp_path, caplog):
    read = check_read_as_erased(square_sd3, tmp_path, "mlp.fc1", written)
    assert {"text_encoder", "text_encoder_2"} == set(read.components)
    assert "left out" not in caplog.text


@pytest.mark.parametrize(
    ("ignored", "part"),
    [
        ("text_encoders.t5xxl", "text_encoder_3"),
        ("text_encoders.clip_l.transformer.text_model", "text_encoder"),
        ("first_stage_model", "vae"),
    ],
)
def test_what_is_ignored_comes_from_the_folder(ignored, part, file, folder):
    other = square_sd3(seed=1)
    other.save_pretrained(folder)
    read = load_model(file, options=options(folder, ignore=ignored))
    found, own, theirs = (weights(one) for one in (read.pipeline(), square_sd3(), other))
    expected = {name: (theirs if name.startswith(f"{part}.") else own)[name] for name in own}
    assert same(found, expected) and not same(found, own)


def test_another_vae_takes_the_place_of_the_files_own(file, folder, tmp_path):
    shift = {"shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False}
    vae = small_vae(1.5305, latent_channels=16, **shift)
    vae.save_pretrained(tmp_path / "vae")
    model = load_model(file, options=options(folder, vae=str(tmp_path / "vae")))
    assert same(model.pipeline().vae.state_dict(), vae.state_dict())


def test_a_text_encoder_that_the_folder_has_not_is_refused(file, folder, tmp_path):
    square_sd3(t5=False).save_pretrained(tmp_path / "two")
    with pytest.raises(ErasureError, match=r"holds a text_encoder_3, which .* has not.*t5xxl"):
        load_model(file, options=options(tmp_path / "two"))
    model = load_model(file, options=options(tmp_path / "two", ignore="text_encoders.t5xxl"))
    assert model.pipeline().text_encoder_3 is None


def test_a_first_clip_with_a_projection_is_refused(file, folder):
    tiny_sd3().text_encoder.config.save_pretrained(folder / "text_encoder")
    with pytest.raises(ErasureError, match="is not projected, and .* projects 16 values to 40"):
        load_model(file, options=options(folder))


def test_a_damaged_text_encoder_is_named(file, folder, tmp_path):
    tensors, key = load_file(file), mmdit.CLIP_G + "text_projection.weight"
    save_file({name: t for name, t in tensors.items() if name != key}, tmp_path / "d.safetensors")
    with pytest.raises(ErasureError, match=f"lacks 1 of the .*{key}"):
        load_model(tmp_path / "d.safetensors", options=options(folder))
    edited = folder / "text_encoder_3/config.json"
    edited.write_text('{"d_model": "wide"}')
    with pytest.raises(ErasureError, match="describes no text_encoder_3 of Stable Diffusion 3"):
        load_model(file, options=options(folder))
