"""Measure what further processes gain: the stages of an erasure on the embedded model, each timed
until all processes are done.

OMP_NUM_THREADS=1 torchrun --nproc_per_node 1 scripts/bench/processes.py
OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 scripts/bench/processes.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, reduce

from erase.eval.generate import GenerateConfig, generate
from erase.eval.run import score
from erase.latents.config import LatentConfig
from erase.methods.salun import SalUnHalfConfig
from erase.models import load_model
from erase.objectives.remap import Remap
from erase.parallel.processes import default_device, processes, reduce_all
from erase.prompts.canvas import canvas_concept
from erase.prompts.prompt_sets import PromptSet, canvas_grid
from erase.scripts.bench.measuring import wait
from erase.scripts.bench.plain import plain_parser
from erase.task import Task
from erase.training.loop import fit
from erase.training.running import running
from erase.training.saliency import compute_saliency


def seconds(work: Callable[[], object]) -> float:
    """From a common start to when the last process is done."""
    processes().wait_for_everyone()
    started = time.perf_counter()
    work()
    wait(default_device())
    processes().wait_for_everyone()
    return time.perf_counter() - started


def one_by_one(tensors: list[torch.Tensor]) -> None:
    """The exchange that `reduce_all` replaces."""
    for tensor in tensors:
        tensor.copy_(reduce(tensor, reduction="mean"))


def stages(images: int, steps: int, latents: int, folder: Path) -> dict[str, float]:
    """Stage -> seconds."""
    model, concepts = load_model("canvas", default_device()), [canvas_concept("heart")]
    settings = SalUnHalfConfig()
    settings = replace(settings, train=replace(settings.train, steps=steps))
    data = LatentConfig(n_forget=latents, n_retain=latents, batch_size=8)
    results: dict[str, Any] = {}
    task = Task(model, concepts, data)
    times = {"latents": seconds(lambda: results.update(latents=(task.forget(0.5), task.retain())))}
    times["saliency"] = seconds(
        lambda: results.update(mask=compute_saliency(task, settings).cut(0.5))
    )
    remap, params = Remap(task, settings), task.weights(settings.scope)

    def train() -> None:
        """The steps of `settings`, with the mask of the stage before."""
        with running(model, params, settings.train) as active:
            fit(params, remap.loss, remap.batches, settings, results["mask"], active=active)

    times["training"] = seconds(train)
    prompts = PromptSet("some", canvas_grid((0,)).rows[:images])
    config = GenerateConfig(steps=12, batch_size=16)
    times["generation"] = seconds(
        lambda: results.update(images=generate(model.pipeline(), prompts, folder, config, {}))
    )
    score(results["images"], [], ["classifier", "clip"])  # loads the judges
    times["evaluation"] = seconds(lambda: score(results["images"], [], ["classifier", "clip"]))
    gradients = [torch.randn(param.numel() // 2, device=param.device) for param in params.values()]
    for name, exchange in (
        ("one by one", one_by_one),
        ("in buckets", lambda tensors: reduce_all(tensors, "mean")),
    ):
        times[f"10 reductions, {name}"] = seconds(
            lambda exchange=exchange: [exchange(gradients) for _ in range(10)]
        )
    return times


def main() -> None:
    """Time every stage; the main process prints."""
    parser = plain_parser(__doc__)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--latents", type=int, default=32)
    args = parser.parse_args()
    state = processes()
    with TemporaryDirectory() as own:
        folder = [own]  # the main process's, for all
        broadcast_object_list(folder)
        times = stages(args.images, args.steps, args.latents, Path(folder[0]))
    if state.is_main_process:
        print(f"{state.num_processes} processes of {torch.get_num_threads()} threads")
        for stage, took in times.items():
            print(f"  {stage}: {took:.2f} s")


if __name__ == "__main__":
    main()
