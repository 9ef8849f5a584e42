"""Single-file checkpoints: the prediction type is never guessed, and what is not a checkpoint of
these families is called by its name."""

from pathlib import Path

import pytest

from erase.models.single_file import ldm, load_single_file
from erase.models.single_file.recognise import decide_prediction, recognise
from erase.models.single_file.tensor_file import TensorFile
from erase.prompts.errors import ErasureError
from tests.single_file_fixtures import made as made

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"


# ---- prediction type ----


def sd2_file(metadata=None, step=None, extra=()):
    """The header of a whole SD 2 checkpoint of stock widths."""
    keys = {
        CONV_IN: (320, 4, 3, 3),
        f"{ldm.UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
    }
    keys |= {f"{ldm.VAE}quant_conv.bias": (8,), "cond_stage_model.model.ln_final.bias": (1024,)} | {
        key: (0,) for key in extra
    }
    return TensorFile(Path("sd2.ckpt"), keys, lambda key: None, metadata or {}, step)


@pytest.mark.parametrize(
    ("file", "stated", "asked", "expected"),
    [
        (sd2_file(), None, "epsilon", "epsilon"),
        (sd2_file(), None, "v_prediction", "v_prediction"),
        (sd2_file(), "v_prediction", None, "v_prediction"),
        (sd2_file(step=875_000), None, None, "epsilon"),
        (sd2_file(step=110_000), None, None, "v_prediction"),
        (sd2_file({"modelspec.prediction_type": "v"}), None, None, "v_prediction"),
        (sd2_file({"modelspec.prediction_type": "epsilon"}), None, None, "epsilon"),
        (sd2_file(extra=["v_pred"]), None, None, "v_prediction"),
        (sd2_file(step=875_000), "epsilon", "v_prediction", "v_prediction"),
    ],
)
def test_the_prediction_type_of_sd2_is_what_is_said(file, stated, asked, expected):
    assert recognise(file, None) == "sd2"
    assert decide_prediction(file, "sd2", stated, asked) == expected


@pytest.mark.parametrize(
    ("file", "stated", "asked", "message"),
    [
        (sd2_file(), None, None, "load.prediction=epsilon or load.prediction=v_prediction"),
        (sd2_file(step=220_000), None, None, "nothing in it tells"),
        (
            sd2_file(step=875_000),
            "v_prediction",
            None,
            "says epsilon, but its configuration v_prediction",
        ),
        (sd2_file(), None, "v_predictio", "did you mean 'v_prediction'"),
    ],
)
def test_the_prediction_type_of_sd2_is_never_guessed(file, stated, asked, message):
    with pytest.raises(ErasureError, match=message):
        decide_prediction(file, "sd2", stated, asked)


def test_what_the_writer_says_of_prediction_the_reader_hears(made):
    _, config, _ = made("sd2")
    _, _, path = made("sd2-v")
    with pytest.raises(ErasureError, match="says v_prediction, but its configuration epsilon"):
        load_single_file(path, config=config)
    assert (
        load_single_file(
            path, config=config, prediction="v_prediction"
        ).scheduler.config.prediction_type
        == "v_prediction"
    )


# ---- what is not a checkpoint of these families ----


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({CONV_IN: (320, 9, 3, 3)}, "an inpainting model"),
        ({CONV_IN: (320, 8, 3, 3)}, "an image-editing model"),
        ({f"{ldm.UNET}label_emb.0.0.weight": (1280, 1024)}, "Stable unCLIP"),
        ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320)}, "a LoRA"),
        ({"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": (4, 320)}, "a LoRA"),
        (
            {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536)},
            "Stable Diffusion 3",
        ),
        ({"double_blocks.0.img_attn_qkv.weight": (9216, 3072)}, "of the Flux family"),
        ({"control_model.time_embed.0.weight": (1280, 320)}, "a ControlNet"),
        ({"edm_mean": (4,)}, "an EDM model"),
    ],
)
def test_foreign_checkpoints_are_called_by_their_names(keys, what):
    file = sd2_file()
    file.shapes.update(keys)
    with pytest.raises(ErasureError, match=what):
        recognise(file, None)


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"input_blocks.0.0.weight": (320, 4, 3, 3)}, "a bare UNet"),
        ({CONV_IN: (320, 4, 3, 3)}, "a bare UNet"),
        (
            {"down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3)},
            "a bare UNet in the names of diffusers",
        ),
        ({f"{ldm.VAE}decoder.conv_in.weight": (512, 4, 3, 3)}, "a bare VAE"),
        ({"encoder.down.0.block.0.conv1.weight": (128, 128, 3, 3)}, "a bare VAE"),
        ({"text_model.embeddings.token_embedding.weight": (49408, 768)}, "a bare text encoder"),
        (
            {CONV_IN: (384, 4, 3, 3), "conditioner.embedders.0.model.ln_final.bias": (1280,)},
            "the SDXL refiner",
        ),
        ({"emb_params": (4, 768)}, "a textual inversion"),
        ({CONV_IN: (320, 4, 3, 3), "cond_stage_model.transformer.x": (1,)}, "has no VAE"),
        ({"fc.weight": (10, 10)}, "no key of Stable Diffusion, but 'fc.weight'"),
        ({}, "no tensors"),
    ],
)
def test_parts_of_a_checkpoint_are_called_by_their_names(keys, what):
    with pytest.raises(ErasureError, match=what):
        recognise(TensorFile(Path("part.safetensors"), keys, lambda key: None), None)


def test_another_width_needs_a_configuration_and_another_family_another_one(made):
    with pytest.raises(ErasureError, match=r"cross-attention is 32 wide, not 768.*load.config"):
        load_single_file(made("sd1")[2])
    with pytest.raises(ErasureError, match="is SD 1, but the configuration is for SDXL"):
        load_single_file(made("sd1")[2], config=made("sdxl")[1])
