"""Single-file checkpoints: what is read is safe and whole; damage is named by file, key and
expectation."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from erase.models.single_file import ldm, load_single_file
from erase.prompts.errors import ErasureError
from tests.single_file_fixtures import damaged as damaged
from tests.single_file_fixtures import made as made

NORM = "model.diffusion_model.out.0.weight"


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
