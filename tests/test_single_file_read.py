"""Single-file checkpoints: what other programs write reads as the same, with the tokenizer that
files lack."""

import pytest
import torch
from open_clip import SimpleTokenizer
from safetensors.torch import load_file, save_file

from erase.models.single_file import ldm, load_single_file
from erase.models.single_file.architectures import clip_tokenizer
from erase.prompts.errors import ErasureError
from tests.single_file_fixtures import damaged as damaged
from tests.single_file_fixtures import made as made
from tests.single_file_fixtures import same, weights

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
