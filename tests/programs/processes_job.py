"""Two processes share an erasure and its evaluation; facts.pt of their folder tells the tests."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from erase.delta import ErasedDelta
from erase.latents.config import LatentConfig
from erase.latents.prepare import prepare_latents
from erase.methods.salun import SalUnConfig
from erase.models import load_model
from erase.objectives.remap import Remap
from erase.parallel.processes import exists_on_all, in_shares, processes, reduce_all
from erase.prompts.canvas import canvas_concept
from erase.prompts.errors import ErasureError
from erase.run import EraseConfig, erase_concept
from erase.scripts import demo, run_evaluate, run_export
from erase.scripts.cli import run
from erase.task import Task
from erase.training.config import MaskConfig, TrainConfig
from erase.training.saliency import Objective, compute_statistics
from erase.training.statistics import Statistics

CONCEPT = [canvas_concept("heart")]
DATA = LatentConfig(n_forget=10, n_retain=7, steps=2, batch_size=3)
"""batches of 3, 3, 3, 1 and 3, 3, 1: uneven shares"""
SGD = TrainConfig(
    steps=6,
    batch_size=4,
    lr=0.1,
    optimizer="SGD",
    optimizer_args={"momentum": 0.9, "weight_decay": 0.1},
)
ADAM = replace(
    SGD,
    optimizer="AdamW",
    lr=1e-3,
    optimizer_args={"weight_decay": 0.1},
    ema=0.9,
    max_grad_norm=1.0,
    schedule="linear",
)
OFTEN = replace(ADAM, checkpoint_every=2)
METHOD = SalUnConfig(mask=MaskConfig(batch_size=2), train=SGD)
"""5 forget latents show the concept: 3 batches, 2 in one process"""
EVALUATE = ["--delta", "sgd/delta.safetensors", "--prompts", "prompts.csv", "--out", "report"]
EVALUATE += ["--evaluators", "[clip, nudenet, classifier]"]
EVALUATE += ["--generate.steps", "2", "--generate.batch_size", "4"]


def erase(out: str, train: TrainConfig = SGD, mask: MaskConfig | None = None) -> ErasedDelta:
    """An erasure of the working folder's base, with its mask where no other is asked for."""
    config = EraseConfig(model="base", latents=DATA)
    method = replace(METHOD, mask=mask or MaskConfig(file="mask.safetensors"), train=train)
    return erase_concept(CONCEPT, config, method, out=out)


STATISTICS = ("forget.sum", "objective.sum", "objective.square", "retain.square")


def statistics_of_base() -> Statistics:
    """All statistics of the base, by as many processes as there are: five batches, three in one
    process."""
    task = Task(load_model("base"), CONCEPT, DATA)
    config = replace(METHOD, mask=MaskConfig(batch_size=2, batches=5))
    remap = Remap(task, config)
    return compute_statistics(task, config, STATISTICS, Objective(remap.loss, remap.batches))


def plain(statistics: Statistics) -> dict[str, dict[str, torch.Tensor]]:
    """As a file of facts holds them."""
    return {name: dict(values) for name, values in statistics.values.items()}


def stopped_in_step(
    step: int,
    out: str,
    train: TrainConfig,
    mask: MaskConfig | None = None,
) -> bool:
    """Whether an erasure that ends in this step leaves a training state."""
    drawn = Remap.batches

    def stop(remap: Remap, now: int) -> Any:
        if now == step:
            raise KeyboardInterrupt
        return drawn(remap, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Remap, "batches", stop)
        with pytest.raises(KeyboardInterrupt):
            erase(out, train, mask)
    return (Path(out) / "training.pt").exists()


def exchanged(me: int) -> dict[str, Any]:
    """What the exchanges between processes give."""
    rows = in_shares(7, 2, lambda rows: (me, list(rows)), "rows", "row")
    sums = [
        torch.tensor([1.0, -2.0]) * (-1) ** me,
        torch.full((3, 2), me + 1.0),
        torch.arange(4.0).view(2, 2).t() * me,
    ]
    means = [torch.full((2,), me + 1.0)]

    reduce_all(sums, "sum")
    reduce_all(means, "mean")
    return {"shares": rows, "sums": sums, "means": means}


def seen(leads: bool) -> dict[str, Any]:
    """Which files all processes see, and what is said of one that is seen by some."""
    Path("everywhere").touch()
    found = exists_on_all(Path("everywhere")), exists_on_all(Path("nowhere"))
    with pytest.raises(ErasureError) as error:
        exists_on_all(Path("everywhere" if leads else "only-here"))
    return {"found": found, "apart": str(error.value)}


def main() -> None:
    leads = processes().is_main_process
    facts = {**exchanged(processes().process_index), **seen(leads)}

    forget, retain = prepare_latents(load_model("base"), CONCEPT, DATA, 0, Path("cache"))
    again, _ = prepare_latents(load_model("base"), CONCEPT, DATA, 0, Path("cache"))
    facts["latents"] = forget.latents, retain.latents, again.latents
    facts["statistics"] = plain(statistics_of_base())

    erase("sgd")
    erase("whole", ADAM)
    facts["stopped"] = stopped_in_step(4, "stopped", OFTEN)
    if leads:
        shutil.copytree("stopped", "handed-over")
    erase("stopped", OFTEN)

    export = ["--delta", "sgd/delta.safetensors", "--out", "model"]
    facts["refused"] = [run(run_export.main, export), run(demo.main, ["--out", "demo"])]
    facts["evaluated"] = run(run_evaluate.main, EVALUATE)
    if leads:
        torch.save(facts, "facts.pt")


if __name__ == "__main__":
    main()
