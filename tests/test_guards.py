"""What a command is given and how it is stopped: paths that cannot be, files that name files, the
wrong kind of file; SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from erase import files
from erase.delta import ErasedDelta
from erase.files import atomic_write
from erase.mask import SaliencyMask
from erase.models import load_model
from erase.models.loading import check_model
from erase.prompts.errors import ErasureError
from erase.scripts import run_erase, run_evaluate, run_export, run_generate
from erase.scripts.cli import parse, run
from erase.tensor_files import save_tensors
from erase.training.config import MaskConfig
from erase.training.statistics import Statistics
from tests.texts import raises, written

COMMANDS = {
    "erase": run_erase.main,
    "generate": run_generate.main,
    "evaluate": run_evaluate.main,
    "export": run_export.main,
}


def delta(folder: Path, base_id: str = "canvas") -> Path:
    """A delta as a run leaves it in its folder."""
    metadata = {
        "base_fingerprint": "f",
        "base_id": base_id,
        "method": "salun",
        "config": "{}",
        "concepts": "[]",
    }
    ErasedDelta({"p": torch.ones(1)}, {"p": torch.tensor([1], dtype=torch.uint8)}, metadata).save(
        folder / "delta.safetensors"
    )
    return folder / "delta.safetensors"


# ---- what is given as a delta, or as a model ----


def test_a_run_folder_given_as_a_delta_is_taken_for_its_delta(tmp_path: Path) -> None:
    path = delta(tmp_path)
    assert ErasedDelta.load(tmp_path).sha256 == ErasedDelta.load(path).sha256
    assert ErasedDelta.load(tmp_path).source == str(path)


def nothing(folder: Path) -> Path:
    return folder / "delta.safetensor"


def beside_the_delta(folder: Path) -> Path:
    delta(folder)
    return folder / "dleta.safetensors"


def report_folder(folder: Path) -> Path:
    delta(folder)
    (folder / "report").mkdir(exist_ok=True)
    return written(folder / "report", "report.json", "{}").parent


def marked(name: str) -> Callable[[Path], Path]:
    return lambda folder: written(folder, name, "{}").parent


def unreadable(folder: Path) -> Path:
    path = delta(folder)
    path.chmod(0)
    return path


def saved(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        save_file(tensors, folder / "file.safetensors", metadata)
        return folder / "file.safetensors"

    return save


ONE = torch.ones(1)
AS_DELTA: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "nothing": (nothing, ["no delta", "No such file"]),
    "a misspelt one": (beside_the_delta, ["no delta", "did you mean", "delta.safetensors"]),
    "a report's folder": (report_folder, ["folder of a report", "delta.safetensors"]),
    "a report": (
        lambda folder: report_folder(folder) / "report.json",
        ["report.json", "safetensors"],
    ),
    "a model's folder": (marked("model_index.json"), ["is a model", "--model"]),
    "an unfinished run": (
        marked("run.json"),
        ["has not come to its end", "same erase-concept command"],
    ),
    "images": (marked("manifest.jsonl"), ["folder of images"]),
    "an empty folder": (lambda folder: folder, ["holds no delta.safetensors", "--out"]),
    "a checkpoint": (
        saved({"model.diffusion_model.input_blocks.0.0.weight": ONE}, {"format": "pt"}),
        ["of a model", "--model"],
    ),
    "a part of one": (saved({"down_blocks.0.weight": ONE}, {}), ["of a model", "--model"]),
    "a LoRA": (
        saved({"unet.down.lora_A.weight": ONE}, {"format": "pt"}),
        ["a LoRA", "delta.safetensors"],
    ),
    "a mask": (saved({"p": ONE}, {"format": "mask"}), ["a mask", "delta.safetensors"]),
    "a saliency map": (
        saved({"p": ONE}, {"format": "saliency"}),
        ["a saliency map", "delta.safetensors"],
    ),
    "latents": (saved({"p": ONE}, {"format": "latents"}), ["latents"]),
    "a text": (lambda folder: written(folder, "notes.txt", "hello"), ["notes.txt as safetensors"]),
    "an empty file": (lambda folder: written(folder, "empty", ""), ["cut short"]),
}


@pytest.mark.parametrize("make, words", AS_DELTA.values(), ids=AS_DELTA)
def test_what_is_given_as_a_delta_and_is_none_is_told_what_it_is(
    make, words, tmp_path: Path
) -> None:
    path = make(tmp_path)
    with raises(str(path), *words):
        ErasedDelta.load(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_delta_that_may_not_be_read_is_one_sentence(tmp_path: Path) -> None:
    with raises("Permission denied", "check its permissions"):
        ErasedDelta.load(unreadable(tmp_path))


def test_a_delta_or_a_run_folder_given_as_a_model_names_the_way_out(tmp_path: Path) -> None:
    path = delta(tmp_path, "somebody/some-model")
    with raises(str(path), "is a delta", "--delta", "somebody/some-model"):
        load_model(path)
    with raises(str(tmp_path), "folder of a run", "--delta", "--model"):
        load_model(tmp_path)
    Statistics({"forget.sum": {"p": torch.rand(9)}}, {"base_fingerprint": "f"}).save(
        tmp_path / "s.safetensors"
    )
    with raises("saliency", "give a checkpoint", "delta.safetensors"):
        load_model(tmp_path / "s.safetensors")


def test_a_model_that_cannot_be_one_is_refused_before_its_concepts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model, words in (
        ("canvas-fow", "unknown model 'canvas-fow'; did you mean 'canvas-flow'?"),
        (str(delta(tmp_path)), "to erase-concept as --after"),
        (str(tmp_path), "to erase-concept as --after"),
        ("sd14.safetensors", "there is no file sd14.safetensors; check the path"),
    ):
        assert run(run_erase.main, ["--model", model, "--concept", "star"]) == 2
        assert words in capsys.readouterr().err
    assert check_model("canvas") == check_model("somebody/canvas") == "hub id"


def test_the_wrong_file_of_a_run_names_the_one_that_is_wanted(tmp_path: Path) -> None:
    save_tensors(tmp_path / "mask.safetensors", {"p": ONE}, {"format": "mask"})
    with raises("not a saliency file", "give the saliency.safetensors beside it"):
        Statistics.load(tmp_path / "mask.safetensors")
    with raises("not a mask file", "give the mask.safetensors beside it"):
        SaliencyMask.load(delta(tmp_path))


def test_a_run_folder_given_as_a_mask_or_saliency_is_taken_for_its_file(tmp_path: Path) -> None:
    with raises("mask.file", "there is no file", "mask.safetensors"):
        MaskConfig(file=str(tmp_path))
    for name in ("mask.safetensors", "saliency.safetensors"):
        written(tmp_path, name, "")
    assert MaskConfig(file=str(tmp_path)).file == str(tmp_path / "mask.safetensors")
    assert MaskConfig(saliency=str(tmp_path)).saliency == str(tmp_path / "saliency.safetensors")


def test_a_run_folder_given_as_a_delta_serves_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each comes as far as comparing it with the base."""
    delta(tmp_path)
    for name in ("generate", "evaluate", "export"):
        assert run(COMMANDS[name], ["--delta", str(tmp_path), "--out", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert "delta.safetensors belongs to base canvas" in error or "names no concept" in error, (
            error
        )


# ---- deltas whose places are bombs ----


def test_places_that_unfold_without_end_are_refused_before_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 MB of gaps would tell of four thousand million weights: 500 MB of bits, and 4 GB on the
    way to them."""

    def unfold(gaps: torch.Tensor) -> torch.Tensor:
        raise AssertionError("unfolded")

    monkeypatch.setattr("erase.delta.stored.from_gaps", unfold)
    gaps = torch.full((1 << 24,), 255, dtype=torch.uint8)
    gaps[-1] = 63
    metadata = {
        "format": "delta",
        "base_fingerprint": "f",
        "method": "m",
        "config": "{}",
        "concepts": "[]",
    }
    save_tensors(tmp_path / "d", {"values.p": ONE, "gaps.p": gaps}, metadata)
    with raises(str(tmp_path / "d"), "weights in p", "more than any model has"):
        ErasedDelta.load(tmp_path / "d")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {
                "values.p": ONE,
                "bits.p": torch.ones(1).byte(),
                "gaps.p": torch.tensor([0, 7]).byte(),
            },
            ["places of p twice"],
        ),
        ({"values.p": torch.ones(0), "bits.p": torch.zeros(1).byte()}, ["p has no values"]),
        ({"values.p": torch.ones(0), "bits.p": torch.zeros(0).byte()}, ["p has no values"]),
        ({"values.p": ONE, "bits.p": torch.zeros(0).byte()}, ["do not fit their places"]),
        ({"values.p": ONE, "gaps.p": torch.zeros(0).byte()}, ["places of p are damaged"]),
        (
            {"values.p": torch.ones(()), "bits.p": torch.ones(1).byte()},
            ["values.p", "0 dimensions"],
        ),
        ({"values": ONE, "bits": torch.ones(1).byte(), "p": ONE}, ["p (torch.float32"]),
    ],
)
def test_tensors_of_silly_shapes_are_refused_by_file_and_name(
    tensors, words: list[str], tmp_path: Path
) -> None:
    metadata = {
        "format": "delta",
        "base_fingerprint": "f",
        "method": "m",
        "config": "{}",
        "concepts": "[]",
    }
    save_tensors(tmp_path / "d", tensors, metadata)
    with raises(str(tmp_path / "d"), *words):
        ErasedDelta.load(tmp_path / "d")


# ---- paths ----

PATHS = {
    "erase": [
        "out",
        "model",
        "concepts",
        "latents.forget_images",
        "latents.retain_images",
        "load.config",
        "mask.file",
    ],
    "generate": ["out", "model", "delta", "prompts", "load.config"],
    "evaluate": ["out", "model", "delta", "prompts", "base_images", "classifier.judge"],
    "export": ["out", "model", "delta", "report", "conflicts", "lora_delta"],
}


@pytest.mark.parametrize(
    ("command", "option"),
    [(command, option) for command, options in PATHS.items() for option in options],
)
def test_a_path_that_no_file_can_have_is_one_sentence_of_every_option(
    command: str,
    option: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for value, word in (("x" * 300, "too long"), ("a\0b", "NUL")):
        assert run(COMMANDS[command], [f"--{option}={value}"]) == 2
        error = capsys.readouterr().err
        assert error.count("error: ") == 1 and f"--{option}" in error and word in error, error
    assert list(tmp_path.iterdir()) == []


def test_a_home_folder_is_written_out_where_no_shell_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = written(
        tmp_path,
        "c.yaml",
        "out: ~/runs/a\nlatents: {forget_images: ~/pictures}\nconcept: [~/not a path]\n",
    )
    options = parse(run_erase.make_parser("salun"), ["--config", str(file), "--concepts=~/c.yaml"])
    assert (options.out, options.concepts) == (f"{tmp_path}/runs/a", [f"{tmp_path}/c.yaml"])
    assert options.latents.forget_images == f"{tmp_path}/pictures" and options.concept == [
        "~/not a path"
    ]


def test_a_path_that_the_system_refuses_later_is_one_sentence_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main(argv: list[str] | None) -> None:
        Path("/dev/null/x").stat()

    assert run(main, []) == 2
    assert (
        "error: /dev/null/x: Not a directory; a file stands where a folder should be"
        in capsys.readouterr().err
    )


# ---- recipes that name files ----

BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 30)
)


@pytest.mark.parametrize(
    "text",
    [BOMB, "steps: 3\nsteps: 4\n", "{a: " * 4000, "steps: 3\n"],
    ids=["bomb", "twice", "deep", "sound"],
)
@pytest.mark.parametrize(
    ("outer", "argv"),
    [
        ("config: {inner}\n", []),
        ("train: {inner}\n", []),
        ("latents: {inner}\n", []),
        ("mask:\n  density: 0.3\n", ["--train", "{inner}"]),
    ],
)
def test_an_included_recipe_bypasses_no_guard(
    outer: str, argv: list[str], text: str, tmp_path: Path
) -> None:
    inner = written(tmp_path, "inner.yaml", text)
    given = ["--config", str(written(tmp_path, "outer.yaml", outer.format(inner=inner)))]
    given += [word.format(inner=inner) for word in argv]
    if argv and text == "steps: 3\n":
        assert parse(run_erase.make_parser("salun"), given).train.steps == 3
        return
    with pytest.raises(ErasureError) as caught:
        parse(run_erase.make_parser("salun"), given)
    assert len(str(caught.value)) < 500


# ---- stopped ----


def test_sigterm_is_ctrl_c_with_its_own_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Slurm and Kubernetes send it, in the midst of a write: nothing half is left, and the old
    handler is back."""
    before = signal.getsignal(signal.SIGTERM)

    def main(argv: list[str] | None) -> None:
        with atomic_write(tmp_path / "training.pt") as aside:
            aside.write_text("half")
            os.kill(os.getpid(), getattr(signal, (argv or [""])[0]))
            raise AssertionError("went on")

    # a shell starts what runs in its background with SIGINT ignored
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for name, code in (("SIGTERM", 143), ("SIGINT", 130)):
            assert run(main, [name]) == code
            assert capsys.readouterr().err.endswith("stopped\n")
            assert list(tmp_path.iterdir()) == []
            assert signal.getsignal(signal.SIGTERM) == before
    finally:
        signal.signal(signal.SIGINT, ours)


def test_a_command_that_resumes_says_what_it_goes_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(argv: list[str] | None) -> None:
        for name in argv or []:
            with atomic_write(tmp_path / name) as aside:
                aside.write_text("whole")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "placed", [])
    assert run(main, [], resumes=True) == 130
    assert "stopped; nothing was saved yet" in capsys.readouterr().err
    assert run(main, ["training.pt"], resumes=True) == 130
    said = f"the same command goes on with what is saved, last {tmp_path / 'training.pt'}"
    assert said in capsys.readouterr().err


def test_a_second_sigterm_ends_a_command_that_does_not_stop() -> None:
    mine: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda *_: mine.append(1))

    def main(argv: list[str] | None) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            # while it clears away: the handler that was there before
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        assert run(main, []) == 143 and mine == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_command_in_a_thread_or_with_sigterm_ignored_leaves_the_handler_alone() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run(lambda argv: None, [])))
    thread.start()
    thread.join()
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        codes.append(run(lambda argv: os.kill(os.getpid(), signal.SIGTERM), []))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert codes == [0, 0]
