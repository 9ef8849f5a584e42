"""What other programs read of an export: folders in any transformers, LoRA names, headers, cards;
and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionPipeline
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from erase.delta import ErasedDelta
from erase.eval.report import EvalReport, proportion
from erase.eval.report.card import model_card
from erase.export import (
    export_components,
    export_delta,
    export_diffusers,
    export_single_file,
    write_export,
)
from erase.export.folders import save_pipeline
from erase.export.formats import usage
from erase.export.kohya import kohya_entries
from erase.export.lora import extract_lora
from erase.foreign import read_erased
from erase.models import CANVAS, CANVAS_FLOW, load_model
from erase.models.families import family_of
from erase.models.single_file import bfl, write_single_file
from erase.prompts.errors import ErasureError
from erase.scripts import run_export
from erase.scripts.cli import run
from tests.families import FAMILIES, tiny_sd2
from tests.run_fixtures import base as base

ROOT = Path(__file__).parents[1]
CONCEPT = {"target": "heart", "anchor": "moon", "templates": ["a {}"], "kind": "object"}
BLOCK = re.compile(r"```python\n(.*?)```", re.S)


def moved(model, chosen: str = "", size: float = 0.02, **metadata: str) -> ErasedDelta:
    """A delta that moves every weight whose name holds `chosen`."""
    generator = torch.Generator().manual_seed(0)
    old = {
        name: param.detach().clone() for name, param in model.parameters().items() if chosen in name
    }
    new = {
        name: value + size * torch.randn(value.shape, generator=generator)
        for name, value in old.items()
    }
    told = {
        "base_fingerprint": model.fingerprint,
        "base_id": model.name,
        "method": "salun",
        "created_with": "0.1.0",
    }
    told |= {
        "config": json.dumps({"erase": {}, "method": {"density": 0.5}}),
        "concepts": json.dumps([CONCEPT]),
    }
    return ErasedDelta.between(old, new, told | metadata)


def model_of(family: str):
    pipeline = FAMILIES[family]()
    return family_of(pipeline, family)(pipeline, f"/home/somebody/{family}")


@pytest.fixture(scope="module")
def heart(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("heart") / "delta.safetensors"
    moved(load_model(str(base)), "attn").save(path)
    return path


def drawn(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    # FLUX's pipeline draws 1024 pixels whatever its parts say
    size = {"height": 64, "width": 64} if isinstance(pipeline, FluxPipeline) else {}
    return np.asarray(
        pipeline("a heart", num_inference_steps=2, generator=generator, **size).images[0]
    ).astype(int)


# ---- the code that cards and documents show ----


@pytest.mark.parametrize("folder", [CANVAS, CANVAS_FLOW], ids=lambda folder: folder.name)
def test_the_embedded_checkpoints_cards_run_as_they_stand(folder, tmp_path, monkeypatch):
    (code,) = BLOCK.findall((folder / "README.md").read_text(encoding="utf-8"))
    (tmp_path / "erase").mkdir()
    (tmp_path / "erase/models").symlink_to(CANVAS.parent)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "card", "exec"), {})
    assert (tmp_path / "heart.png").stat().st_size > 1000


@pytest.mark.parametrize("format", ["diffusers", "components", "lora"])
def test_a_card_says_what_the_pipeline_is_without(format, tmp_path):
    """diffusers opens a Stable Diffusion 3 without its T5 only if it is told so."""
    model = model_of("sd3-without-t5")
    save_pipeline(model.pipeline(), tmp_path / "base")
    delta, out = moved(model, "attn"), tmp_path / "out"
    write_export(format, delta, model, out)
    code = usage(format, model, delta.components).code
    code = code.replace("path/to/this/folder", str(out)).replace(
        "path/to/base", str(tmp_path / "base")
    )
    names: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), names)
    assert names["pipeline"].text_encoder_3 is None


OTHERWISE = ("add_a_method.md", "freezing.md", "quickstart.md", "sequences.md")
"""a package in pieces (tests/test_add_a_method.py), and what opens the folders that commands made
(freezing.md: tests/test_freeze.py)"""


def test_the_code_of_the_documents_runs_as_it_stands(tmp_path, monkeypatch):
    model = load_model("canvas")
    for name, chosen in (("heart", "unet.mid_block"), ("neon", "attn2")):
        moved(model, chosen).save(tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    for page in sorted((ROOT / "docs").glob("*.md")):
        if page.name in OTHERWISE:
            continue
        for code in BLOCK.findall(page.read_text(encoding="utf-8")):
            exec(compile(code, str(page), "exec"), {})


@pytest.mark.slow
def test_the_code_of_the_readme_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code in BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8")):
        exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "runs/heart/model/model_index.json").is_file()


# ---- folders ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_a_folder_in_half_precision_draws_in_stock_diffusers_without_arguments(
    family, dtype, tmp_path
):
    model = model_of(family)
    export_diffusers(moved(model, "attn"), model, tmp_path / "out", dtype=dtype)
    for given in ({}, {"torch_dtype": torch.float32}, {"torch_dtype": dtype}):
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", **given)
        want = given.get("torch_dtype", torch.float32)
        parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        assert {part.dtype for part in parts} == {want}
        if want == torch.float32:  # a CPU's convolutions in float16 are slow
            drawn(pipeline)


def test_a_part_in_half_precision_fits_the_base_that_it_is_put_into(base, heart, tmp_path):
    export_components(ErasedDelta.load(heart), str(base), tmp_path / "out", dtype=torch.float16)
    part = CLIPTextModel.from_pretrained(tmp_path / "out/text_encoder")
    drawn(DiffusionPipeline.from_pretrained(base, text_encoder=part))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd3", "flux"])
def test_a_folder_has_the_names_and_vocabularies_that_older_versions_read(family, tmp_path):
    model = model_of(family)
    export_diffusers(moved(model, "attn"), model, tmp_path / "out")
    for path in (tmp_path / "out").glob("text_encoder*/model.safetensors"):
        with safe_open(path, "pt") as file:
            names = set(file.keys())
        kind = json.loads((path.parent / "config.json").read_text())["architectures"]
        if kind != ["T5EncoderModel"]:
            assert all(
                name.startswith("text_model.") for name in names - {"text_projection.weight"}
            )
    clips = [
        path.parent
        for path in (tmp_path / "out").glob("tokenizer*/tokenizer_config.json")
        if (path.parent.name, family) not in (("tokenizer_3", "sd3"), ("tokenizer_2", "flux"))
    ]
    for folder in clips:
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        assert vocabulary["<|startoftext|>"] == 721 and (folder / "merges.txt").is_file()
    for path in (tmp_path / "out").glob("tokenizer*/tokenizer_config.json"):
        assert not isinstance(json.loads(path.read_text()).get("extra_special_tokens"), list)
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    t5 = {"sd3": "tokenizer_3", "flux": "tokenizer_2"}.get(family)
    assert t5 is None or index[t5][1] == "T5TokenizerFast"


def test_the_embedded_checkpoint_has_them_too():
    with safe_open(CANVAS / "text_encoder/model.safetensors", "pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys())  # no mapping
    assert json.loads((CANVAS / "text_encoder/config.json").read_text())["dtype"] == "float32"
    assert (CANVAS / "tokenizer/vocab.json").is_file() and (
        CANVAS / "tokenizer/merges.txt"
    ).is_file()
    pipeline = StableDiffusionPipeline.from_pretrained(CANVAS)
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {
        torch.float32
    }


def test_an_exported_folder_does_not_tell_where_the_base_lay(base, heart, tmp_path):
    export_diffusers(ErasedDelta.load(heart), str(base), tmp_path / "out")
    texts = [path.read_text(encoding="utf-8") for path in (tmp_path / "out").rglob("*.json")]
    assert texts and not any(str(base.parent) in text for text in texts)


# ---- a loaded model stays as it was found ----


def state_of(model):
    parts = {
        name: part
        for name, part in model.pipeline().components.items()
        if isinstance(part, torch.nn.Module)
    }
    tensors = {
        f"{name}.{key}": value
        for name, part in parts.items()
        for key, value in part.state_dict().items()
    }
    return {name: value.clone() for name, value in tensors.items()}, {
        name: repr(part.config) for name, part in parts.items()
    }


@pytest.mark.parametrize("write", [export_diffusers, export_components, export_single_file])
@pytest.mark.parametrize("fails", [False, True])
def test_a_loaded_model_is_exported_and_stays_as_it_was_found(write, fails, tmp_path):
    model = model_of("sd1")
    delta, before, fingerprint = moved(model, "attn"), state_of(model), model.fingerprint
    if fails:
        delta.values[next(iter(delta.values))][0] = 1e6
        with pytest.raises(ErasureError, match="beyond the range"):
            write(delta, model, tmp_path / "out", dtype=torch.float16)
    else:
        write(delta, model, tmp_path / "out", dtype=torch.float16)
    after = state_of(model)
    assert (
        before[0].keys() == after[0].keys()
        and before[1] == after[1]
        and model.fingerprint == fingerprint
    )
    for name, value in before[0].items():
        assert after[0][name].dtype == value.dtype and torch.equal(after[0][name], value)


@pytest.mark.parametrize("write", [export_diffusers, export_components, export_single_file])
def test_a_base_that_is_not_kept_gives_the_same_files(write, tmp_path):
    model = model_of("sd1")
    delta = moved(model, "attn")
    for keep in (True, False):
        write(delta, model, tmp_path / str(keep), dtype=torch.float16, keep=keep)
    names = [path.relative_to(tmp_path / "True") for path in (tmp_path / "True").rglob("*.*")]
    assert names
    for name in names:
        assert (tmp_path / "False" / name).read_bytes() == (tmp_path / "True" / name).read_bytes()
    assert {weight.dtype for weight in model.parameters().values()} == {torch.float16}


# ---- two exports to one name ----


def test_of_two_exports_to_one_folder_one_wins_whole_and_the_other_is_refused(
    heart, tmp_path, monkeypatch
):
    from erase import export

    delta, save = ErasedDelta.load(heart), ErasedDelta.save

    def slow(self, path):
        if not getattr(slow, "inside", False):
            slow.inside = True
            export_delta(delta, tmp_path / "out", "the quick one")  # while the first is at work
        save(self, path)

    monkeypatch.setattr(export.ErasedDelta, "save", slow)
    with pytest.raises(ErasureError, match="out exists already"):
        export_delta(delta, tmp_path / "out", "the slow one")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/README.md").read_text() == "the quick one"
    assert ErasedDelta.load(tmp_path / "out/delta.safetensors").sha256 == delta.sha256


@pytest.mark.skipif(os.name == "nt", reason="there are no locks of folders on Windows")
def test_what_a_killed_export_left_is_removed_by_the_next(heart, tmp_path):
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom erase.export.whole import _unfinished\n"
        "with _unfinished(Path(sys.argv[1])) as aside:\n    (aside / 'half').write_text('x')\n    "
        "os._exit(9)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    (left,) = tmp_path.glob(".out.*.part")
    export_delta(ErasedDelta.load(heart), tmp_path / "out")
    assert not left.exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- LoRA ----


def original_layers(pipeline) -> set[str]:
    """SDXL's layers as its original names them: the module of every key of a single file's UNet."""
    keys = write_single_file(pipeline, Path(os.environ["TMPDIR_OF_TEST"]) / "xl.safetensors")
    with safe_open(keys, "pt") as file:
        names = [
            name
            for name in file.keys()
            if name.startswith("model.diffusion_model.") and name.endswith(".weight")
        ]
    return {
        name.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_")
        for name in names
    }


def test_an_sdxl_lora_has_the_names_of_the_original_in_every_layer(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR_OF_TEST", str(tmp_path))
    model = model_of("sdxl")
    lora = extract_lora(moved(model), model, rank=2)
    lora.save(tmp_path / "lora.safetensors")
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        names, header = {key.split(".")[0] for key in file.keys()}, file.metadata()
    ours = {name.removeprefix("lora_unet_") for name in names if name.startswith("lora_unet_")}
    assert (
        ours <= original_layers(model.pipeline())
        and {"label_emb_0_0", "input_blocks_4_1_transformer_blocks_0_attn2_to_k"} <= ours
    )
    texts = names - {f"lora_unet_{name}" for name in ours}
    layer = r"text_model_encoder_layers_\d+_(self_attn_(q|k|v|out)_proj|mlp_fc[12])"
    assert texts and all(re.fullmatch(rf"lora_te[12]_{layer}", name) for name in texts)
    assert header["ss_base_model_version"] == "sdxl_base_v1-0" and header["ss_v2"] == "False"
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert "text_encoder_2.text_projection.weight" in lora.left_out


@pytest.mark.parametrize(
    "family, version, v2, architecture",
    [
        ("sd1", "sd_v1", "False", "stable-diffusion-v1/lora"),
        ("sd2", "sd_v2", "True", "stable-diffusion-v2-512/lora"),
        ("sd2-v", "sd_v2_v", "True", "stable-diffusion-v2-768-v/lora"),
    ],
)
def test_a_lora_of_stable_diffusion_1_or_2_tells_its_base(
    family, version, v2, architecture, tmp_path
):
    model = model_of(family)
    lora = extract_lora(moved(model), model, rank=2)
    lora.save(tmp_path / "lora.safetensors", torch.float16)
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        names, header = {key.split(".")[0] for key in file.keys()}, file.metadata()
    assert {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0"} <= names
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1" in names and all(
        name.startswith("lora_") for name in names
    )
    assert (header["ss_base_model_version"], header["ss_v2"], header["modelspec.architecture"]) == (
        version,
        v2,
        architecture,
    )
    assert header["ss_network_module"] == "networks.lora" and header["ss_network_dim"] == "2"
    assert {"modelspec.title", "modelspec.implementation", "modelspec.resolution"} <= header.keys()
    assert "somebody" not in json.dumps(header)


def test_a_family_without_kohya_names_goes_by_those_of_diffusers(tmp_path):
    model = model_of("sd3-without-t5")
    lora = extract_lora(moved(model, "attn"), model, rank=2)
    assert lora.layout == "diffusers" and not kohya_entries(model.pipeline(), lora.down)
    with pytest.raises(ErasureError, match="no names for this family"):
        lora.save(tmp_path / "lora.safetensors", layout="kohya")


def as_stacked(lora, transformer):
    """Layer of a FLUX.1 file -> the change of its matrix, as the file's layout has it."""
    changes = {}
    for entry in bfl.flux(transformer):
        layers = [name.rpartition(".")[0] for name in entry.names]
        if entry.key.endswith(".weight") and set(layers) & set(lora.down):
            shapes = [transformer.get_parameter(n.partition(".")[2]).shape for n in entry.names]
            parts = [
                lora.up[layer] @ lora.down[layer] if layer in lora.down else torch.zeros(shape)
                for layer, shape in zip(layers, shapes, strict=True)
            ]
            whole = torch.cat(parts)
            halves = whole.chunk(2)[::-1] if entry.form == "swapped" else (whole,)
            changes[entry.key.rpartition(".")[0]] = torch.cat(halves)
    return changes


def test_a_lora_of_flux_changes_what_its_file_stacks(tmp_path):
    model = model_of("flux")
    lora = extract_lora(moved(model, "transformer."), model, rank=2)
    assert lora.layout == "diffusers"
    lora.save(tmp_path / "lora.safetensors", layout="kohya")
    state, header = load_file(tmp_path / "lora.safetensors"), metadata_of(tmp_path)
    assert header["ss_base_model_version"] == "flux1"
    assert header["ss_network_module"] == "networks.lora_flux"
    expected = as_stacked(lora, model.component("transformer"))
    assert any("linear1" in key for key in expected) and any("adaLN" in key for key in expected)
    for key, change in expected.items():
        name = "lora_unet_" + key.replace(".", "_")
        down, up = (state.pop(f"{name}.lora_{side}.weight") for side in ("down", "up"))
        scale = state.pop(f"{name}.alpha") / len(down)
        assert torch.allclose(up @ down * scale, change, atol=1e-6), key
    assert not state


def test_diffusers_reads_a_lora_of_flux_in_kohyas_names_as_in_its_own(tmp_path):
    """Of the blocks of two streams: it knows those of one stream in the published width alone."""
    model = model_of("flux")
    lora = extract_lora(moved(model, "transformer.transformer_blocks."), model, rank=2)
    lora.save(tmp_path / "lora.safetensors", layout="kohya")
    read = FluxPipeline.lora_state_dict(load_file(tmp_path / "lora.safetensors"))
    assert {key.rsplit(".lora_", 1)[0] for key in read} == set(lora.down)
    for name in lora.down:
        change = read[f"{name}.lora_B.weight"] @ read[f"{name}.lora_A.weight"]
        assert torch.allclose(change, lora.up[name] @ lora.down[name], atol=1e-6)


def test_a_lora_of_flux_in_kohyas_names_is_read_as_what_it_was_made_of(tmp_path):
    model = model_of("flux")
    lora = extract_lora(moved(model, "transformer."), model, rank=2)
    lora.save(tmp_path / "lora.safetensors", layout="kohya")
    read = read_erased(model, [tmp_path / "lora.safetensors"])
    made, base = lora.as_delta(model), model.parameters()
    assert set(read.values) == set(made.values) == {f"{name}.weight" for name in lora.down}
    for name in made.values:
        one, other = (delta.change(name, base[name].detach()) for delta in (read, made))
        assert torch.allclose(one, other, atol=1e-6), name


def metadata_of(folder) -> dict[str, str]:
    with safe_open(folder / "lora.safetensors", "pt") as file:
        return file.metadata()


def test_what_some_programs_pass_over_is_counted_and_said(base, tmp_path, capsys):
    model = load_model(str(base))
    delta = moved(model, "weight")
    delta.save(tmp_path / "delta.safetensors")
    assert (
        run(
            run_export.main,
            [
                "--delta",
                str(tmp_path / "delta.safetensors"),
                "--format",
                "lora",
                "--out",
                str(tmp_path / "out"),
            ],
        )
        == 0
    )
    said, card = capsys.readouterr().out, (tmp_path / "out/README.md").read_text()
    for text in (said, card):
        (passed,) = re.findall(
            r"sd-scripts and stable-diffusion.cpp pass over ([^(]*) \([\d.]+% of the squared", text
        )
        assert set(passed.split(", ")) == {
            "conv_in",
            "conv_out",
            "time_embedding.linear_1",
            "time_embedding.linear_2",
        }
    told = json.loads((tmp_path / "out/lora.json").read_text())
    assert set(told["outside"]) == {
        f"unet.{n}"
        for n in ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
    }
    squares = {
        n: delta.change(f"{n}.weight", model.parameters()[f"{n}.weight"]).square().sum().item()
        for n in told["outside"]
    }
    whole = sum(delta.change(n, model.parameters()[n]).square().sum().item() for n in delta.values)
    assert told["outside_share"] == pytest.approx(sum(squares.values()) / whole)


# ---- single files ----


def test_a_single_file_has_the_keys_that_modelspec_requires(base, heart, tmp_path):
    export_single_file(ErasedDelta.load(heart), str(base), tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        header = file.metadata()
    assert (
        header["modelspec.title"] == "pico without heart"
        and header["modelspec.resolution"] == "32x32"
    )
    assert (
        header["modelspec.implementation"].endswith("generative-models")
        and header["modelspec.architecture"]
    )


def test_an_sd2_file_has_the_last_layer_that_other_programs_build(tmp_path):
    pipeline = tiny_sd2()
    config = CLIPTextConfig(**{**pipeline.text_encoder.config.to_dict(), "num_hidden_layers": 23})
    pipeline.text_encoder = CLIPTextModel(config).eval()
    write_single_file(pipeline, tmp_path / "out.safetensors", torch.float16)
    prefix = "cond_stage_model.model."
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        names = set(file.keys())
        last, before = (
            {n.split(f"resblocks.{i}.")[1]: n for n in names if f"resblocks.{i}." in n}
            for i in (23, 22)
        )
        assert last.keys() == before.keys() and len(last) == 12
        assert all(torch.equal(file.get_tensor(last[n]), file.get_tensor(before[n])) for n in last)
        assert (
            file.get_tensor(f"{prefix}text_projection").shape == (48, 48)
            and f"{prefix}logit_scale" in names
        )
    pipeline.save_pretrained(tmp_path / "config")
    loaded = load_model(
        str(tmp_path / "out.safetensors"), "cpu", load_config(tmp_path / "config")
    ).component("text_encoder")
    assert len(loaded.state_dict()) == len(pipeline.text_encoder.state_dict())


def load_config(folder):
    from erase.models import LoadConfig

    return LoadConfig(config=str(folder), prediction="epsilon")


# ---- cards ----


def report_of(delta: ErasedDelta, **provenance: object) -> EvalReport:
    def scores(ua: int, kept: int) -> list:
        return [
            proportion(name, hits, 240) for name, hits in (("UA", ua), ("IRA", kept), ("CRA", kept))
        ]

    told = {
        "delta_sha256": delta.sha256,
        "method": delta.metadata["method"],
        "config": json.loads(delta.metadata["config"]),
    }
    return EvalReport(
        CONCEPT, {"base": scores(2, 238), "erased": scores(240, 230)}, {**told, **provenance}
    )


def test_a_report_at_full_strength_is_refused_for_a_hundredth(heart, tmp_path, capsys):
    report = report_of(ErasedDelta.load(heart)).save(tmp_path / "report.json")
    flags = [
        "--delta",
        str(heart),
        "--format",
        "delta",
        "--report",
        str(report),
        "--out",
        str(tmp_path / "out"),
    ]
    assert run(run_export.main, [*flags, "--scale", "0.01"]) == 2
    assert (
        "of other settings, strength or parts" in capsys.readouterr().err
        and not (tmp_path / "out").exists()
    )
    assert run(run_export.main, flags) == 0


@pytest.mark.parametrize("named", [True, False], ids=["by digest", "from before there was one"])
def test_the_report_of_a_delta_of_other_settings_is_refused(named, heart, base, tmp_path, capsys):
    other = moved(
        load_model(str(base)),
        "attn",
        0.5,
        config=json.dumps({"erase": {}, "method": {"density": 0.1}}),
    )
    report = report_of(other)
    if not named:
        del report.provenance["delta_sha256"]
    report.save(tmp_path / "report.json")
    flags = [
        "--delta",
        str(heart),
        "--format",
        "delta",
        "--report",
        str(tmp_path / "report.json"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert run(run_export.main, flags) == 2
    assert "name the report of this delta" in capsys.readouterr().err


def test_a_weakened_erasure_says_its_strength_and_that_nothing_was_measured(
    heart, tmp_path, capsys
):
    out = tmp_path / "out"
    assert (
        run(
            run_export.main,
            ["--delta", str(heart), "--format", "delta", "--scale", "0.01", "--out", str(out)],
        )
        == 0
    )
    card = (out / "README.md").read_text()
    assert (
        "# pico without heart (at 0.01 of its strength)" in card
        and "Not measured" in card
        and "not measured together" in card
    )
    assert "heart (at 0.01 of its strength)" in capsys.readouterr().out


def test_the_scores_are_the_cards_model_index(heart):
    delta = ErasedDelta.load(heart)
    text = model_card(report_of(delta), delta.metadata, sha256=delta.sha256)
    data = ModelCard(text, ignore_metadata_errors=False).data
    found = {result.metric_name: result.metric_value for result in data.eval_results}
    assert (
        found["UA % ↑ (erased)"] == 100
        and found["UA % ↑ (base)"] == pytest.approx(0.8333)
        and len(found) == 6
    )
    assert data.model_name == "pico without heart"
    for card in (
        model_card(None, delta.metadata),
        model_card(report_of(delta), delta.metadata, exact=False),
    ):
        assert ModelCard(card).data.eval_results is None


EVIL = [
    "heart\n---\nlicense: mit\n---\n# Safe",
    "heart](https://evil.example) [x",
    "<script>alert(1)</script>",
    "heart | 100.0 | `rm -rf`",
    "![](http://evil.example/x.png)",
    "```\n# out of the block",
]


@pytest.mark.parametrize("name", EVIL)
def test_a_concepts_name_writes_no_markdown_and_no_front_matter(name, heart):
    delta = ErasedDelta.load(heart)
    target = " ".join(name.split())  # as a concept's names are read
    concept = {
        "target": target,
        "anchor": f"{target} too",
        "synonyms": [f"{target} 2"],
        "templates": ["a {}"],
    }
    report = replace(
        report_of(delta), concept=concept, provenance={"commands": [f"erase --concept '{name}'"]}
    )
    card = model_card(
        report,
        {**delta.metadata, "concepts": json.dumps([concept]), "created_with": name, "method": name},
    )
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["license"] == "other"
    prose = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", body, flags=re.M | re.S)
    prose = re.sub(r"(?<!\\)`[^`\n]*`", "", prose)
    prose = re.sub(r"\[(low, high|[\d., ]+)\]", "", prose)  # intervals
    assert (
        not re.search(r"(?<!\\)[<\[]", prose) and "\n# Safe" not in body and "\n# out" not in prose
    )
    assert len(re.findall(r"^#+ .*$", prose, re.M)) == 5 and len(BLOCK.findall(body)) == 1
    for row in re.findall(r"^\| .*$", prose, re.M):
        assert len(re.findall(r"(?<!\\)\|", row)) in (3, 4)


@pytest.mark.parametrize(
    "where", ["/home/somebody/my models/sd14", "C:\\Users\\somebody\\sd14", "~/somebody/sd14"]
)
def test_a_card_holds_no_absolute_path(where, heart):
    delta = ErasedDelta.load(heart)
    config = json.dumps({"erase": {"model": where, "load": {"config": where}}, "images": [where]})
    report = report_of(
        delta,
        commands=[f"erase-concept --model '{where}' --out='{where}/x'"],
        config=json.loads(config),
    )
    card = model_card(report, {**delta.metadata, "base_id": where, "config": config})
    assert "somebody" not in card and "path/to/sd14" in card and "# sd14 without heart" in card


def test_the_before_and_after_picture_goes_with_the_card(heart, tmp_path):
    report_of(ErasedDelta.load(heart)).save(tmp_path / "report/report.json")
    (tmp_path / "report/before_after.png").write_bytes(b"the picture")
    flags = [
        "--delta",
        str(heart),
        "--format",
        "delta",
        "--report",
        str(tmp_path / "report/report.json"),
    ]
    assert run(run_export.main, [*flags, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/before_after.png").read_bytes() == b"the picture"
    assert "](before_after.png)" in (tmp_path / "out/README.md").read_text()
