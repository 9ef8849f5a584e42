"""Trackers: what a training logs while it runs, and that it stays the same, to the bit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from erase.prompts.canvas import canvas_concept
from erase.prompts.errors import ErasureError
from erase.run import EraseConfig, erase_concept
from erase.scripts import run_erase
from erase.scripts.cli import run
from erase.training import trackers
from erase.training.checkpoint import Checkpoint
from erase.training.config import TrainConfig, TunedConfig
from erase.training.loop import fit
from tests.run_fixtures import DATA, METHOD
from tests.run_fixtures import base as base
from tests.run_fixtures import erased as erased

pytest.importorskip("tensorboard", reason="tensorboard is not installed")
TAGS = {"loss", "loss/forget", "loss/retain", "lr", "rows_per_second"}


def logged(folder, part="training"):
    """tag -> (step, value) of every event in the log of one of a run's trainings."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / trackers.FOLDER / part))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in tags}


def test_a_run_is_logged_and_stays_the_same_to_the_bit(base, erased, tmp_path):
    method = replace(METHOD, train=replace(METHOD.train, log_with="tensorboard"))
    config = EraseConfig(model=str(base), latents=DATA)
    delta = erase_concept(canvas_concept("heart"), config, method, out=tmp_path)
    alone = erase_concept(canvas_concept("heart"), config, METHOD, out=erased)
    assert delta.values.keys() == alone.values.keys()
    for name, value in delta.values.items():
        assert torch.equal(value, alone.values[name]), name
    losses, without = (
        json.loads((folder / "training.json").read_text())["losses"]
        for folder in (tmp_path, erased)
    )
    assert losses == without

    told = logged(tmp_path)
    assert told.keys() == TAGS
    assert [step for step, _ in told["loss"]] == [1, 2, 3]
    assert [value for _, value in told["loss"]] == pytest.approx(losses, rel=1e-6)
    terms = zip(told["loss/forget"], told["loss/retain"], strict=True)
    assert [one + other for (_, one), (_, other) in terms] == pytest.approx(losses, rel=1e-6)
    assert [value for _, value in told["lr"]] == pytest.approx([METHOD.train.lr] * 3)
    assert all(value > 0 for _, value in told["rows_per_second"])
    assert not (erased / trackers.FOLDER).exists()


def test_each_of_several_trainings_has_a_log_and_a_bar_of_its_own(base, tmp_path, capfd):
    method = replace(
        METHOD, scope="full", twofold=True, train=replace(METHOD.train, log_with="tensorboard")
    )
    config = EraseConfig(model=str(base), latents=DATA)
    erase_concept(canvas_concept("heart"), config, method, out=tmp_path)
    parts = [logged(tmp_path, f"training-{part}")["loss"] for part in ("text", "rest")]
    told = [value for events in parts for _, value in events]
    losses = json.loads((tmp_path / "training.json").read_text())["losses"]
    assert len(losses) == 6 and told == pytest.approx(losses, rel=1e-6)
    shown = capfd.readouterr().err
    assert "erasing (text)" in shown and "erasing (rest)" in shown


class Stopped(Exception):
    """As a machine that goes down."""


def train(folder, stop=None, log_with="tensorboard"):
    """Six steps of a line, of which the state of every second is kept."""
    torch.manual_seed(0)
    line = nn.Linear(3, 1)

    def batches(step):
        if step == stop:
            raise Stopped
        return torch.randn(4, 3, generator=torch.Generator().manual_seed(step))

    def loss(rows, _):
        return {"forget": line(rows).square().mean()}

    folder.mkdir(exist_ok=True)
    train = TrainConfig(
        steps=6,
        lr=0.01,
        schedule="linear",
        batch_size=4,
        checkpoint_every=2,
        log_with=log_with,
    )
    checkpoint = Checkpoint(folder / "training.pt", {})
    params, config = dict(line.named_parameters()), TunedConfig(train=train)
    return fit(params, loss, batches, config, checkpoint=checkpoint)


def test_a_resumed_run_goes_on_in_its_log_and_no_step_stands_twice(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path / "stopped", stop=3)
    assert [step for step, _ in logged(tmp_path / "stopped")["loss"]] == [1, 2, 3]
    train(tmp_path / "stopped")
    train(tmp_path / "whole")
    stopped, whole = (logged(tmp_path / name) for name in ("stopped", "whole"))
    for tag in ("loss", "loss/forget", "lr"):
        assert stopped[tag] == whole[tag] and len(whole[tag]) == 6
    assert len({value for _, value in whole["lr"]}) == 6


@pytest.mark.parametrize(("service", "key"), [("wandb", "id"), ("trackio", "name")])
def test_a_service_is_told_the_same_run_when_it_goes_on(service, key, tmp_path, monkeypatch):
    if service not in trackers.LOGGER_TYPE_TO_CLASS:
        pytest.skip(f"this accelerate does not know {service}")
    told = []
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    monkeypatch.setattr(trackers, "LOGGER_TYPE_TO_CLASS", [service])
    monkeypatch.setattr(
        "accelerate.Accelerator.init_trackers", lambda self, *started: told.append(started)
    )
    with pytest.raises(Stopped):
        train(tmp_path / "run", 3, service)
    train(tmp_path / "run", log_with=service)
    train(tmp_path / "other", log_with=service)
    (project, settings, first), (_, _, again), (_, _, other) = told
    assert project == trackers.PROJECT and settings["lr"] == 0.01
    assert first[service]["resume"] == "allow" and first == again != other
    assert first[service][key] == (tmp_path / "run" / "logs" / "training.txt").read_text()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tensorbord", "did you mean 'tensorboard'?"),
        ("wandb", "train.log_with wandb needs wandb, which is not installed; pip install wandb"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_before_anything_is_made(
    name, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    out = tmp_path / "out"
    flags = ["--concept", "heart", "--train.log_with", name, "--out", str(out)]
    assert run(run_erase.main, flags) == 2
    assert words in capsys.readouterr().err and not out.exists()


def test_a_log_without_a_folder_is_refused(base):
    method = replace(METHOD, train=replace(METHOD.train, log_with="tensorboard"))
    with pytest.raises(ErasureError, match="keeps its log in the run's folder, and there is none"):
        erase_concept(canvas_concept("heart"), EraseConfig(model=str(base)), method)


def test_a_tracker_that_does_not_start_is_named(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", broken)
    with pytest.raises(
        ErasureError, match=r"train\.log_with tensorboard cannot start \(.*no route"
    ):
        train(tmp_path / "run")
