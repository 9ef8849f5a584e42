"""Transformers of SD 3, FLUX.2 klein and Qwen-Image in files: a bijection, the one that diffusers
knows; in, out, and as what another program erased. Of FLUX.1 and Z-Image see their own tests."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders import single_file_utils as theirs
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from erase.export import export_single_file
from erase.models import load_model
from erase.models.single_file import bfl, mmdit, qwen_image, write_single_file
from erase.prompts.errors import ErasureError
from tests import test_flow_files, test_round_trips
from tests.families import stirred, tiny_flux, tiny_sd3
from tests.flow_families import tiny_klein, tiny_qwen_image
from tests.test_clients import moved
from tests.transformer_files import (
    check_drawn_by_its_card,
    check_read_as_erased,
    options,
    same,
    state,
)

pytestmark = pytest.mark.usefixtures("short_chat", "small")
small = test_flow_files.small
PREFIX = "model.diffusion_model."
MAKE = {"sd3": tiny_sd3, "klein": tiny_klein, "qwen-image": tiny_qwen_image}
NAME = {"sd3": "Stable Diffusion 3", "klein": "FLUX.2 klein", "qwen-image": "Qwen-Image"}
HEADER = {
    "sd3": ("stable-diffusion-3", "https://github.com/Stability-AI/sd3.5"),
    "klein": ("flux-2-klein", "https://github.com/black-forest-labs/flux2"),
    "qwen-image": ("Qwen-Image", "diffusers"),
}
ANY = {"sd3": "context_embedder", "klein": "txt_in", "qwen-image": "txt_in"}
"""a layer of each layout"""


@pytest.fixture(params=MAKE)
def family(request):
    return request.param


@pytest.fixture
def folder(family, tmp_path):
    MAKE[family]().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def file(family, tmp_path):
    return write_single_file(MAKE[family](), tmp_path / "file.safetensors")


def converted(family, tensors):
    """What diffusers reads in a file."""
    if family == "sd3":
        return theirs.convert_sd3_transformer_checkpoint_to_diffusers(tensors)
    if family == "klein":
        return theirs.convert_flux2_transformer_checkpoint_to_diffusers(tensors)
    return tensors


def test_the_layout_is_the_one_that_diffusers_converts(family, file):
    pipeline, tensors = MAKE[family](), load_file(file)
    if family == "sd3":
        vae = theirs.convert_ldm_vae_checkpoint(dict(tensors), pipeline.vae.config)
        assert same(vae, pipeline.vae.state_dict())
    assert same(converted(family, tensors), state(pipeline))
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    said = header["modelspec.architecture"], header["modelspec.implementation"]
    assert said == HEADER[family]


def test_the_first_stable_diffusion_3_has_no_norms_in_its_attention(tmp_path):
    pipeline = tiny_sd3()
    config = {**pipeline.transformer.config, "qk_norm": None, "dual_attention_layers": ()}
    pipeline.transformer = SD3Transformer2DModel.from_config(config)
    stirred(pipeline)
    tensors = load_file(write_single_file(pipeline, tmp_path / "file.safetensors"))
    assert not any("ln_q" in key or "attn2" in key for key in tensors)
    assert same(converted("sd3", tensors), state(pipeline))


def test_the_keys_are_those_of_the_original_programs():
    """Written down from Stability-AI/sd3.5, black-forest-labs/flux2 and ComfyUI."""

    def keys(table, pipeline, beginning):
        found = {entry.key for entry in table(pipeline.transformer)}
        return {key.removeprefix(beginning) for key in found if key.startswith(beginning)}

    def both(*layers):
        return {f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")}

    last = both("attn.qkv", "adaLN_modulation.1") | {"attn.ln_q.weight", "attn.ln_k.weight"}
    assert keys(mmdit.table, tiny_sd3(), "joint_blocks.2.context_block.") == last
    whole = last | both("attn.proj", "mlp.fc1", "mlp.fc2")
    assert keys(mmdit.table, tiny_sd3(), "joint_blocks.1.x_block.") == whole
    norms = {"norm.query_norm.scale", "norm.key_norm.scale"}
    single = {"linear1.weight", "linear2.weight", *norms}
    assert keys(bfl.flux2, tiny_klein(), "single_blocks.1.") == single
    streams = {f"{stream}_{part}" for stream in ("img", "txt") for part in ("mlp.0", "mlp.2")}
    attention = {"qkv.weight", "proj.weight", *norms}
    double = {f"{one}.weight" for one in streams}
    double |= {f"{stream}_attn.{one}" for stream in ("img", "txt") for one in attention}
    assert keys(bfl.flux2, tiny_klein(), "double_blocks.0.") == double
    block = both(*(f"attn.{one}" for one in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")))
    block |= both(*(f"attn.add_{one}_proj" for one in "qkv"))
    block |= {f"attn.norm_{one}.weight" for one in ("q", "k", "added_q", "added_k")}
    for stream in ("img", "txt"):
        block |= both(f"{stream}_mod.1", f"{stream}_mlp.net.0.proj", f"{stream}_mlp.net.2")
    assert keys(qwen_image.table, tiny_qwen_image(), "transformer_blocks.1.") == block


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_file_is_read_as_the_folder_is(family, prefix, file, folder, tmp_path):
    parts = ["transformer", *(["vae"] if family == "sd3" else [])]
    bare = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(file).items()}
    path = tmp_path / "named.safetensors"
    beside = ("first_stage_model.",)
    save_file({k if k.startswith(beside) else prefix + k: t for k, t in bare.items()}, path)
    whole, pipeline = load_model(folder), MAKE[family]()
    for part in parts:  # no weights are needed there
        shutil.rmtree(folder / part)
        (folder / part).mkdir()
        getattr(pipeline, part).save_config(folder / part)
    model = load_model(path, options=options(folder))
    for part in parts:
        mine, own = (getattr(one, part).state_dict() for one in (model.pipeline(), pipeline))
        assert same(mine, own)
    assert model.fingerprint == whole.fingerprint
    given = torch.ones(1, *model.latent_shape), torch.tensor([500]), model.encode(["a moon"])
    assert torch.equal(model.predict(*given), whole.predict(*given))


def test_an_erased_transformer_draws_in_stock_diffusers_what_it_draws_here(
    family, folder, tmp_path
):
    image = test_round_trips.image if family == "sd3" else test_flow_files.image
    check_drawn_by_its_card(folder, tmp_path, image)


def test_a_delta_of_a_text_encoder_is_refused(family, folder, tmp_path):
    delta = moved(load_model(folder), "mlp.fc1" if family == "sd3" else "up_proj")
    held = "transformer and VAE" if family == "sd3" else "transformer alone"
    with pytest.raises(ErasureError, match=f"holds its {held}, and .* changes text_encoder"):
        export_single_file(delta, str(folder), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_what_another_program_erased_is_read_from_its_file(family, tmp_path, caplog):
    check_read_as_erased(MAKE[family], tmp_path)
    assert "left out" not in caplog.text


# ---- what is refused ----


def test_a_file_needs_the_folder_of_the_rest(family, file, folder, tmp_path):
    with pytest.raises(ErasureError, match=f"{NAME[family]}'s transformer, and not its whole"):
        load_model(file)
    with pytest.raises(ErasureError, match="load.prediction says nothing"):
        load_model(file, options=options(folder, prediction="epsilon"))
    tiny_flux().save_pretrained(tmp_path / "flux")
    with pytest.raises(ErasureError, match=f"is a FluxPipeline; name a folder of {NAME[family]}"):
        load_model(file, options=options(tmp_path / "flux"))


DAMAGES = {
    "missing": (lambda t, key: t.pop(f"{key}.weight"), "lacks 1 of the .*{key}.weight"),
    "surplus": (lambda t, key: t.update(stranger=torch.ones(1)), "no place, the first is stranger"),
    "scaled": (lambda t, key: t.update({"x.scale_weight": torch.ones(1)}), "in scaled float8"),
    "float8": (
        lambda t, key: t.update({f"{key}.weight": t[f"{key}.weight"].to(torch.float8_e4m3fn)}),
        "{key}.weight holds torch.float8_e4m3fn",
    ),
    "nan": (lambda t, key: t[f"{key}.weight"].fill_(torch.nan), "NaN or infinite"),
    "shape": (lambda t, key: t.update({f"{key}.weight": torch.ones(3)}), "should have the shape"),
    "controlnet": (
        lambda t, key: t.update({"controlnet_blocks.0.weight": torch.ones(1)}),
        "is a ControlNet",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named(damage, family, file, folder, tmp_path):
    tensors, (change, message) = load_file(file), DAMAGES[damage]
    change(tensors, (PREFIX if family == "sd3" else "") + ANY[family])
    save_file(tensors, tmp_path / "damaged.safetensors")
    with pytest.raises(ErasureError, match=message.format(key=ANY[family])):
        load_model(tmp_path / "damaged.safetensors", options=options(folder))


@pytest.mark.parametrize(
    ("family", "key", "message"),
    [
        ("klein", "guidance_in.in_layer.weight", "is FLUX.2 dev"),
        ("qwen-image", "__index_timestep_zero__", r"Qwen-Image-Edit 2511"),
        ("qwen-image", "time_text_embed.addition_t_embedding.weight", "Qwen-Image-Layered"),
    ],
)
def test_siblings_are_refused_by_name(family, key, message, file, folder, tmp_path):
    save_file(load_file(file) | {PREFIX + key: torch.ones(1)}, tmp_path / "sibling.safetensors")
    with pytest.raises(ErasureError, match=message):
        load_model(tmp_path / "sibling.safetensors", options=options(folder))
