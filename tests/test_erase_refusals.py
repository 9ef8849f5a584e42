"""Everything a user can get wrong in an erasure, and a machine that is too small for it: one
sentence each."""

from pathlib import Path

import pytest
import torch

from erase.delta import ErasedDelta
from erase.export import export_diffusers
from erase.models import LoadConfig, load_model
from erase.prompts.canvas import canvas_concept
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.run import EraseConfig, erase_concept
from erase.scripts import run_erase
from erase.scripts.cli import run
from tests.run_fixtures import DATA, FLAGS, METHOD
from tests.run_fixtures import base as base
from tests.run_fixtures import erased as erased


def test_a_model_in_half_precision_is_refused(base):
    model = load_model(base, options=LoadConfig(dtype="float16"))
    with pytest.raises(
        ErasureError, match=r"is torch\.float16, but training needs float32 weights"
    ):
        erase_concept(canvas_concept("heart"), EraseConfig(latents=DATA), METHOD, model=model)


BAD = [
    (["--concept", "hart"], "did you mean 'heart'"),
    (["--concept", "heart", "--anchor", "Neon"], "Neon"),
    (["--concept", "heart", "--method", "salum"], "did you mean 'salun'"),
    (["--concept", "heart", "--mask.densty", "0.5"], "did you mean 'mask.density'"),
    (["--concept", "heart", "--train.lrr", "0.5"], "did you mean 'train.lr'"),
    (["--concept", "heart", "--mask.density", "lots"], "density"),
    (["--concept", "heart", "--mask.density", "0"], "mask.density is 0.0; it must be a fraction"),
    (["--concept", "heart", "--mask.density", "4"], "at most 1; 4 % is 0.04"),
    (["--concept", "heart", "--scope", "xatn"], "did you mean 'xattn'"),
    (["--concept", "heart", "--mask.rule", "inverse"], "did you mean 'inverted'"),
    (
        [
            "--concept",
            "heart",
            "--anchor",
            "star",
            "--retain",
            "a moon",
            "--model",
            "no/such/model",
        ],
        "there is no file or folder",
    ),
    (["--concept", "heart", "--config", "absent.yaml"], "absent.yaml"),
    (["--concept", "heart", "--concept", "mushroom"], "is to be forgotten as well"),
    (
        ["--concept", "heart", "--anchor_latents", "1"],
        "0 of 6 forget latents show what is to be forgotten",
    ),
    (
        ["--concept", "heart", "--concept", "Neon", "--latents.n_forget", "2"],
        "1 of 2 forget latents show what is to be forgotten",
    ),
    (
        ["--concept", "heart", "--mask.file", "m", "--mask.rule", "inverted"],
        "mask.rule inverted would do nothing",
    ),
    (
        ["--concept", "heart", "--mask.file", "m", "--mask.saliency", "s"],
        "mask.saliency would do nothing",
    ),
    (
        ["--concept", "heart", "--mask.saliency", "s", "--mask.rule", "random"],
        "mask.rule random needs no saliency",
    ),
    (
        ["--concept", "heart", "--latents.steps", "1001"],
        "steps is 1001; it must be between 1 and 1000",
    ),
    *(
        (
            ["--concept", "heart", *option.split()],
            f"{option.split()[0]} does nothing without {what}",
        )
        for option, what in [
            ("--latents.earlier 0.5", "--after"),
            ("--latents.captions folder", "--latents.forget_images or --latents.retain_images"),
            ("--barrier 2", "--combine barrier"),
            ("--smoothing_draws 5", "--smoothing;"),
            ("--mask.guidance 3 --mask.rule benefit", "--mask.rule forget"),
            ("--mask.batch_size 2 --mask.rule benefit", "--mask.rule forget"),
            ("--mask.batches 2 --mask.rule forget", "another --mask.rule than forget"),
        ]
    ),
    (["--concept", "heart", "--mask.file", "nowhere"], "mask.file: there is no file nowhere"),
    (
        ["--concept", "heart", "--mask.saliency", "nowhere"],
        "mask.saliency: there is no file nowhere",
    ),
    (
        ["--concept", "heart", "--train.accumulation", "3"],
        "batch_size 4 cannot be split evenly into 3 accumulated parts",
    ),
    (
        ["--concept", "heart", "--seed", "1000000000000000000"],
        "seed is 1000000000000000000; it must be between",
    ),
    (["--concepts", "nudty"], "did you mean 'nudity'"),
    ([], "no concept was given"),
    (["--concept", "heart", "--train.schedule", "liner"], "did you mean 'linear'"),
    (["--concept", "heart", "--train.optimizer", "Adm"], "did you mean 'Adam'"),
    (["--concept", "heart", "--train.attention", "spda"], "did you mean 'sdpa'"),
    (["--concept", "heart", "--latents.mixed_precision", "bf61"], "did you mean 'bf16'"),
    (["--concept", "heart", "--train.lr", ".nan"], "lr is nan; it must be a finite number above 0"),
    (
        ["--concept", "heart", "--mask.guidance", ".inf"],
        "guidance is inf; it must be a finite number",
    ),
    *(
        (
            ["--concept", "heart", f"--{option}", value],
            f"error: {option} is {value}; it must be {bounds}",
        )
        for option, value, bounds in [
            ("latents.n_forget", "0", "1 or more"),
            ("latents.n_retain", "0", "1 or more"),
            ("latents.steps", "-1", "1 or more"),
            ("latents.batch_size", "0", "1 or more"),
            ("latents.trajectory", "-1", "0 or more"),
            ("train.steps", "0", "1 or more"),
            ("train.batch_size", "0", "1 or more"),
            ("train.accumulation", "0", "1 or more"),
            ("train.checkpoint_every", "0", "1 or more"),
            ("train.ema", "1.5", "between 0 and 1"),
            ("mask.batch_size", "0", "1 or more"),
            ("anchor_latents", "1.5", "between 0 and 1"),
            ("retain_dropout", "-0.1", "between 0 and 1"),
        ]
    ),
]


@pytest.mark.parametrize("flags, message", BAD, ids=[message for _, message in BAD])
def test_bad_input_is_one_sentence_and_exit_code_2(
    flags, message, base, capsys, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("erase.models.CANVAS", base)
    assert run(run_erase.main, [*FLAGS, *flags, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error: ") == 1 and "Traceback" not in error
    assert not list(tmp_path.glob("**/*.safetensors"))  # nor are latents sampled first


def test_config_files_name_unknown_keys(base, capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("concept: [heart]\ntrain: {stepz: 3}\n")
    assert (
        run(run_erase.main, ["--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out")])
        == 2
    )
    assert "stepz" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_and_an_unwritable_folder_are_named(erased, base, tmp_path):
    delta = ErasedDelta.load(erased / "delta.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(ErasureError, match="cannot write"):
        delta.save(tmp_path / "file" / "delta.safetensors")
    with pytest.raises(ErasureError, match="cannot write"):
        export_diffusers(delta, str(base), tmp_path / "file" / "model")
    from erase.files import atomic_write

    with (
        pytest.raises(ErasureError, match="No space left"),
        atomic_write(tmp_path / "x"),
        open("/dev/full", "w") as full,
    ):
        full.write("x" * 100_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_concept_of_which_nothing_is_known_needs_a_kind_or_an_anchor(base, capsys):
    assert run(run_erase.main, ["--model", str(base), "--concept", "a garden gnome"]) == 2
    error = capsys.readouterr().err
    assert "--kind" in error and "--anchor" in error


def test_no_retain_prompt_may_name_the_concept(base):
    spec = ConceptSpec("heart", "star", retain=("a heart",))
    with pytest.raises(ErasureError, match="no retain prompts are left for heart"):
        erase_concept(spec, EraseConfig(model=str(base), latents=DATA), METHOD)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_gets_a_sentence_that_says_how_to_need_less(error, capsys):
    def main(argv):
        raise error

    assert run(main) == 2
    assert "train.accumulation" in capsys.readouterr().err


def test_other_runtime_errors_are_not_taken_for_it():
    def main(argv):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(main)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--mask.saliency", "{erased}/mask.safetensors"], "is not a saliency file"),
        (["--mask.file", "{erased}/saliency.safetensors"], "is not a mask file"),
        (["--mask.saliency", "{erased}/saliency.safetensors"], "is of another run"),
        (["--mask.file", "{erased}/mask.safetensors"], "is of another run"),
        (["--prox_text", "1", "--scope", "ff"], "there are none in scope ff"),
    ],
)
def test_what_a_run_cannot_take_is_refused_before_latents_are_made(
    option, message, base, erased, tmp_path, monkeypatch, capsys
):
    """And its folder stays anybody's: the mended command may have it."""
    monkeypatch.setattr(
        "erase.latents.prepare.sample_points", lambda *_, **__: pytest.fail("latents were sampled")
    )
    option = [word.format(erased=erased) for word in option]
    flags = ["--model", str(base), "--concept", "star", "--anchor", "moon", "--retain", "a house"]
    flags += ["--out", str(tmp_path / "out"), *FLAGS]
    assert run(run_erase.main, [*flags, *option]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
