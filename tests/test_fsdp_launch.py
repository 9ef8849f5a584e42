"""Launches that ask for FSDP: what configs claim, what is refused, a whole erasure by one."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config import load_config_from_file

from erase.delta import ErasedDelta
from erase.models import load_model
from erase.parallel import fsdp
from erase.parallel.fsdp import ON_CPUS, check_sharded
from erase.parallel.launch import UNFIT, FullShard, full_shard
from erase.parallel.layout import ActiveWeights
from erase.parallel.processes import processes
from erase.prompts.errors import ErasureError
from erase.scripts import run_erase
from erase.scripts.cli import run
from erase.training.config import TunedConfig
from erase.training.loop import make_accelerator
from tests.launching import ROOT, environment
from tests.shards import (
    LAUNCH,
    LAUNCHES,
    NO_SHARDS,
    SGD,
    apart,
    environment_of,
    train,
    with_a_lone_weight,
)

CANVAS = ["--concept", "heart", "--latents.n_forget", "10", "--latents.n_retain", "7"]
CANVAS += ["--method", "salun-half"]
CANVAS += ["--latents.steps", "4", "--latents.batch_size", "4", "--latents.trajectory", "2"]
CANVAS += ["--mask.batch_size", "3", "--train.steps", "3", "--train.batch_size", "4"]
CANVAS += ["--train.optimizer", "SGD", "--train.lr", "0.01", "--train.schedule", "constant"]


OLDER = {"bf16": "take torch 2.15 or newer, mixed_precision no", "fp16": "use no, or"}
# precision -> the way out


@pytest.mark.parametrize("precision", OLDER)
def test_half_precision_in_shards_of_an_older_torch_is_refused(monkeypatch, precision):
    monkeypatch.setattr(fsdp, "sharding", lambda: FullShard(reshard_after_forward=True))
    monkeypatch.setattr(fsdp, "ON_CPUS", True)
    monkeypatch.setattr(fsdp, "BF16", False)
    with pytest.raises(ErasureError, match=OLDER[precision]) as error:
        check_sharded(replace(SGD, mixed_precision=precision))
    assert precision in str(error.value) and "several-gpus.yaml" in str(error.value)


def test_shards_on_a_cpu_under_an_older_torch_are_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(fsdp, "sharding", lambda: FullShard(reshard_after_forward=True))
    monkeypatch.setattr(fsdp, "processes", lambda: SimpleNamespace(device=torch.device("cpu")))
    monkeypatch.setattr(fsdp, "ON_CPUS", False)
    with pytest.raises(ErasureError, match=f"{re.escape(NO_SHARDS)}; take a newer torch"):
        check_sharded(SGD)


@pytest.mark.parametrize("kind", LAUNCHES)
def test_accelerate_makes_of_the_configs_what_they_claim(kind, monkeypatch):
    config = load_config_from_file(str(LAUNCH / f"{kind}.yaml"))
    assert config.distributed_type == "FSDP" and config.num_processes > 1
    assert config.mixed_precision == "no"
    for name, value in environment_of(kind).items():
        monkeypatch.setenv(name, value)
    assert full_shard() == FullShard(reshard_after_forward=kind == "fsdp")
    processes()


def test_one_process_has_nothing_to_shard(monkeypatch, make_pico_pipeline):
    for name, value in environment_of("fsdp").items():
        monkeypatch.setenv(name, value)
    make_accelerator(replace(SGD, optimizer="Adafactor", optimizer_args={}))
    model = with_a_lone_weight(make_pico_pipeline())
    assert train(model, TunedConfig(train=replace(SGD, steps=1))).losses
    assert isinstance(ActiveWeights({}).layout.rows(3), slice)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"FSDP_VERSION": "1"}, "asks for FSDP version 1"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, "under FSDP version 2, not FULL_SHARD"),
        *(({name: "true"}, f"sets {name.lower()}") for name in UNFIT),
    ],
    ids=str,
)
def test_other_fsdp_launches_are_refused_in_a_sentence(
    changes,
    words,
    monkeypatch,
    capsys,
    tmp_path,
):
    for name, value in (environment_of("fsdp") | changes).items():
        monkeypatch.setenv(name, value)
    assert run(run_erase.main, ["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert words in error and "scripts/launch/fsdp.yaml" in error and "Traceback" not in error


def test_a_whole_erasure_by_accelerate_launch(tmp_path):
    """On the embedded model, targets computed beforehand: the delta of one process, to rounding."""
    config = ["--config_file", str(LAUNCH / "fsdp.yaml"), "--num_processes", "2"]
    program = [str(ROOT / "scripts" / "run_erase.py"), *CANVAS, "--out", str(tmp_path / "two")]
    command = [sys.executable, "-m", "accelerate.commands.launch", *config, *program]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    if not ON_CPUS:
        assert done.returncode and f"error: {NO_SHARDS}; take a newer torch" in done.stderr
        pytest.skip(NO_SHARDS)
    assert done.returncode == 0 and "erasing in shards on 2 processes" in done.stderr, done.stderr
    assert run(run_erase.main, [*CANVAS, "--out", str(tmp_path / "one")]) == 0

    found = []
    for name in ("one", "two"):
        erased = ErasedDelta.load(tmp_path / name / "delta.safetensors").apply(load_model("canvas"))
        found.append({name: param.detach() for name, param in erased.parameters().items()})
    difference = apart(*found, load_model("canvas"))
    print(f"canvas: {difference:.1e}")
    assert difference < 1e-3
    one, two = ({path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
