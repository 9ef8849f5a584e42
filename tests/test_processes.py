"""Two processes, as torchrun starts them: what they share, what comes out the same as from one, and
what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from accelerate.commands.config import load_config_from_file

from erase.delta import ErasedDelta
from erase.latents.latent_set import LatentSet
from erase.latents.prepare import prepare_latents
from erase.models import load_model
from erase.parallel.launch import WRAPPERS
from erase.parallel.processes import BUCKET, _buckets
from erase.prompts.errors import ErasureError
from erase.scripts import run_erase, run_evaluate
from erase.scripts.cli import run
from erase.training.config import TrainConfig
from erase.training.loop import make_accelerator
from erase.training.rules import scores
from erase.training.statistics import Statistics
from tests.launching import PROGRAMS, ROOT, launch
from tests.programs.processes_job import (
    CONCEPT,
    DATA,
    EVALUATE,
    OFTEN,
    STATISTICS,
    erase,
    statistics_of_base,
)

CONFIGS = sorted((ROOT / "scripts" / "launch").glob("several-*.yaml"))
"""the others: tests/test_fsdp_launch.py"""


@pytest.fixture(scope="module")
def one(make_pico_pipeline, tmp_path_factory):
    """A folder with a base, a mask, prompts, and the erasure and its report by one process."""
    folder = tmp_path_factory.mktemp("one")
    make_pico_pipeline().save_pretrained(folder / "base")
    rows = [
        f"a red {name},{seed},{name},Flat,red"
        for name in ("heart", "star", "moon")
        for seed in (1, 2, 3)
    ]
    (folder / "prompts.csv").write_text("\n".join(["prompt,seed,object,style,colour", *rows]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        statistics = statistics_of_base()
        statistics.save("saliency.safetensors")
        scores(statistics, "forget").cut(0.5).save("mask.safetensors")
        erase("sgd")
    return folder


@pytest.fixture(scope="module")
def two(one, tmp_path_factory):
    """The same folder's work by two processes: (folder, facts, stderr)."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("base", "prompts.csv", "mask.safetensors"):
        (folder / name).symlink_to(one / name)
    stderr = launch(
        PROGRAMS / "processes_job.py",
        folder=folder,
        processes=2,
        threads=torch.get_num_threads(),
    )
    return folder, torch.load(folder / "facts.pt", weights_only=True), stderr


def test_work_is_shared_by_turns_and_all_know_the_results(two):
    assert two[1]["shares"] == [(0, [0, 1]), (1, [2, 3]), (0, [4, 5]), (1, [6])]


def test_tensors_of_all_shapes_are_summed_with_their_signs(two):
    cancelled, summed, transposed = two[1]["sums"]
    assert torch.equal(cancelled, torch.zeros(2)) and torch.equal(summed, torch.full((3, 2), 3.0))
    assert torch.equal(transposed, torch.arange(4.0).view(2, 2).t())
    assert torch.equal(two[1]["means"][0], torch.full((2,), 1.5))


def test_buckets_hold_what_fits_and_a_large_tensor_stands_alone():
    sizes = [1, BUCKET // 4, 5, 5, BUCKET, 3]
    made = [
        [len(tensor) for tensor in bucket]
        for bucket in _buckets(torch.empty(size, device="meta") for size in sizes)
    ]
    assert made == [[1], [BUCKET // 4], [5, 5], [BUCKET], [3]]


def test_a_file_that_some_processes_do_not_see_is_an_error(two):
    folder, facts, _ = two
    assert facts["found"] == (True, False)
    assert re.search(
        r"is seen by 1 of 2 processes; put the output folder on a disk that all machines share",
        facts["apart"],
    )


def test_latents_are_the_same_bits_and_the_cache_is_written_once(one, two):
    folder, facts, _ = two
    forget, retain = prepare_latents(load_model(str(one / "base")), CONCEPT, DATA, 0)
    assert torch.equal(facts["latents"][0], forget.latents) and torch.equal(
        facts["latents"][1], retain.latents
    )
    assert torch.equal(facts["latents"][2], forget.latents)
    files = sorted((folder / "cache").iterdir())
    assert len(files) == 2 and torch.equal(LatentSet.load(files[0]).latents, forget.latents)


def test_statistics_are_summed_over_processes_before_anything_is_made_of_them(one, two):
    """To rounding. Absolute values taken in each process would be far off: gradients of different
    batches cancel."""
    alone, shared = Statistics.load(one / "saliency.safetensors").values, two[1]["statistics"]
    assert alone.keys() == shared.keys() == set(STATISTICS)
    for statistic, values in alone.items():
        total = sum(float(value.abs().sum()) for value in values.values())
        missed = sum(float((values[name] - shared[statistic][name]).abs().sum()) for name in values)
        assert missed < 1e-5 * total, statistic
    for rule in ("forget", "benefit"):
        masks = [scores(Statistics(each, {}), rule).cut(0.5) for each in (alone, shared)]
        differing = sum(int((masks[0][name] != masks[1][name]).sum()) for name in masks[0].bits)
        assert differing < 1e-4 * masks[0].size


def weights_of(folder: Path, run: str) -> dict[str, torch.Tensor]:
    model = ErasedDelta.load(folder / run / "delta.safetensors").apply(
        load_model(str(folder / "base"))
    )
    return {name: param.detach() for name, param in model.parameters().items()}


def norm(weights: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return sum(float((weights[name] - other[name]).square().sum()) for name in weights) ** 0.5


def test_training_gives_the_change_of_one_process_to_rounding(one, two):
    base = {
        name: param.detach() for name, param in load_model(str(one / "base")).parameters().items()
    }
    alone, shared = weights_of(one, "sgd"), weights_of(two[0], "sgd")
    assert norm(alone, shared) < 1e-5 * norm(alone, base)


def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(two):
    folder, facts, _ = two
    whole, stopped = (weights_of(folder, run) for run in ("whole", "stopped"))
    assert facts["stopped"] is True
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_a_run_that_two_processes_began_is_finished_by_one(two, monkeypatch):
    """To rounding; the last two of six steps."""
    folder, _, _ = two
    monkeypatch.chdir(folder)
    assert Path("handed-over/training.pt").exists()
    delta = erase("handed-over", OFTEN)
    base = {name: param.detach() for name, param in load_model("base").parameters().items()}
    whole, handed = weights_of(folder, "whole"), weights_of(folder, "handed-over")
    assert delta.count and norm(whole, handed) < 1e-3 * norm(whole, base)


def test_evaluation_gives_the_report_of_one_process(one, two, monkeypatch):
    """To the byte, by every evaluator, with images of the weights that two processes trained."""
    folder, facts, _ = two
    assert facts["evaluated"] == 0
    monkeypatch.chdir(folder)
    report = (folder / "report" / "report.json").read_bytes()
    (folder / "report").rename(folder / "report-of-two")
    assert run(run_evaluate.main, EVALUATE) == 0
    assert (folder / "report" / "report.json").read_bytes() == report
    images = [
        sorted(path.read_bytes() for path in (folder / name).rglob("*.png"))
        for name in ("report", "report-of-two")
    ]
    assert images[0] == images[1]


def test_work_for_one_process_is_refused_in_two(two):
    folder, facts, stderr = two
    assert (
        facts["refused"] == [2, 2]
        and not (folder / "model").exists()
        and not (folder / "demo").exists()
    )
    for command in ("erase-export", "erase-demo"):
        assert (
            f"error: {command} is work for one process, not 2; run it without accelerate launch or "
            "torchrun" in stderr
        )


def test_bars_are_the_main_process_s_and_say_what_is_shared(two):
    stderr = two[2]
    started = re.findall(r"^(.*?): +0%", stderr.replace("\r", "\n"), re.MULTILINE)
    assert {
        "forget latents of process 1 of 2",
        "saliency of process 1 of 2",
        "erasing on 2 processes",
    } <= set(started)
    assert started.count("NudeNet of process 1 of 2") == 2  # base and erased


@pytest.mark.parametrize("variable", WRAPPERS)
def test_a_launch_that_takes_the_model_apart_is_refused_in_a_sentence(
    variable, monkeypatch, capsys, tmp_path
):
    monkeypatch.setenv(variable, "true")
    for main in (run_erase.main, run_evaluate.main):
        assert run(main, ["--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert (
            f"this launch asks for {WRAPPERS[variable]}" in error
            and "several-gpus.yaml" in error
            and "Traceback" not in error
        )
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
