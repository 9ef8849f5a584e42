"""Two processes, started by torchrun: what they share, what comes out the same as from one, and what is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.commands.config import load_config_from_file

from erase.latents.prepare import LatentConfig, LatentSet, prepare_latents
from erase.mask import Saliency
from erase.methods.salun import SalUnConfig, compute_saliency
from erase.models import load_model
from erase.objectives.remap import make_job
from erase.parallel.launch import WRAPPERS
from erase.parallel.processes import BUCKET, _buckets
from erase.prompts.canvas import canvas_concept
from erase.prompts.errors import ErasureError
from erase.run import EraseConfig, erase_concept
from erase.scripts import run_erase, run_evaluate
from erase.scripts.cli import run
from erase.training.config import TrainConfig
from erase.training.loop import make_accelerator

ROOT = Path(__file__).parents[1]
CONCEPT = [canvas_concept("heart")]
DATA = LatentConfig(n_forget=10, n_retain=7, steps=2, batch_size=3)  # batches of 3, 3, 3, 1 and 3, 3, 1: uneven shares
SGD = TrainConfig(steps=6, batch_size=4, lr=0.1, optimizer="SGD", optimizer_args={"momentum": 0.9, "weight_decay": 0.1})
ADAM = {
    "optimizer": "AdamW",
    "lr": 1e-3,
    "optimizer_args": {"weight_decay": 0.1},
    "ema": 0.9,
    "max_grad_norm": 1.0,
    "schedule": "linear",
}
SPLIT = {"shard_optimizer": True, "checkpoint_every": 2, **ADAM}
METHOD = SalUnConfig(saliency_batch_size=2, train=SGD)  # 5 forget latents show the concept: 3 batches, 2 in one process
EVALUATE = ["--delta", "sgd/delta.safetensors", "--prompts", "prompts.csv", "--out", "report"]
EVALUATE += ["--evaluators", "[clip, nudenet, classifier]", "--generate.steps", "2", "--generate.batch_size", "4"]
CONFIGS = sorted((ROOT / "scripts" / "launch").glob("several-*.yaml"))  # the others: tests/test_fsdp.py

JOB = """
    import shutil, sys
    from dataclasses import replace
    from pathlib import Path
    import torch
    sys.path.insert(0, {tests!r})
    from test_processes import ADAM, CONCEPT, DATA, EVALUATE, METHOD, SGD, SPLIT, saliency_of
    from erase.latents.prepare import prepare_latents
    from erase.models import load_model
    from erase.parallel.processes import exists_on_all, in_shares, processes, reduce_all
    from erase.run import EraseConfig, erase_concept
    from erase.parallel.sharding import sharded
    from erase.prompts.errors import ErasureError
    from erase.scripts import demo, run_evaluate, run_export
    from erase.scripts.cli import run

    folder = Path.cwd()
    state = processes()
    me, main = state.process_index, state.is_main_process
    facts = {{}}
    facts["shares"] = in_shares(7, 2, lambda rows: (me, list(rows)), "rows", "row")
    sums = [torch.tensor([1.0, -2.0]) * (-1) ** me, torch.full((3, 2), me + 1.0), torch.arange(4.0).view(2, 2).t() * me]
    reduce_all(sums, "sum")
    means = [torch.full((2,), me + 1.0)]
    reduce_all(means, "mean")
    facts["sums"], facts["means"] = sums, means
    (folder / "everywhere").touch()
    facts["found"] = exists_on_all(folder / "everywhere"), exists_on_all(folder / "nowhere")
    try:
        exists_on_all(folder / ("everywhere" if main else "only-here"))
    except ErasureError as error:
        facts["apart"] = str(error)

    values = [torch.nn.Parameter(torch.ones(size)) for size in (100, 40, 60, 7)]
    optimizer = sharded(torch.optim.Adam, values, {{"lr": 0.1}})
    sum(value.sum() for value in values).backward()
    optimizer.step()
    held = sum(tensor.numel() for state in optimizer.optim.state.values() for tensor in state.values() if tensor.dim())
    facts["held"] = in_shares(2, 1, lambda _: held, "held", "process")

    forget, retain = prepare_latents(load_model("base"), CONCEPT, DATA, 0, folder / "cache")
    again, _ = prepare_latents(load_model("base"), CONCEPT, DATA, 0, folder / "cache")
    facts["latents"] = forget.latents, retain.latents, again.latents
    facts["saliency"] = saliency_of("base").values

    def erase(name, **train):
        method = replace(METHOD, mask_file="mask.safetensors", train=replace(SGD, **train))
        return erase_concept(CONCEPT, EraseConfig(model="base", latents=DATA), method, out=folder / name)

    erase("sgd")
    erase("plain", **ADAM)
    erase("sharded", shard_optimizer=True, **ADAM)

    # the fifth step fails once, after a state was saved at the fourth
    import erase.methods.salun as salun
    drawn = salun.make_batch
    def stop(job, step, part):
        if step == 4:
            raise KeyboardInterrupt
        return drawn(job, step, part)
    salun.make_batch = stop
    try:
        erase("stopped", **SPLIT)
    except KeyboardInterrupt:
        facts["stopped"] = (folder / "stopped" / "training.pt").exists()
    salun.make_batch = drawn
    if main:
        shutil.copytree("stopped", "handed-over")
    erase("stopped", **SPLIT)

    export = ["--delta", "sgd/delta.safetensors", "--out", "model"]
    facts["refused"] = [run(run_export.main, export), run(demo.main, ["--out", "demo"])]
    facts["evaluated"] = run(run_evaluate.main, EVALUATE)
    if main:
        torch.save(facts, "facts.pt")
"""


def saliency_of(base: str) -> Saliency:
    """The saliency of the base's own latents, by as many processes as there are."""
    model = load_model(base)
    forget, retain = prepare_latents(model, CONCEPT, DATA, 0, None, METHOD.anchor_latents)
    return compute_saliency(make_job(model, forget, retain, METHOD, 0, make_accelerator(METHOD.train)))


@pytest.fixture(scope="module")
def one(make_pico_pipeline, tmp_path_factory):
    """A folder with a base, a mask, prompts, and the erasure and its report by one process."""
    folder = tmp_path_factory.mktemp("one")
    make_pico_pipeline().save_pretrained(folder / "base")
    rows = [f"a red {name},{seed},{name},Flat,red" for name in ("heart", "star", "moon") for seed in (1, 2, 3)]
    (folder / "prompts.csv").write_text("\n".join(["prompt,seed,object,style,colour", *rows]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        saliency = saliency_of("base")
        saliency.save("saliency.safetensors")
        saliency.cut(0.5).save("mask.safetensors")
        method = replace(METHOD, mask_file="mask.safetensors")
        erase_concept(CONCEPT, EraseConfig(model="base", latents=DATA), method, out="sgd")
    return folder


@pytest.fixture(scope="module")
def two(one, tmp_path_factory):
    """The same folder's work by two processes: (folder, facts, stderr)."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("base", "prompts.csv", "mask.safetensors"):
        (folder / name).symlink_to(one / name)
    (folder / "job.py").write_text(textwrap.dedent(JOB.format(tests=str(ROOT / "tests"))))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([sys.executable, *launcher, "job.py"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, torch.load(folder / "facts.pt", weights_only=True), done.stderr


def test_work_is_shared_by_turns_and_all_know_the_results(two):
    assert two[1]["shares"] == [(0, [0, 1]), (1, [2, 3]), (0, [4, 5]), (1, [6])]


def test_tensors_of_all_shapes_are_summed_with_their_signs(two):
    cancelled, summed, transposed = two[1]["sums"]
    assert torch.equal(cancelled, torch.zeros(2)) and torch.equal(summed, torch.full((3, 2), 3.0))
    assert torch.equal(transposed, torch.arange(4.0).view(2, 2).t())
    assert torch.equal(two[1]["means"][0], torch.full((2,), 1.5))


def test_buckets_hold_what_fits_and_a_large_tensor_stands_alone():
    sizes = [1, BUCKET // 4, 5, 5, BUCKET, 3]
    made = [[len(tensor) for tensor in bucket] for bucket in _buckets(torch.empty(size, device="meta") for size in sizes)]
    assert made == [[1], [BUCKET // 4], [5, 5], [BUCKET], [3]]


def test_a_file_that_some_processes_do_not_see_is_an_error(two):
    folder, facts, _ = two
    assert facts["found"] == (True, False)
    assert re.search(r"is seen by 1 of 2 processes; put the output folder on a disk that all machines share", facts["apart"])


def test_latents_are_the_same_bits_and_the_cache_is_written_once(one, two):
    folder, facts, _ = two
    forget, retain = prepare_latents(load_model(str(one / "base")), CONCEPT, DATA, 0)
    assert torch.equal(facts["latents"][0], forget.latents) and torch.equal(facts["latents"][1], retain.latents)
    assert torch.equal(facts["latents"][2], forget.latents)
    files = sorted((folder / "cache").iterdir())
    assert len(files) == 2 and torch.equal(LatentSet.load(files[0]).latents, forget.latents)


def test_saliency_sums_signed_gradients_over_processes(one, two):
    """To rounding. Absolute values taken in each process would be far off: gradients of different batches cancel."""
    alone, shared = Saliency.load(one / "saliency.safetensors").values, two[1]["saliency"]
    total = sum(float(value.sum()) for value in alone.values())
    missed = sum(float((alone[name] - shared[name]).abs().sum()) for name in alone)
    assert missed < 1e-6 * total
    one_mask, two_mask = (Saliency(values).cut(0.5) for values in (alone, shared))
    differing = sum(int((one_mask[name] != two_mask[name]).sum()) for name in alone)
    assert differing < 1e-5 * one_mask.size


def weights_of(folder: Path, run: str) -> dict[str, torch.Tensor]:
    from erase.delta import ErasedDelta

    model = ErasedDelta.load(folder / run / "delta.safetensors").apply(load_model(str(folder / "base")))
    return {name: param.detach() for name, param in model.parameters().items()}


def norm(weights: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return sum(float((weights[name] - other[name]).square().sum()) for name in weights) ** 0.5


def test_training_gives_the_change_of_one_process_to_rounding(one, two):
    base = {name: param.detach() for name, param in load_model(str(one / "base")).parameters().items()}
    alone, shared = weights_of(one, "sgd"), weights_of(two[0], "sgd")
    assert norm(alone, shared) < 1e-5 * norm(alone, base)


def test_each_process_holds_its_part_of_the_optimizer_s_state(two):
    assert sum(two[1]["held"]) == 2 * 207 and max(two[1]["held"]) <= 2 * 107  # Adam's two moments of 207 values


def test_a_split_optimizer_gives_the_same_bits_also_when_stopped_and_resumed(two):
    folder, facts, _ = two
    plain, sharded, stopped = (weights_of(folder, run) for run in ("plain", "sharded", "stopped"))
    assert facts["stopped"] is True
    assert all(torch.equal(plain[name], sharded[name]) and torch.equal(plain[name], stopped[name]) for name in plain)


def test_a_run_that_two_processes_began_is_finished_by_one(one, two, monkeypatch):
    """From the state that a split optimizer left, to rounding; the last two of six steps."""
    folder, _, _ = two
    monkeypatch.chdir(folder)
    assert (folder / "handed-over" / "training.pt").exists()
    method = replace(METHOD, mask_file="mask.safetensors", train=replace(SGD, **SPLIT))
    delta = erase_concept(CONCEPT, EraseConfig(model="base", latents=DATA), method, out="handed-over")
    base = {name: param.detach() for name, param in load_model("base").parameters().items()}
    plain, handed = weights_of(folder, "plain"), weights_of(folder, "handed-over")
    assert delta.count and norm(plain, handed) < 1e-3 * norm(plain, base)


def test_evaluation_gives_the_report_of_one_process(one, two, monkeypatch):
    """To the byte, by every evaluator, with images of the weights that two processes trained."""
    folder, facts, _ = two
    assert facts["evaluated"] == 0
    monkeypatch.chdir(folder)
    report = (folder / "report" / "report.json").read_bytes()
    (folder / "report").rename(folder / "report-of-two")
    assert run(run_evaluate.main, EVALUATE) == 0
    assert (folder / "report" / "report.json").read_bytes() == report
    images = [sorted(path.read_bytes() for path in (folder / name).rglob("*.png")) for name in ("report", "report-of-two")]
    assert images[0] == images[1]


def test_work_for_one_process_is_refused_in_two(two):
    folder, facts, stderr = two
    assert facts["refused"] == [2, 2] and not (folder / "model").exists() and not (folder / "demo").exists()
    for command in ("erase-export", "erase-demo"):
        assert f"error: {command} is work for one process, not 2; run it without accelerate launch or torchrun" in stderr


def test_bars_are_the_main_process_s_and_say_what_is_shared(two):
    stderr = two[2]
    started = re.findall(r"^(.*?): +0%", stderr.replace("\r", "\n"), re.MULTILINE)
    assert {"forget latents of process 1 of 2", "saliency of process 1 of 2", "erasing on 2 processes"} <= set(started)
    assert started.count("NudeNet of process 1 of 2") == 2  # base and erased


@pytest.mark.parametrize("variable", WRAPPERS)
def test_a_launch_that_takes_the_model_apart_is_refused_in_a_sentence(variable, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(variable, "true")
    for main in (run_erase.main, run_evaluate.main):
        assert run(main, ["--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert f"this launch asks for {WRAPPERS[variable]}" in error and "several-gpus.yaml" in error and "Traceback" not in error
    with pytest.raises(ErasureError, match="takes the model apart"):
        make_accelerator(TrainConfig())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_shipped_configs(path):
    config = load_config_from_file(str(path))
    assert config.distributed_type == "MULTI_GPU" and config.num_processes > 1
    assert config.mixed_precision == "no"  # the recipe says it
    assert not getattr(config, "deepspeed_config", {}) and not getattr(config, "fsdp_config", {})


def test_configs_are_shipped():
    assert {path.stem for path in CONFIGS} >= {"several-gpus", "several-machines"}
