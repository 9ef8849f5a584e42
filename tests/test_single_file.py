"""Single-file checkpoints: what is written loads in stock diffusers and draws the same; what is
read is safe, whole and recognised."""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from open_clip import SimpleTokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from erase.models import CANVAS
from erase.models.single_file import ldm, load_single_file, write_single_file
from erase.models.single_file.architectures import clip_tokenizer
from erase.models.single_file.recognise import decide_prediction, recognise
from erase.models.single_file.tensor_file import TensorFile
from erase.prompts.errors import ErasureError
from tests.families import tiny_sd1, tiny_sd2, tiny_sdxl

TINY = {
    "sd1": tiny_sd1,
    "sd2": tiny_sd2,
    "sd2-v": lambda: tiny_sd2(prediction="v_prediction"),
    "sdxl": tiny_sdxl,
}
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
NORM = "model.diffusion_model.out.0.weight"


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """`made(kind)`: a pipeline, its configurations in a folder without weights, and its single
    file."""

    @cache
    def make(kind):
        root, pipeline = tmp_path_factory.mktemp(kind), TINY[kind]()
        pipeline.save_pretrained(root / "config")
        for weights in (root / "config").rglob("*.safetensors"):
            weights.unlink()
        return pipeline, root / "config", write_single_file(pipeline, root / "model.safetensors")

    return make


@pytest.fixture
def damaged(made, tmp_path):
    """`damaged(change)`: the SD 1 file with changed tensors, and its configuration."""

    def damage(change, suffix=".safetensors"):
        _, config, path = made("sd1")
        tensors = load_file(path)
        tensors = change(tensors) or tensors
        out = tmp_path / f"changed{suffix}"
        save_file(tensors, out) if suffix == ".safetensors" else torch.save(tensors, out)
        return out, config

    return damage


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return pipeline(
        "a red heart", num_inference_steps=2, generator=generator, output_type="np"
    ).images


def networks(pipeline):
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def weights(pipeline):
    return {
        f"{part}.{name}": w
        for part, module in networks(pipeline).items()
        for name, w in module.state_dict().items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- written and read back ----


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
    xl, config, _ = made("sdxl")
    try:
        xl.scheduler.register_to_config(prediction_type="v_prediction", rescale_betas_zero_snr=True)
        path = write_single_file(
            xl, tmp_path / "v.safetensors", metadata={"modelspec.title": "a title"}
        )
    finally:
        xl.scheduler.register_to_config(prediction_type="epsilon", rescale_betas_zero_snr=False)
    with safe_open(path, "pt") as file:
        assert {"v_pred", "ztsnr"} <= set(file.keys()) and file.metadata()[
            "modelspec.title"
        ] == "a title"
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


# ---- what other programs write ----


def test_a_pickle_with_a_nested_state_dict_reads_as_the_same(made, tmp_path):
    pipeline, config, path = made("sd1")
    for name, nested, zipped in (
        ("a.ckpt", True, True),
        ("b.pt", False, True),
        ("c.ckpt", True, False),
    ):
        content = (
            {"state_dict": load_file(path), "global_step": 470_000} if nested else load_file(path)
        )
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
        assert same(weights(load_single_file(tmp_path / name, config=config)), weights(pipeline))


def test_variants_of_the_layout_read_as_the_same(damaged, made):
    """Mixed precisions, VAE attention as linear layers, CLIP without `text_model.`, and all that
    the originals hold beside."""

    def vary(tensors):
        out = {key.replace(".text_model.", "."): tensor for key, tensor in tensors.items()}
        for i, key in enumerate(out):
            if out[key].is_floating_point():
                out[key] = out[key].to((torch.float32, torch.float64)[i % 2])
            if ".mid.attn_1." in key and out[key].ndim == 4:
                out[key] = out[key][..., 0, 0].clone()
        beside = (
            "betas",
            "alphas_cumprod",
            "model_ema.decay",
            "cond_stage_model.transformer.text_projection.weight",
        )
        return out | {key: torch.ones(3) for key in beside}

    path, config = damaged(vary)
    assert same(weights(load_single_file(path, config=config)), weights(made("sd1")[0]))


def test_the_layer_that_sd2_does_not_use_may_be_there(made, tmp_path):
    pipeline, config, path = made("sd2")
    text, tensors = "cond_stage_model.model.", load_file(path)
    last = {
        key.replace(".2.", ".3."): t.clone()
        for key, t in tensors.items()
        if key.startswith(f"{text}transformer.resblocks.2.")
    }
    save_file(
        tensors
        | last
        | {f"{text}text_projection": torch.ones(48, 48), f"{text}logit_scale": torch.ones(())},
        tmp_path / "full.safetensors",
    )
    assert len(last) == 12
    back = load_single_file(tmp_path / "full.safetensors", config=config, prediction="epsilon")
    assert same(weights(back), weights(pipeline))


def test_the_moving_average_is_taken_only_when_asked(damaged, made):
    def add_average(tensors):
        unet = {key: t for key, t in tensors.items() if key.startswith(ldm.UNET)}
        return tensors | {
            "model_ema." + key.removeprefix("model.").replace(".", ""): t + 1
            for key, t in unet.items()
        }

    path, config = damaged(add_average)
    plain, average = (load_single_file(path, config=config, ema=ema) for ema in (False, True))
    original = made("sd1")[0]
    assert same(weights(plain), weights(original))
    assert same(
        average.unet.state_dict(), {name: w + 1 for name, w in original.unet.state_dict().items()}
    )
    assert same(average.vae.state_dict(), original.vae.state_dict())
    with pytest.raises(ErasureError, match=r"holds no moving average.*ema"):
        load_single_file(made("sd1")[2], config=config, ema=True)


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
        ({"double_blocks.0.img_attn.qkv.weight": (9216, 3072)}, "Flux"),
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


# ---- damage ----


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_not_run(made, tmp_path, zipped):
    _, config, path = made("sd1")
    trace, bad = tmp_path / "trace", tmp_path / "bad.ckpt"
    torch.save(
        {"state_dict": load_file(path), "callbacks": Malicious(trace)},
        bad,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(
        ErasureError, match=r"bad\.ckpt is a pickle that asks for \w+\.mkdir.*without network"
    ):
        load_single_file(bad, config=config)
    assert not trace.exists()
    torch.load(bad, weights_only=False)  # the pickle does what it says where nothing stops it
    assert trace.exists()


class Callback:
    """Stands for what pytorch_lightning left in old files."""


def test_a_pickle_with_objects_names_what_it_asks_for(made, tmp_path):
    torch.save(
        {"state_dict": load_file(made("sd1")[2]), "callbacks": Callback()}, tmp_path / "old.ckpt"
    )
    with pytest.raises(
        ErasureError, match=r"asks for \S+Callback, which is code.*get the model as \.safetensors"
    ):
        load_single_file(tmp_path / "old.ckpt", config=made("sd1")[1])


def lose(key):
    return lambda tensors: {name: t for name, t in tensors.items() if name != key}


def put(key, value):
    return lambda tensors: tensors | {key: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose(NORM), rf"lacks 1 of the 970 weights.*{NORM} \[16\]"),
        (
            put(f"{ldm.UNET}out.3.weight", torch.ones(2)),
            rf"holds 1 tensors for which SD 1 has no place.*{ldm.UNET}out.3.weight \[2\]",
        ),
        (put(f"{ldm.VAE}loss.logvar", torch.ones(2)), "loss.logvar"),
        (
            put("cond_stage_model.transformer.final_layer_norm.bias", torch.ones(32)),
            "SD 1 has no place.*transformer.final_layer_norm.bias",
        ),
        (
            put(
                "cond_stage_model.transformer.text_model.encoder.layers.2.mlp.fc1.bias",
                torch.ones(2),
            ),
            "layers.2.mlp.fc1.bias",
        ),
        (put(NORM, torch.ones(17)), rf"{NORM} should have the shape \[16\], but has \[17\]"),
        (put(NORM, torch.full((16,), float("nan"))), rf"{NORM} holds NaN or infinite"),
        (put(NORM, torch.tensor([1.0] * 15 + [float("-inf")])), rf"{NORM} holds NaN or infinite"),
        (put(NORM, torch.ones(16, dtype=torch.int8)), rf"{NORM} holds torch.int8.*quantised"),
    ],
)
def test_damage_is_named_by_file_key_and_expectation(damaged, change, message):
    path, config = damaged(change)
    with pytest.raises(ErasureError, match=rf"(?s)changed\.safetensors.*{message}"):
        load_single_file(path, config=config)


def test_values_that_the_precision_cannot_hold_are_an_error(damaged):
    path, config = damaged(put(NORM, torch.full((16,), 1e5)))
    assert load_single_file(path, config=config).unet.conv_norm_out.weight.max() == 1e5
    with pytest.raises(
        ErasureError, match=rf"{NORM} holds values up to 1e\+05, too large for torch.float16"
    ):
        load_single_file(path, torch.float16, config=config)


def test_a_sparse_weight_is_an_error(damaged):
    path, config = damaged(put(NORM, torch.ones(16).to_sparse()), ".ckpt")
    with pytest.raises(ErasureError, match=rf"{NORM} holds torch.sparse_coo"):
        load_single_file(path, config=config)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("share", [0.0001, 0.5, 0.999])
def test_a_truncated_file_is_an_error(damaged, tmp_path, suffix, share):
    path, config = damaged(lambda tensors: None, suffix)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ErasureError, match=f"changed{suffix}"):
        load_single_file(path, config=config)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"", "is empty"),
        ("a.ckpt", b"", "is empty"),
        ("a.safetensors", b"<!DOCTYPE html><html>", "begins with b'<!DOCTYPE html>"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("a.bin", b"x", r"suffix '\.bin'"),
        ("a.ckpt", b"\x80\x02}q\x00.", r"cannot read \S+a\.ckpt"),
    ],
)
def test_files_that_hold_something_else_are_an_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ErasureError, match=message):
        load_single_file(tmp_path / name)


def test_a_wrong_suffix_is_told_with_the_right_one(damaged):
    for suffix, right in ((".safetensors", ".ckpt"), (".ckpt", ".safetensors")):
        path, config = damaged(lambda tensors: None, suffix)
        wrong = path.rename(path.with_suffix(right))
        with pytest.raises(ErasureError, match=rf"rename it to changed\{suffix}"):
            load_single_file(wrong, config=config)
    with pytest.raises(ErasureError, match="is not a file"):
        load_single_file(path.parent / "none.safetensors")


@pytest.mark.parametrize("length", [0x80, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle_is_still_safetensors(tmp_path, length):
    """The first byte of a pickle is 0x80, the first two of an archive are PK."""
    header = b'{"fc.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    (tmp_path / "a.safetensors").write_bytes(
        length.to_bytes(8, "little") + header.ljust(length) + bytes(4)
    )
    with pytest.raises(ErasureError, match=r"no key of Stable Diffusion, but 'fc\.weight'"):
        load_single_file(tmp_path / "a.safetensors")


def test_a_pickle_without_named_weights_is_an_error(tmp_path):
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    with pytest.raises(ErasureError, match="holds a Tensor, not named weights"):
        load_single_file(tmp_path / "tensor.pt")
    endless: dict = {"fc.weight": torch.ones(1)}
    endless["state_dict"] = endless
    torch.save(endless, tmp_path / "endless.pt")
    with pytest.raises(ErasureError, match="no key of Stable Diffusion"):
        load_single_file(tmp_path / "endless.pt")
    torch.save({"string_to_token": {"*": 265}}, tmp_path / "words.pt")
    with pytest.raises(ErasureError, match="no tensors"):
        load_single_file(tmp_path / "words.pt")


def test_a_folder_that_is_no_configuration_is_an_error(made, tmp_path):
    _, config, path = made("sd1")
    with pytest.raises(ErasureError, match=r"model_index\.json.*load.config"):
        load_single_file(path, config=tmp_path)
    copy = shutil.copytree(config, tmp_path / "config")
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(ErasureError, match="cannot read the tokenizer"):
        load_single_file(path, config=copy)


# ---- writing ----


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


# ---- the shipped tokenizer ----


def test_the_tokenizer_numbers_words_as_openai_does(tmp_path):
    reference, tokenizer = SimpleTokenizer(), clip_tokenizer("<|endoftext|>", 77)
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    assert tokenizer.get_vocab() == {
        renamed.get(token, token): i for token, i in reference.encoder.items()
    }
    for text in (
        "a photo of a cat, 3d!! it's",
        "Füße — naïve café 日本語 🚀",
        "$100 don't   tabs\t\nnl x_y",
        "",
    ):
        ids = reference(text)[0].tolist()
        end = ids.index(49407)
        assert tokenizer(text).input_ids == ids[: end + 1]
        padded = clip_tokenizer("!", 77)(text.replace("!", "."), padding="max_length").input_ids
        assert len(padded) == 77 and padded == reference(text.replace("!", "."))[0].tolist()
    assert tokenizer("a", padding="max_length").input_ids[-1] == 49407
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert (
        again("two cats").input_ids == tokenizer("two cats").input_ids
        and again.model_max_length == 77
    )


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
            owner.register_parameter(name, torch.nn.Parameter(torch.randn(weight.shape).mul_(0.02).half()))
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
