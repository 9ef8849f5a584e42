"""The whole job on a random model: words to delta to diffusers folder, also killed, resumed and in
two processes."""

import json
import os
import shlex
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from erase.delta import ErasedDelta
from erase.eval.report import EvalReport
from erase.export import export_diffusers
from erase.models import load_model
from erase.models.precision import pin_mkl_rounding
from erase.prompts.canvas import canvas_concept
from erase.prompts.errors import ErasureError
from erase.run import EraseConfig, erase_concept
from erase.scripts import demo, run_erase, run_evaluate, run_export
from erase.scripts.cli import run
from tests.launching import environment, launch, start
from tests.run_fixtures import DATA, FLAGS, METHOD
from tests.run_fixtures import base as base
from tests.run_fixtures import erased as erased


def masked(**change):
    """The method with other settings of its mask."""
    return replace(METHOD, mask=replace(METHOD.mask, **change))


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

    delta = ErasedDelta.load(erased / "delta.safetensors")
    mask = SaliencyMask.load(erased / "mask.safetensors")
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
    flags = [
        "--model", str(base), "--concept", "heart", "--anchor", "star", "--retain", "a blue moon",
        *FLAGS, "--train.optimizer", "SGD", "--train.lr", "0.1",
        "--train.optimizer_args", "{weight_decay: 0.1}",
    ]  # fmt: skip
    for processes in (1, 2):
        out = ["--out", str(processes)]
        launch("erase.scripts.run_erase", *flags, *out, folder=tmp_path, processes=processes)
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
        "--train.checkpoint_every",
        "1",
    ]
    flags[flags.index("--train.steps") + 1] = "12"

    def command(out):
        return [
            "erase.scripts.run_erase", "--model", str(base), "--concept", "heart",
            "--anchor", "star", "--retain", "a blue moon", "--out", out, *flags,
        ]  # fmt: skip

    process = start(*command("killed"), folder=tmp_path, environment=environment())
    while not (tmp_path / "killed" / "training.pt").exists():
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (tmp_path / "killed" / "delta.safetensors").exists()
    for out in ("killed", "whole"):
        launch(*command(out), folder=tmp_path)
    a, b = (ErasedDelta.load(tmp_path / out / "delta.safetensors") for out in ("killed", "whole"))
    assert same(a, b) and not (tmp_path / "killed" / "training.pt").exists()


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


def test_the_demo_deletes_nothing(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    for job in (run_erase, run_evaluate):
        monkeypatch.setattr(job, "main", lambda argv: None)
    assert run(demo.main, ["--out", str(tmp_path)]) == 0
    assert (tmp_path / "model" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("there", [True, False])
def test_the_demo_ends_with_the_live_pages_command(tmp_path, monkeypatch, capsys, there):
    (tmp_path / "my run" / "model").mkdir(parents=True)
    for job in (run_erase, run_evaluate):
        monkeypatch.setattr(job, "main", lambda argv: None)
    monkeypatch.setattr(demo, "find_spec", lambda name: there and name == "gradio" or None)
    demo.main(["--out", str(tmp_path / "my run")])
    command = f"erase-live --delta '{tmp_path}/my run'"
    install = "" if there else "pip install 'concept-erasure-toolkit[live]' && "
    assert capsys.readouterr().out.endswith(f"side by side: {install}{command}\n")


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
