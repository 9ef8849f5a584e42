"""Exports: each format is loaded by the code of its own model card and draws what the erased model
draws; all or nothing."""

import filecmp
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from erase import export
from erase.delta import ErasedDelta
from erase.delta.base import load_base
from erase.eval.report.card import model_card
from erase.export import export_delta, export_diffusers
from erase.export.formats import FORMATS, USAGES, usage
from erase.export.lora import extract_lora
from erase.models import load_model, wrap
from erase.prompts.errors import ErasureError
from erase.run import EraseConfig
from erase.scripts import run_export
from erase.scripts.cli import run
from tests.families import FAMILIES

CONFIG = {"erase": {"seed": 0}, "method": {"density": 0.5}}


@pytest.fixture(scope="module")
def base(make_pico_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "pico"
    make_pico_pipeline().save_pretrained(folder)
    return folder


def make(base, target, seed, scope):
    """A delta that moves half of a scope's weights, as an erasure writes it."""
    model, generator = load_model(str(base)), torch.Generator().manual_seed(seed)
    old = {
        name: param.detach() for name, param in model.parameters().items() if re.search(scope, name)
    }
    new = {
        name: torch.where(
            torch.rand(v.shape, generator=generator) < 0.5,
            v + 0.1 * torch.randn(v.shape, generator=generator),
            v,
        )
        for name, v in old.items()
    }
    metadata = {
        "base_fingerprint": model.fingerprint, "base_id": str(base), "method": "salun",
        "config": json.dumps(CONFIG),
        "concepts": json.dumps([{"target": target, "anchor": "moon", "templates": ["a {}"]}]),
        "created_with": "0.1.0",
    }  # fmt: skip
    return ErasedDelta.between(old, new, metadata)


@pytest.fixture(scope="module")
def heart(base, tmp_path_factory):
    """The file of a delta that changes linear layers of both components, so that a LoRA can hold
    all of it."""
    path = tmp_path_factory.mktemp("heart") / "delta.safetensors"
    make(base, "heart", 0, r"(attn2|self_attn)\.\w+\.?\d*\.weight").save(path)
    return str(path)


@pytest.fixture(scope="module")
def star(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("star") / "delta.safetensors"
    make(base, "star", 1, r"attn2").save(path)
    return str(path)


def seeded():
    """Loading draws random numbers of its own, so the image must not take the global stream."""
    return torch.Generator().manual_seed(7)


def drawn(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return np.asarray(
        pipeline("a heart", num_inference_steps=3, generator=seeded()).images[0]
    ).astype(int)


def run_card(card: str, folder: Path, base: Path, work: Path, monkeypatch) -> np.ndarray:
    """The image that the code block of a model card saves, in three steps."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    code = code.replace("path/to/this/folder", str(folder)).replace(
        f"path/to/{base.name}", str(base)
    )
    code, calls = re.subn(
        r"^pipeline\('a heart'\)",
        "pipeline('a heart', num_inference_steps=3, generator=seeded())",
        code,
        flags=re.M,
    )
    assert "path/to" not in code and calls == 1
    work.mkdir()
    monkeypatch.chdir(work)
    exec(compile(code, "card", "exec"), {"seeded": seeded})
    with Image.open(work / "image.png") as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize("format", FORMATS)
def test_the_code_of_each_card_draws_what_the_erased_model_draws(
    format, base, heart, tmp_path, monkeypatch
):
    if format == "single-file":
        pytest.importorskip("erase.models.single_file")
    if format == "lora":
        pytest.importorskip("peft")
    out = tmp_path / "out"
    extra = ["--rank", "1000"] if format == "lora" else []
    assert (
        run(run_export.main, ["--delta", heart, "--format", format, "--out", str(out), *extra]) == 0
    )
    image = run_card((out / "README.md").read_text(), out, base, tmp_path / "work", monkeypatch)
    erased = drawn(ErasedDelta.load(heart).apply(load_model(str(base))).pipeline())
    plain = drawn(load_model(str(base)).pipeline())
    assert (
        np.abs(image - erased).max() <= (2 if format == "lora" else 0)
        and np.abs(image - plain).max() > 20
    )
    if format == "components":
        assert sorted(path.name for path in out.iterdir()) == ["README.md", "text_encoder", "unet"]
    if format == "lora":
        assert json.loads((out / "lora.json").read_text())["error"] < 1e-6


def test_a_folder_with_a_delta_does_not_tell_where_its_base_lies(base, heart, tmp_path):
    delta = ErasedDelta.load(heart)
    load = {"vae": str(tmp_path / "vae")}
    config = json.dumps({"erase": {"load": load, "model": str(base)}})
    delta = replace(delta, metadata={**delta.metadata, "config": config})
    told = ErasedDelta.load(export_delta(delta, tmp_path / "out")).metadata
    assert told["base_id"] == "path/to/pico" and str(tmp_path) not in told["config"]
    with pytest.raises(ErasureError, match="'path/to/pico' as its base.* machine; give with --mod"):
        load_base(ErasedDelta.load(tmp_path / "out"))
    file = export_delta(delta, tmp_path / "d.safetensors")
    assert ErasedDelta.load(file).metadata["base_id"] == str(base)  # for programs of this machine


def test_the_card_of_a_delta_reads_its_base_as_it_was_read(base, heart, tmp_path, monkeypatch):
    half, out = tmp_path / base.name, tmp_path / "out"
    shutil.copytree(base, half)
    for file in half.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    delta = ErasedDelta.load(heart)
    config = json.dumps({"erase": {"load": {"variant": "fp16"}}})
    replace(delta, metadata={**delta.metadata, "config": config}).save(tmp_path / "d.safetensors")
    flags = ["--delta", str(tmp_path / "d.safetensors"), "--model", str(half), "--format", "delta"]
    assert run(run_export.main, [*flags, "--out", str(out)]) == 0
    run_card((out / "README.md").read_text(), out, half, tmp_path / "work", monkeypatch)


@pytest.mark.parametrize("name", ["some/base.safetensors", "some/base.ckpt"])
def test_a_base_that_is_one_file_is_loaded_as_one(name, base):
    model = load_model(str(base))
    model.name = name
    codes = {format: usage(format, model, ["unet"]).code for format in FORMATS}
    for format in ("components", "lora"):
        assert (
            "StableDiffusionPipeline.from_single_file(" in codes[format]
            and "import StableDiffusionPipeline" in codes[format]
        )
    assert "config=" not in codes["single-file"] and all(
        compile(code, "card", "exec") for code in codes.values()
    )


@pytest.mark.parametrize(
    ("family", "own", "told"),
    [
        ("sd1", "epsilon", False),
        ("sd1", "v_prediction", True),
        ("sd2", "epsilon", True),
        ("sd2-v", "v_prediction", False),
        ("sdxl", "epsilon", False),
        ("sdxl", "v_prediction", True),
    ],
)
def test_the_code_says_what_diffusers_would_take_a_single_file_wrongly_for(family, own, told):
    pipeline = FAMILIES[family]()
    pipeline.scheduler.register_to_config(prediction_type=own)
    model = wrap(pipeline, "some/base.safetensors")
    for format in ("components", "lora", "single-file"):
        code = usage(format, model, ["unet"]).code
        assert (f'pipeline.scheduler.config, prediction_type="{own}"' in code) is told
        compile(code, "card", "exec")
    model.name = "some/folder"
    assert "prediction_type" not in usage("single-file", model, ["unet"]).code


def test_a_single_file_may_stand_alone(heart, base, tmp_path):
    pytest.importorskip("erase.models.single_file")
    out = tmp_path / "heart.safetensors"
    assert (
        run(
            run_export.main,
            ["--delta", heart, "--format", "single-file", "--dtype", "float16", "--out", str(out)],
        )
        == 0
    )
    assert [path.name for path in tmp_path.iterdir()] == ["heart.safetensors"]
    assert {
        tensor.dtype
        for name, tensor in load_file(out).items()
        if name.startswith("model.diffusion_model.")
    } == {torch.float16}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_narrower_dtype_is_what_it_says(dtype, base, heart, tmp_path):
    """The files hold the rounded weights, a rounded delta gives the very same ones, and the card
    says so."""
    kind = getattr(torch, dtype)
    for format in ("components", "delta"):
        arguments = [
            "--delta",
            heart,
            "--format",
            format,
            "--dtype",
            dtype,
            "--out",
            str(tmp_path / format),
        ]
        assert run(run_export.main, arguments) == 0
    assert f"rounded to {dtype}" in (tmp_path / "components" / "README.md").read_text()
    rounded = ErasedDelta.load(tmp_path / "delta" / "delta.safetensors")
    assert {value.dtype for value in rounded.values.values()} == {kind}
    model = rounded.apply(load_model(str(base)))
    written = load_file(tmp_path / "components" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(
        torch.equal(written[name.removeprefix("unet.")], p.to(kind))
        for name, p in model.parameters("unet").items()
    )


def test_a_base_may_be_given_as_a_path(base, heart, tmp_path):
    export.export_components(ErasedDelta.load(heart), Path(base), tmp_path / "out")
    assert (tmp_path / "out" / "unet").is_dir()
    assert EraseConfig(model=Path("models") / "base") == EraseConfig(model=str(Path("models/base")))


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_values_beyond_the_range_of_the_dtype_are_refused(name, base, heart, tmp_path):
    delta = ErasedDelta.load(heart)
    weight = next(iter(delta.values))
    delta.values[weight][0] = 1e5
    write = export_diffusers if name == "out" else export.export_single_file
    with pytest.raises(
        ErasureError,
        match=f"{weight} has values beyond the range of torch.float16; use bfloat16 or float32",
    ):
        write(delta, str(base), tmp_path / name, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_several_deltas_are_composed_and_compared(base, heart, star, tmp_path, capsys):
    flags = [
        "--delta",
        heart,
        "--delta",
        star,
        "--scale",
        "1",
        "--scale",
        "-0.5",
        "--conflicts",
        str(tmp_path / "c.json"),
    ]
    assert run(run_export.main, [*flags, "--out", str(tmp_path / "m")]) == 0
    said = capsys.readouterr().out
    assert "weights that several deltas change" in said and "without heart" in said
    overlaps = json.loads((tmp_path / "c.json").read_text())
    assert {(one["a"], one["b"]) for one in overlaps} == {("heart", "star")} and overlaps[0][
        "shared"
    ] > 0
    card = (tmp_path / "m" / "README.md").read_text()
    assert "# pico without heart\n" in card and re.search(
        r"\| star \| -0.5 \| salun \| `\w{16}` \|", card
    )
    (tmp_path / "c.yaml").write_text(json.dumps({"delta": [heart, star], "scale": [1.0, -0.5]}))
    assert (
        run(
            run_export.main,
            [
                "--config",
                str(tmp_path / "c.yaml"),
                "--format",
                "delta",
                "--out",
                str(tmp_path / "d.safetensors"),
            ],
        )
        == 0
    )
    model = ErasedDelta.load(tmp_path / "d.safetensors").apply(load_model(str(base)))
    assert model.fingerprint == load_model(str(tmp_path / "m")).fingerprint
    assert (
        run(run_export.main, ["--delta", heart, "--scale", "-1", "--out", str(tmp_path / "back")])
        == 0
    )
    assert "No concept was erased" in (tmp_path / "back" / "README.md").read_text()


def test_a_lora_is_written_as_a_delta_too(heart, base, tmp_path):
    flags = [
        "--format",
        "lora",
        "--rank",
        "2",
        "--dtype",
        "float16",
        "--out",
        str(tmp_path / "l.safetensors"),
    ]
    assert (
        run(
            run_export.main,
            ["--delta", heart, *flags, "--lora_delta", str(tmp_path / "d.safetensors")],
        )
        == 0
    )
    model = load_model(str(base))
    lora = extract_lora(ErasedDelta.load(heart), model, rank=2)
    assert ErasedDelta.load(tmp_path / "d.safetensors").sha256 == lora.as_delta(model).sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.safetensors", "l.safetensors"]


@pytest.mark.parametrize(
    "flags",
    [["--format", "lora", "--lora_delta", "HEART"], ["--delta", "HEART", "--conflicts", "HEART"]],
)
def test_nothing_that_exists_is_overwritten(flags, heart, tmp_path, capsys, monkeypatch):
    mine = tmp_path / "heart.safetensors"
    shutil.copyfile(heart, mine)
    flags = [str(mine) if flag == "HEART" else flag for flag in flags]
    monkeypatch.setattr("erase.delta.base.load_model", None)  # before anything is loaded
    assert run(run_export.main, ["--delta", heart, *flags, "--out", str(tmp_path / "out")]) == 2
    assert f"{mine} exists already" in capsys.readouterr().err
    assert filecmp.cmp(heart, mine, shallow=False)


@pytest.mark.parametrize("format", ["components", "delta"])
def test_an_export_of_nothing_is_refused(format, heart, tmp_path, capsys):
    flags = ["--delta", heart, "--scale", "0", "--format", format, "--out", str(tmp_path / "out")]
    assert run(run_export.main, flags) == 2
    assert "change no weight at these scales" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


BAD = [
    (["--format", "difusers"], "did you mean 'diffusers'"),
    (["--dtype", "float61"], "did you mean 'float16'"),
    (["--scale", "1", "--scale", "2"], "2 scales for 1 deltas"),
    (["--scale", "much"], "--scale is a number"),
    (["--rank", "4"], "--rank is for --format lora"),
    (
        ["--format", "lora", "--layout", "koya", "--lora_delta", "LORA.safetensors"],
        "did you mean 'kohya'",
    ),
    (
        ["--format", "lora", "--report", "absent.json", "--lora_delta", "LORA.safetensors"],
        "cannot read absent.json",
    ),
    (["--out", "OUT.safetensors"], "writes a folder"),
    (["--format", "delta", "--out", "OUT.safetensors", "--push_to_hub", "me/m"], "only a folder"),
    (["--on_conflict", "lst"], "did you mean 'last'"),
    (["--conflicts", "c.json"], "--conflicts compares several deltas"),
    (["--model", "canvas"], "belongs to base"),
    (["--delta", "absent.safetensors"], "absent.safetensors"),
]


@pytest.mark.parametrize("flags, message", BAD, ids=[message for _, message in BAD])
def test_bad_input_is_one_sentence_and_leaves_nothing(
    flags, message, heart, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert run(run_export.main, ["--delta", heart, "--out", "OUT", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_export_is_whole_or_absent(base, heart, tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    for out in ("taken", "taken.safetensors"):
        (tmp_path / "taken.safetensors").touch()
        with pytest.raises(ErasureError, match="exists already"):
            export_delta(ErasedDelta.load(heart), tmp_path / out)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusers.StableDiffusionPipeline.save_pretrained", full)
    with pytest.raises(ErasureError, match="No space left on device; free some space"):
        export_diffusers(ErasedDelta.load(heart), str(base), tmp_path / "model")

    def full_to_safetensors(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("diffusers.StableDiffusionPipeline.save_pretrained", full_to_safetensors)
    with pytest.raises(ErasureError, match=r"cannot write .*model: I/O error: No space left"):
        export_diffusers(ErasedDelta.load(heart), str(base), tmp_path / "model")
    monkeypatch.setattr(export.LoRA, "save", full)
    with pytest.raises(ErasureError, match="No space left"):
        export.export_lora(
            extract_lora(ErasedDelta.load(heart), load_model(str(base)), 2), tmp_path / "lora"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken", "taken.safetensors"]


# ---- the hub ----


@pytest.mark.parametrize("format", FORMATS)
def test_the_hub_reads_the_cards_metadata(format):
    metadata = {
        "base_fingerprint": "9f2c41", "base_id": "somebody/some-model", "method": "salun+esd",
        "config": "{}",
        "concepts": '[{"target": "heart", "anchor": "star"}]', "created_with": "0.1.0",
    }  # fmt: skip
    data = ModelCard(model_card(None, metadata, USAGES[format]), ignore_metadata_errors=False).data
    assert (data.base_model, data.pipeline_tag, data.license, data.license_name) == (
        "somebody/some-model", "text-to-image", "other", "as-the-base"
    )  # fmt: skip
    assert data.base_model_relation == ("adapter" if format in ("lora", "delta") else "finetune")
    assert {"concept-erasure", "salun", "esd"} <= set(data.tags) and ("lora" in data.tags) == (
        format == "lora"
    )
    assert data.library_name == ("concept-erasure-toolkit" if format == "delta" else "diffusers")


def test_the_licence_is_the_bases_own(base, heart):
    metadata = ErasedDelta.load(heart).metadata
    assert ModelCard(model_card(None, metadata)).data.license == "other"
    assert (
        ModelCard(model_card(None, metadata | {"base_id": "canvas"})).data.license == "apache-2.0"
    )


class Hub:
    """Stands in for HfApi; `fail` is raised by the call of that name."""

    calls: list = []
    fail: dict = {}

    def __getattr__(self, name):
        def call(*args, **kwargs):
            if name in self.fail:
                raise self.fail[name]
            self.calls.append((name, args, kwargs))
            return (
                {"name": "me"}
                if name == "whoami"
                else type("Answer", (), {"repo_url": "https://huggingface.co/me/m"})
            )

        return call


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(Hub, "fail", {})
    return Hub


@pytest.mark.parametrize("flags, private", [([], True), (["--private", "false"], False)])
def test_a_pushed_folder_is_private_unless_asked(hub, heart, tmp_path, capsys, flags, private):
    out = str(tmp_path / "out")
    assert (
        run(
            run_export.main,
            ["--delta", heart, "--format", "delta", "--out", out, "--push_to_hub", "me/m", *flags],
        )
        == 0
    )
    assert [name for name, *_ in hub.calls] == ["whoami", "create_repo", "upload_folder"]
    assert hub.calls[1][1:] == (("me/m",), {"private": private, "exist_ok": True})
    assert hub.calls[2][2]["repo_id"] == "me/m" and str(hub.calls[2][2]["folder_path"]) == out
    assert "https://huggingface.co/me/m" in capsys.readouterr().out


def test_who_is_not_logged_in_is_told_before_the_work(hub, heart, tmp_path, capsys):
    hub.fail = {"whoami": OSError("Token is required\nand more")}
    assert (
        run(
            run_export.main,
            ["--delta", heart, "--out", str(tmp_path / "out"), "--push_to_hub", "me/m"],
        )
        == 2
    )
    assert capsys.readouterr().err == (
        "error: cannot push to me/m: Token is required; log in with `hf auth login`, or leave "
        "--push_to_hub out\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_failed_upload_leaves_the_folder(hub, heart, tmp_path, capsys):
    hub.fail = {"upload_folder": ConnectionError("offline")}
    flags = [
        "--delta",
        heart,
        "--format",
        "delta",
        "--out",
        str(tmp_path / "out"),
        "--push_to_hub",
        "me/m",
    ]
    assert run(run_export.main, flags) == 2
    assert (
        "is whole, but could not be pushed to me/m: offline; try again with `hf upload me/m"
        in capsys.readouterr().err
    )
    assert (tmp_path / "out" / "delta.safetensors").is_file()
