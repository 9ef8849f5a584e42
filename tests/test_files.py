"""The writer of safetensors: the library's own bytes, one tensor at a time, whole or absent."""

import os
import stat
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from erase.files import DTYPES, save_tensors, stream_tensors
from prompts.errors import ErasureError


def tensors():
    """Every dtype, odd shapes and names, in an order that is not the file's."""
    generator = torch.Generator().manual_seed(0)
    made = {
        f"{i % 3}.{i}": (torch.randn(3 + i, 2, generator=generator) * 9).to(dtype) for i, dtype in enumerate(reversed(DTYPES))
    }
    odd = {'a "name"\n\x01\x7fé\u2028\\': torch.tensor(1.5), "empty": torch.empty(0, 4), "turned": torch.randn(4, 6).T}
    return made | odd


def test_the_bytes_are_those_of_safetensors_own_writer(tmp_path):
    values, metadata = tensors(), {"format": 'x "é"\n'}
    save_tensors(tmp_path / "ours", values, metadata)
    save_file({name: value.contiguous() for name, value in values.items()}, tmp_path / "theirs", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    read = load_file(tmp_path / "ours")
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in values.items())


def test_the_same_content_is_the_same_file(tmp_path):
    metadata = {f"key {i}": str(i) for i in range(20)}
    for name in ("a", "b"):
        save_tensors(tmp_path / name, {"p": torch.ones(3)}, metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_file_is_as_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        save_tensors(tmp_path / "file", {"p": torch.ones(3)}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_tensors_are_made_in_turn_and_let_go(tmp_path):
    living: list[weakref.ref] = []

    def make(name: str) -> torch.Tensor:
        assert sum(ref() is not None for ref in living) <= 1
        made = torch.full((1000,), float(name))
        living.append(weakref.ref(made))
        return made

    layout = {str(i): torch.empty(1000, device="meta") for i in range(9)}
    stream_tensors(tmp_path / "file", layout, make, {})
    assert len(living) == 9 and not any(ref() is not None for ref in living)
    assert all((value == float(name)).all() for name, value in load_file(tmp_path / "file").items())


def test_what_fails_midway_leaves_nothing(tmp_path):
    def make(name: str) -> torch.Tensor:
        if name == "b":
            raise ErasureError("b is not finite")
        return torch.ones(3)

    with pytest.raises(ErasureError, match="b is not finite"):
        stream_tensors(tmp_path / "file", dict.fromkeys("abc", torch.ones(3)), make, {})
    with pytest.raises(ErasureError, match=r"p is of torch\.complex64"):
        save_tensors(tmp_path / "file", {"p": torch.ones(3, dtype=torch.complex64)}, {})
    assert list(tmp_path.iterdir()) == []
