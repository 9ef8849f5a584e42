"""The whole job on a random model: words to delta to diffusers folder, and everything a user can
get wrong."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from erase.delta import ErasedDelta
from erase.eval.canvas.judges import clip_folder
from erase.eval.report import EvalReport
from erase.eval.run import Evidence
from erase.export import export_diffusers
from erase.latents.prepare import LatentConfig, LatentSet, prepare_latents
from erase.methods.salun import SalUnConfig
from erase.models import LoadConfig, load_model
from erase.models.precision import pin_mkl_rounding
from erase.prompts.canvas import canvas_concept
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.run import EraseConfig, erase_concept
from erase.scripts import demo, run_erase, run_evaluate, run_export
from erase.scripts.cli import run
from erase.training.config import MaskConfig, TrainConfig

ROOT = Path(__file__).parents[1]
DATA = LatentConfig(n_forget=6, n_retain=8, steps=2, batch_size=4)
METHOD = SalUnConfig(
    mask=MaskConfig(batch_size=4), train=TrainConfig(steps=3, batch_size=4, lr=1e-3)
)


def masked(**change):
    """The method with other settings of its mask."""
    return replace(METHOD, mask=replace(METHOD.mask, **change))


FLAGS = "--latents.n_forget 6 --latents.n_retain 8 --latents.steps 2 --latents.batch_size 4 --train.steps 3 --train.batch_size 4".split()


@pytest.fixture(scope="module")
def base(make_pico_pipeline, tmp_path_factory):
    """A checkpoint on disk."""
    folder = tmp_path_factory.mktemp("base") / "pico"
    make_pico_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def erased(base, tmp_path_factory):
    """A finished erasure of `heart` from it."""
    out = tmp_path_factory.mktemp("erased")
    erase_concept(
        canvas_concept("heart"), EraseConfig(model=str(base), latents=DATA), METHOD, out=out
    )
    return out


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def same(a: ErasedDelta, b: ErasedDelta) -> bool:
    return a.values.keys() == b.values.keys() and all(
        torch.equal(a.values[name], b.values[name]) and torch.equal(a.bits[name], b.bits[name])
        for name in a.values
    )


def test_the_base_is_unchanged_on_disk_and_in_memory(base):
    before = files_of(base)
    model = load_model(str(base))
    weights = {name: p.detach().clone() for name, p in model.parameters().items()}
    erase_concept(canvas_concept("heart"), EraseConfig(latents=DATA), METHOD, model=model)
    assert files_of(base) == before
    assert all(torch.equal(p, weights[name]) for name, p in model.parameters().items())


def test_same_seed_same_delta_and_another_seed_another(base, erased):
    config = EraseConfig(model=str(base), latents=DATA)
    again = erase_concept(canvas_concept("heart"), config, METHOD)
    assert same(again, ErasedDelta.load(erased / "delta.safetensors"))
    assert not same(again, erase_concept(canvas_concept("heart"), replace(config, seed=1), METHOD))


def test_only_masked_weights_are_in_the_delta(erased, base):
    from erase.mask import SaliencyMask
    from erase.tensors import unpack

    delta, mask = (
        ErasedDelta.load(erased / "delta.safetensors"),
        SaliencyMask.load(erased / "mask.safetensors"),
    )
    assert 0 < delta.count <= mask.count() == mask.size // 2
    for name, bits in delta.bits.items():
        assert not (unpack(bits, mask.shapes[name]) & ~mask[name]).any()
    assert json.loads(delta.metadata["concepts"])[0]["target"] == "heart"
    assert len(json.loads((erased / "training.json").read_text())["losses"]) == 3


def test_a_saved_saliency_is_cut_at_another_density(erased, base, tmp_path):
    config = EraseConfig(model=str(base), latents=DATA)
    computed = erase_concept(canvas_concept("heart"), config, masked(density=0.2))
    saved = masked(density=0.2, saliency=str(erased / "saliency.safetensors"))
    assert same(computed, erase_concept(canvas_concept("heart"), config, saved))
    given = masked(file=str(erased / "mask.safetensors"))
    assert same(
        ErasedDelta.load(erased / "delta.safetensors"),
        erase_concept(canvas_concept("heart"), config, given),
    )


def test_export_is_pixel_identical_in_stock_diffusers(base, erased, tmp_path):
    delta = ErasedDelta.load(erased / "delta.safetensors")
    export_diffusers(delta, str(base), tmp_path / "model", card="# card\n")
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    memory = delta.apply(load_model(str(base))).pipeline()
    plain = load_model(str(base)).pipeline()
    images = [
        pipe(
            "a red heart",
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
        for pipe in (stock, memory, plain)
    ]
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])
    assert (tmp_path / "model" / "README.md").read_text() == "# card\n"
    with pytest.raises(ErasureError, match="exists already"):
        export_diffusers(delta, str(base), tmp_path / "model")


def test_delta_refuses_another_base_and_applying_twice(base, erased, make_pico_pipeline, tmp_path):
    delta = ErasedDelta.load(erased / "delta.safetensors")
    make_pico_pipeline(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ErasureError, match="belongs to base"):
        delta.apply(load_model(str(tmp_path / "other")))
    model = delta.apply(load_model(str(base)))
    with pytest.raises(ErasureError, match="belongs to base"):
        delta.apply(model)


def test_delta_is_exact_to_the_sign_of_zero():
    base = {"p": torch.tensor([0.0, 1.0, -0.0, 2.0])}
    delta = ErasedDelta.between(base, {"p": torch.tensor([-0.0, 1.0, -0.0, 3.0])}, {})
    assert delta.count == 2


def test_damaged_deltas_are_refused(erased, tmp_path):
    whole = (erased / "delta.safetensors").read_bytes()
    for broken in (whole[:100], whole[:-1], b""):
        (tmp_path / "d.safetensors").write_bytes(broken)
        with pytest.raises(ErasureError, match="cannot read"):
            ErasedDelta.load(tmp_path / "d.safetensors")
    with pytest.raises(ErasureError, match="not a delta file"):
        ErasedDelta.load(erased / "mask.safetensors")


def test_several_concepts_share_the_data_evenly_and_keep_what_neither_names(base):
    model = load_model(str(base))
    concepts = [canvas_concept("heart"), canvas_concept("Neon")]
    forget, retain = prepare_latents(model, concepts, DATA, 0)
    named = [("heart" in p or "valentine" in p) for p in forget.prompts]
    assert len(forget) == 6 and 3 <= sum(named) <= 6
    words = ("heart", "valentine", "neon", "glowing")
    assert not any(word in prompt.lower() for prompt in retain.prompts for word in words)
    assert all(a != p for a, p in zip(forget.anchors, forget.prompts, strict=True))


def test_a_share_of_the_forget_latents_shows_the_anchor(base):
    model, spec = load_model(str(base)), [canvas_concept("heart")]
    plain, _ = prepare_latents(model, spec, DATA, 0)
    mixed, _ = prepare_latents(model, spec, DATA, 0, None, 0.5)
    assert plain.shows_anchor is None and mixed.shows_anchor.tolist() == [False] * 3 + [True] * 3
    assert mixed.prompts == plain.prompts and mixed.anchors == plain.anchors
    assert torch.allclose(mixed.latents[:3], plain.latents[:3], atol=1e-5)
    shown = model.sample(
        [*mixed.prompts[:3], *mixed.anchors[3:]][:4], [0, 1, 2, 3], DATA.steps, DATA.guidance
    )
    assert torch.allclose(mixed.latents[3], shown[3], atol=1e-5) and not torch.allclose(
        plain.latents[3], shown[3], atol=1e-3
    )


def test_latents_from_images_and_their_cache(base, tmp_path, monkeypatch):
    from PIL import Image

    model = load_model(str(base))
    for i in range(3):
        Image.fromarray(np.full((40, 60, 3), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
    config = replace(DATA, forget_images=str(tmp_path))
    forget, _ = prepare_latents(model, [canvas_concept("heart")], config, 0, tmp_path / "cache")
    assert forget.std is not None and forget.latents.shape == (6, 4, 8, 8)
    assert torch.equal(forget.latents[0], forget.latents[3])  # three files, taken in turn
    found = [LatentSet.load(path) for path in (tmp_path / "cache").glob("forget*")]
    assert (
        len(found) == 1
        and torch.equal(found[0].latents, forget.latents)
        and found[0].anchors == forget.anchors
    )
    draws = [forget.draw(torch.tensor([0]), torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    Image.new("RGB", (40, 60), "red").save(tmp_path / "3.bmp")
    before, _ = prepare_latents(model, [canvas_concept("heart")], config, 0, tmp_path / "cache")
    # as many bytes, under the same name
    Image.new("RGB", (40, 60), "blue").save(tmp_path / "3.bmp")
    after, _ = prepare_latents(model, [canvas_concept("heart")], config, 0, tmp_path / "cache")
    assert torch.equal(before.latents[2], after.latents[2]) and not torch.equal(
        before.latents[3], after.latents[3]
    )
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(ErasureError, match=r"cannot read the image .*1\.png"):
        prepare_latents(model, [canvas_concept("heart")], config, 1)
    # refused before anything is sampled
    monkeypatch.setattr("erase.latents.prepare.sample_points", None)
    with pytest.raises(ErasureError, match="no images"):
        prepare_latents(
            model,
            [canvas_concept("heart")],
            replace(DATA, retain_images=str(tmp_path / "nowhere")),
            0,
        )


def test_a_model_in_half_precision_is_refused(base):
    model = load_model(base, options=LoadConfig(dtype="float16"))
    with pytest.raises(
        ErasureError, match=r"is torch\.float16, but training needs float32 weights"
    ):
        erase_concept(canvas_concept("heart"), EraseConfig(latents=DATA), METHOD, model=model)


def test_a_finished_run_is_not_done_again_and_another_is_refused(erased, base):
    stamp = (erased / "delta.safetensors").stat().st_mtime_ns
    config = EraseConfig(model=str(base), latents=DATA)
    erase_concept(canvas_concept("heart"), config, METHOD, out=erased)
    assert (erased / "delta.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ErasureError, match="holds another run"):
        erase_concept(canvas_concept("star"), config, METHOD, out=erased)


def test_two_processes_give_the_delta_of_one(base, tmp_path):
    """Mask sums and gradients are shared before they are used: weights outside the mask stay, the
    rest agrees to rounding."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    flags = [
        "--model",
        str(base),
        "--concept",
        "heart",
        "--anchor",
        "star",
        "--retain",
        "a blue moon",
        "--mask.batch_size",
        "2",
    ]
    flags += [
        *FLAGS,
        "--train.optimizer",
        "SGD",
        "--train.lr",
        "0.1",
        "--train.optimizer_args",
        "{weight_decay: 0.1}",
    ]
    for processes in (1, 2):
        launcher = [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(processes),
            "--master_port",
            "29517",
        ]
        command = [
            sys.executable,
            *launcher,
            "-m",
            "erase.scripts.run_erase",
            *flags,
            "--out",
            str(tmp_path / str(processes)),
        ]
        subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True)
    from erase.mask import SaliencyMask

    masks = [SaliencyMask.load(tmp_path / n / "mask.safetensors") for n in "12"]
    agree = sum(int((masks[0][name] == masks[1][name]).sum()) for name in masks[0].bits)
    assert agree > 0.999 * masks[0].size
    model = load_model(str(base))
    weights = [
        {name: p.clone() for name, p in delta_applied(tmp_path / n, base).parameters().items()}
        for n in "12"
    ]
    for name, p in model.parameters().items():
        assert torch.allclose(weights[0][name], weights[1][name], atol=2e-4)
        if name in masks[1]:
            assert torch.equal(weights[1][name][~masks[1][name]], p[~masks[1][name]])


def delta_applied(folder, base):
    return ErasedDelta.load(folder / "delta.safetensors").apply(load_model(str(base)))


def test_command_killed_and_resumed_gives_the_same_delta(base, erased, tmp_path):
    """kill -9 between two checkpoints of the installed command, then the very same command."""
    flags = [
        *FLAGS,
        "--train.lr",
        "0.001",
        "--mask.batch_size",
        "4",
        "--train.checkpoint_every",
        "1",
    ]
    flags[flags.index("--train.steps") + 1] = "12"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def command(out):
        return [sys.executable, "-m", "erase.scripts.run_erase", "--model", str(base), "--concept", "heart", "--anchor", "star",
                "--retain", "a blue moon", "--out", str(tmp_path / out), *flags]  # fmt: skip

    process = subprocess.Popen(
        command("killed"), env=environment, cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "killed" / "training.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "delta.safetensors").exists()
    for out in ("killed", "whole"):
        subprocess.run(command(out), env=environment, cwd=ROOT, check=True, capture_output=True)
    a, b = (ErasedDelta.load(tmp_path / out / "delta.safetensors") for out in ("killed", "whole"))
    assert same(a, b) and not (tmp_path / "killed" / "training.pt").exists()


BAD = [
    (["--concept", "hart"], "did you mean 'heart'"),
    (["--concept", "heart", "--anchor", "Neon"], "Neon"),
    (["--concept", "heart", "--method", "salum"], "did you mean 'salun'"),
    (["--concept", "heart", "--mask.densty", "0.5"], "did you mean 'mask.density'"),
    (["--concept", "heart", "--train.lrr", "0.5"], "did you mean 'train.lr'"),
    (["--concept", "heart", "--mask.density", "lots"], "density"),
    (["--concept", "heart", "--mask.density", "0"], "density must be in"),
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
    (["--concept", "heart", "--mask.file", "nowhere"], "mask.file nowhere is not there"),
    (["--concept", "heart", "--mask.saliency", "nowhere"], "mask.saliency nowhere is not there"),
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
            f"{option.split('.')[-1]} is {value}; it must be {bounds}",
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


def test_export_command_writes_a_card(base, erased, tmp_path, capsys):
    assert (
        run(
            run_export.main,
            ["--delta", str(erased / "delta.safetensors"), "--out", str(tmp_path / "model")],
        )
        == 0
    )
    assert "heart" in (tmp_path / "model" / "README.md").read_text()
    shutil.rmtree(tmp_path / "model")


@pytest.mark.parametrize("text", ['{"losses": [1,', '{"loss": [1]}', "[]", '{"losses": ["low"]}'])
def test_a_damaged_record_of_training_is_named(text, tmp_path):
    (tmp_path / "training.json").write_text(text)
    with pytest.raises(ErasureError, match="training.json is damaged"):
        Evidence.of(tmp_path)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--classifier.judge", "canvass"], "unknown judge 'canvass'; did you mean 'canvas'"),
        (
            ["--evaluators", "clip"],
            "evaluators is a list, also where it holds one thing: --evaluators '[clip]'",
        ),
        (
            ["--evaluators", "[clip]", "--clip.model", "ViT-B-23"],
            "unknown CLIP model 'ViT-B-23'; did you mean 'ViT-B-32'",
        ),
        (["--evaluators", "[clip]", "--clip.model", "ViT-B-32"], "'ViT-B-32' needs weights"),
    ],
)
def test_a_judge_that_cannot_be_loaded_is_refused_before_images_are_made(
    flags, message, erased, base, tmp_path, capsys
):
    out = tmp_path / "report"
    given = [
        "--delta",
        str(erased / "delta.safetensors"),
        "--generate.steps",
        "1",
        "--out",
        str(out),
        *flags,
    ]
    assert run(run_evaluate.main, given) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_the_demo_deletes_nothing(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    for job in (run_erase, run_evaluate):
        monkeypatch.setattr(job, "main", lambda argv: None)
    assert run(demo.main, ["--out", str(tmp_path)]) == 0
    assert (tmp_path / "model" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "rows, flags, message",
    [
        ("prompt,seed\na heart,1\n", [], "no labels to judge them by"),
        (
            "prompt,seed,object,colour\na heart,1,heart,red\na star,1,star,\n",
            [],
            "has no label 'colour'",
        ),
        ("prompt,seed,object,colour\na heart,1,hart,red\n", [], "did you mean 'heart'"),
        ("prompt,seed,object,colour\na star,1,star,red\n", [], "no image is labelled 'heart'"),
        (
            "prompt,seed,object\na heart,1,heart\na star,1,star\n",
            ["--evaluators", "[clip]"],
            "lacks CLIP CRA",
        ),
    ],
)
def test_prompts_that_cannot_be_judged_are_refused_before_images_are_made(
    rows, flags, message, erased, tmp_path, capsys
):
    (tmp_path / "set.csv").write_text(rows)
    given = [
        "--delta",
        str(erased / "delta.safetensors"),
        "--prompts",
        str(tmp_path / "set.csv"),
        "--clip.model",
        str(clip_folder()),
    ]
    given += ["--generate.steps", "1", "--out", str(tmp_path / "report")]
    assert run(run_evaluate.main, [*given, *(flags or ["--evaluators", "[classifier]"])]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "report").exists()


def test_the_command_in_a_report_can_be_run_as_it_stands(erased, tmp_path, monkeypatch):
    (tmp_path / "my set.csv").write_text("prompt,seed\na heart,1\n")
    told = []
    monkeypatch.setattr(
        "erase.eval.run.evaluate",
        lambda *_, commands, **__: told.extend(commands) or EvalReport({}, {}),
    )
    flags = [
        "--delta",
        str(erased / "delta.safetensors"),
        "--prompts",
        str(tmp_path / "my set.csv"),
        "--evaluators",
        "[clip]",
    ]
    assert run(run_evaluate.main, flags) == 0
    assert [shlex.split(command) for command in told] == [["erase-evaluate", *flags]]


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
    ("maker", "chosen", "settled"),
    [(True, None, "AUTO,STRICT"), (True, "AVX2", "AVX2"), (False, None, None)],
)
def test_sums_are_settled_on_intel_unless_the_user_did(monkeypatch, maker, chosen, settled):
    monkeypatch.setattr("erase.models.precision._made_by_intel", lambda: maker)
    monkeypatch.delenv("MKL_CBWR", raising=False)
    if chosen:
        monkeypatch.setenv("MKL_CBWR", chosen)
    pin_mkl_rounding()
    assert os.environ.get("MKL_CBWR") == settled
