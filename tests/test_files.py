"""The writer of safetensors: the library's own bytes, one tensor at a time, whole or absent."""

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from erase import files
from erase.export.whole import new_folder
from erase.files import atomic_write, file_sha256
from erase.prompts.errors import ErasureError
from erase.prompts.reading import read_text
from erase.tensor_files import DTYPES, load_tensors, save_tensors, stream_tensors
from tests.texts import raises


def tensors():
    """Every dtype, odd shapes and names, in an order that is not the file's."""
    generator = torch.Generator().manual_seed(0)
    made = {
        f"{i % 3}.{i}": (torch.randn(3 + i, 2, generator=generator) * 9).to(dtype)
        for i, dtype in enumerate(reversed(DTYPES))
    }
    odd = {
        'a "name"\n\x01\x7fé\u2028\\': torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "turned": torch.randn(4, 6).T,
    }
    return made | odd


def test_the_bytes_are_those_of_safetensors_own_writer(tmp_path):
    values, metadata = tensors(), {"format": 'x "é"\n'}
    save_tensors(tmp_path / "ours", values, metadata)
    save_file(
        {name: value.contiguous() for name, value in values.items()}, tmp_path / "theirs", metadata
    )
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    read = load_file(tmp_path / "ours")
    assert all(
        torch.equal(read[name], value) and read[name].dtype == value.dtype
        for name, value in values.items()
    )


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


# ---- killed ----

KILLED = """
import os, signal, sys
from erase.files import atomic_write
with atomic_write(sys.argv[1]) as aside:
    aside.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_gone_when_the_next_one_writes(tmp_path):
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "delta.safetensors"],
        cwd=Path(files.__file__).parents[1],
    )
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert (
        left.read_text() == "half"
        and left.name.startswith(".delta.safetensors.")
        and left.suffix == ".part"
    )
    with atomic_write(tmp_path / "run.json") as aside:
        assert not left.exists()
        aside.write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_what_others_are_writing_is_left_to_them(tmp_path):
    """A living process's, another machine's (whose locks may not be seen here), and what is
    nobody's unfinished file."""
    others = [
        tmp_path / f".a.elsewhere-{files.HOST}.7.{'0' * 8}.part",
        tmp_path / ".download.part",
        tmp_path / ".a.7.part",
    ]
    for path in others:
        path.touch()
    with atomic_write(tmp_path / "a") as first, atomic_write(tmp_path / "a") as second:
        assert first != second
        with atomic_write(tmp_path / "b") as third:
            third.write_text("b")
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a").read_text() == "first", "the last rename wins whole"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", *(path.name for path in others)}


def test_a_folder_of_many_images_is_not_listed_for_each_of_them(tmp_path, monkeypatch):
    listed, now = [], [0.0]
    monkeypatch.setattr(
        Path,
        "glob",
        lambda self, pattern: listed.append(self) or now.__setitem__(0, now[0] + 1) or [],
    )
    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    for second in range(0, 300, 10):
        now[0] = max(now[0], second)
        save_tensors(tmp_path / "x", {"p": torch.ones(3)}, {})
    assert len(listed) == 3, "a listing that takes a second is made every 100 seconds"


@pytest.fixture
def events(monkeypatch):
    """What reaches the disk, and renames, in order."""
    events, fsync, replace = [], os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        events.append(
            "folder"
            if stat.S_ISDIR(os.fstat(descriptor).st_mode)
            else f"{os.fstat(descriptor).st_size} bytes"
        )
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(
        Path, "replace", lambda self, target: events.append("rename") or replace(self, target)
    )
    return events


def test_content_reaches_the_disk_before_its_name_does(tmp_path, events):
    with atomic_write(tmp_path / "a") as aside:
        aside.write_text("abc")
    assert events == ["3 bytes", "rename", "folder"]


def test_the_content_of_a_folder_reaches_the_disk_before_its_name_does(tmp_path, events):
    with new_folder(tmp_path / "a", "card", None) as aside:
        (aside / "unet").mkdir()
        (aside / "unet" / "weights").write_text("abc")
    assert events == ["3 bytes", "folder", "4 bytes", "folder", "rename", "folder"]


# ---- places that cannot be written to, or read ----


@contextmanager
def little_space(size: int = 100_000):
    """A disk that is full after so many bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS = {
    "tensors": lambda path: save_tensors(path, {"p": torch.ones(99_999)}, {}),
    "a training state": lambda path: _whole(
        path, lambda aside: torch.save({"p": torch.ones(99_999)}, aside)
    ),
    "another library's tensors": lambda path: _whole(
        path, lambda aside: save_file({"p": torch.ones(99_999)}, aside)
    ),
    "an image": lambda path: _whole(
        path, lambda aside: Image.effect_noise((600, 600), 99).save(aside, format="PNG")
    ),
    "a text": lambda path: _whole(path, lambda aside: aside.write_text("x" * 999_999)),
}


def _whole(path, write):
    with atomic_write(path) as aside:
        write(aside)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_disk_that_is_full_is_one_sentence_whatever_is_written(write, tmp_path):
    write(tmp_path / "before")
    content = (tmp_path / "before").read_bytes()
    with little_space(), raises(f"cannot write {tmp_path / 'before'}: ", "free some space"):
        write(tmp_path / "before")
    assert [path.name for path in tmp_path.iterdir()] == ["before"] and (
        tmp_path / "before"
    ).read_bytes() == content


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO]
)
@pytest.mark.parametrize("call", ["mkdir", "open", "replace"])
def test_whatever_the_system_says_of_a_place_is_one_sentence(number, call, tmp_path, monkeypatch):
    def refuse(self, *args, **options):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, call, refuse)
    with raises(f"cannot write {tmp_path / 'a'}: {os.strerror(number)}; "):
        save_tensors(tmp_path / "a", {"p": torch.ones(3)}, {})
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_what_is_computed_is_not_taken_for_one_of_the_disk(tmp_path):
    with pytest.raises(RuntimeError, match="CUDA"), atomic_write(tmp_path / "a"):
        raise RuntimeError("CUDA error: device-side assert triggered")


READERS = {
    "text": read_text,
    "tensors": lambda path: load_tensors(path, "delta"),
    "digest": file_sha256,
    "written": lambda path: save_tensors(path, {"p": torch.ones(3)}, {}),
}
ODD = {
    "": "is empty",
    "a\0b": "NUL",
    "\ud800": "half a character",
    "x" * 256: "too long",
    "é" * 128: "too long",
    "ab/" * 2000 + "c": "too long",
}


@pytest.mark.parametrize("path", ODD, ids=["empty", "NUL", "surrogate", "name", "bytes", "path"])
@pytest.mark.parametrize("use", READERS.values(), ids=READERS)
def test_what_no_file_can_be_called_is_one_sentence(use, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with raises("is no path", ODD[path]):
        use(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("use", READERS.values(), ids=READERS)
def test_a_folder_or_a_file_in_the_way_is_one_sentence(use, tmp_path):
    (tmp_path / "folder").mkdir()
    with raises(str(tmp_path / "folder"), "Is a directory", "name a file in it"):
        use(tmp_path / "folder")
    (tmp_path / "file").touch()
    with raises(str(tmp_path / "file" / "x"), "a file stands where a folder should be"):
        use(tmp_path / "file" / "x")


def test_a_text_without_end_is_not_read(tmp_path):
    (tmp_path / "zeros.csv").symlink_to("/dev/zero")
    with raises("zeros.csv has more than 256 MiB"):
        read_text(tmp_path / "zeros.csv")


def test_tensors_that_were_read_are_not_changed_by_who_writes_over_their_file(tmp_path):
    save_tensors(tmp_path / "a", {"p": torch.ones(100_000)}, {"format": "delta"})
    tensors, _ = load_tensors(tmp_path / "a", "delta")
    with (tmp_path / "a").open("r+b") as file:
        file.truncate(100)  # under a memory map, the next line would end the process
    assert (tensors["p"] == 1).all()
    with raises(str(tmp_path / "a"), "cut short"):
        load_tensors(tmp_path / "a", "delta")
