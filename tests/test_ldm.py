"""The single-file layout: a bijection, the known keys of the originals, and diffusers' own
converters as the second opinion."""

from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import single_file_utils as theirs

from erase.models import CANVAS
from erase.models.single_file import ldm
from erase.models.single_file.architectures import from_folder, shipped
from erase.models.single_file.recognise import recognise
from erase.models.single_file.tensor_file import TensorFile
from erase.prompts.errors import ErasureError
from tests.families import tiny_sd1, tiny_sd2, tiny_sdxl

STOCK = [("sd1", "epsilon"), ("sd2", "epsilon"), ("sd2", "v_prediction"), ("sdxl", "epsilon")]
TINY = {"sd1": tiny_sd1, "sd2": tiny_sd2, "sdxl": tiny_sdxl}


@cache
def stock_modules(family, prediction="epsilon"):
    return shipped(family, prediction).modules()


def tiny_modules(family):
    pipeline = TINY[family]()
    return {name: getattr(pipeline, name) for name in ("unet", "vae", *ldm.TEXTS[family])}


def weights_of(modules):
    return {
        f"{part}.{name}": weight
        for part, module in modules.items()
        for name, weight in module.state_dict().items()
    }


def file_of(family, modules):
    """The tensors of a single file, on whatever device the modules are."""
    weights = weights_of(modules)
    return {
        entry.key: entry.pack([weights[name] for name in entry.names])
        for entry in ldm.table(family, modules)
    }


def read_by_diffusers(family, modules, file):
    """The same file through the converters of diffusers."""
    found = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(file), modules["unet"].config),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(file), modules["vae"].config),
    }
    for part, (layout, prefix) in ldm.TEXTS[family].items():
        if layout == "clip":
            text = theirs.convert_ldm_clip_checkpoint(dict(file))
        else:
            text = theirs.convert_open_clip_checkpoint(modules[part], dict(file), prefix)
        wrapped = hasattr(modules[part], "text_model")
        found[part] = (
            text
            if wrapped
            else {name.removeprefix("text_model."): weight for name, weight in text.items()}
        )
    return {
        f"{part}.{name}": weight for part, state in found.items() for name, weight in state.items()
    }


@pytest.mark.parametrize(("family", "prediction"), STOCK)
def test_at_full_size_diffusers_reads_our_keys_as_exactly_its_own(family, prediction):
    modules = stock_modules(family, prediction)
    expected = {name: weight.shape for name, weight in weights_of(modules).items()}
    found = read_by_diffusers(family, modules, file_of(family, modules))
    assert {name: weight.shape for name, weight in found.items()} == expected


@pytest.mark.parametrize(("family", "prediction"), STOCK)
def test_the_stock_families_are_recognised_by_their_own_keys(family, prediction):
    tensors = file_of(family, stock_modules(family, prediction))
    file = TensorFile(
        Path("x.safetensors"),
        {key: tuple(t.shape) for key, t in tensors.items()},
        tensors.__getitem__,
    )
    assert recognise(file, None) == family


@pytest.mark.parametrize("family", TINY)
def test_diffusers_reads_our_values_bit_for_bit(family):
    modules = tiny_modules(family)
    expected = weights_of(modules)
    found = read_by_diffusers(family, modules, file_of(family, modules))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("family", TINY)
def test_the_table_is_a_bijection(family):
    modules = tiny_modules(family)
    table, weights = ldm.table(family, modules), weights_of(modules)
    names = [name for entry in table for name in entry.names]
    assert sorted(names) == sorted(weights) and len({entry.key for entry in table}) == len(table)
    for entry in table:
        tensor = entry.pack([weights[name] for name in entry.names])
        assert tuple(tensor.shape) == entry.shape(tuple(weights[entry.names[0]].shape))
        assert all(
            torch.equal(back, weights[name])
            for back, name in zip(entry.unpack(tensor), entry.names, strict=True)
        )


def test_depths_other_than_the_stock_ones_have_places():
    modules = from_folder(CANVAS).modules()
    assert len(ldm.table("sd1", modules)) == len(weights_of(modules))


@pytest.mark.parametrize(
    ("family", "counts"),
    [("sd1", (686, 248, 196)), ("sd2", (686, 248, 280)), ("sdxl", (1680, 248, 196 + 389))],
)
def test_as_many_keys_as_the_originals_hold(family, counts):
    """sd_xl_base_1.0 has 2515: these 2513, CLIP's position ids and OpenCLIP's logit scale; SD 2 has
    12 keys more for its unused layer."""
    keys = [entry.key for entry in ldm.table(family, stock_modules(family))]
    inside = (ldm.UNET, ldm.VAE, ("cond_stage_model.", "conditioner."))
    assert tuple(sum(key.startswith(prefix) for key in keys) for prefix in inside) == counts


@pytest.mark.parametrize(
    ("family", "name", "key"),
    [
        ("sd1", "unet.conv_in.weight", "model.diffusion_model.input_blocks.0.0.weight"),
        ("sd1", "unet.down_blocks.0.downsamplers.0.conv.bias",
         "model.diffusion_model.input_blocks.3.0.op.bias"),
        ("sd1", "unet.up_blocks.0.upsamplers.0.conv.weight",
         "model.diffusion_model.output_blocks.2.1.conv.weight"),
        ("sd1", "unet.up_blocks.2.upsamplers.0.conv.weight",
         "model.diffusion_model.output_blocks.8.2.conv.weight"),
        ("sd1", "unet.up_blocks.3.resnets.2.conv_shortcut.weight",
         "model.diffusion_model.output_blocks.11.0.skip_connection.weight"),
        ("sd1", "unet.mid_block.resnets.1.norm2.bias",
         "model.diffusion_model.middle_block.2.out_layers.0.bias"),
        ("sd1", "vae.decoder.up_blocks.0.resnets.2.conv1.weight",
         "first_stage_model.decoder.up.3.block.2.conv1.weight"),
        ("sd1", "vae.encoder.mid_block.attentions.0.to_out.0.weight",
         "first_stage_model.encoder.mid.attn_1.proj_out.weight"),
        ("sd2", "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight",
         "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"),
        ("sd2", "text_encoder.encoder.layers.22.self_attn.k_proj.bias",
         "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_bias"),
        ("sdxl", "unet.add_embedding.linear_2.weight",
         "model.diffusion_model.label_emb.0.2.weight"),
        ("sdxl", "text_encoder_2.text_model.encoder.layers.9.mlp.fc2.bias",
         "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"),
        ("sdxl", "text_encoder_2.text_projection.weight",
         "conditioner.embedders.1.model.text_projection"),
    ],
)  # fmt: skip
def test_known_keys_of_the_originals(family, name, key):
    places = {
        ours: entry.key
        for entry in ldm.table(family, stock_modules(family))
        for ours in entry.names
    }
    # in versions of transformers that wrap it
    wrapped = name.replace("text_encoder.", "text_encoder.text_model.")
    assert places.get(name, places.get(wrapped)) == key


def test_the_moving_average_has_the_names_that_lit_ema_gives():
    table = ldm.ema_table(ldm.table("sd1", stock_modules("sd1")))
    assert "model_ema.diffusion_modelinput_blocks00weight" in {entry.key for entry in table}
    assert sum(entry.key.startswith("model_ema.") for entry in table) == 686
    assert len({entry.key for entry in table}) == len(table)


def test_only_what_the_pipeline_does_not_use_is_needless():
    modules = stock_modules("sd2")
    spare, text = ldm.spare_keys("sd2", modules), "cond_stage_model.model."
    unused = (
        "alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef2", "model_ema.decay",
        f"{text}logit_scale",
        f"{text}text_projection", f"{text}transformer.resblocks.23.ln_1.weight",
    )  # fmt: skip
    assert all(spare.fullmatch(key) for key in unused)
    assert not spare.fullmatch(
        f"{text}transformer.resblocks.24.ln_1.weight"
    ) and not spare.fullmatch("betas2")
    for family in TINY:
        modules = stock_modules(family)
        spare = ldm.spare_keys(family, modules)
        assert not [entry.key for entry in ldm.table(family, modules) if spare.fullmatch(entry.key)]


def test_a_weight_without_a_key_is_an_error():
    modules = tiny_modules("sd1")
    modules["unet"] = UNet2DConditionModel.from_config(
        modules["unet"].config, class_embed_type="timestep"
    )
    with pytest.raises(ErasureError, match=r"no key for unet\.class_embedding\.linear_1\.weight"):
        ldm.table("sd1", modules)
