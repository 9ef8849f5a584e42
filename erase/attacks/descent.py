"""Gradient descent on what stands before the prompts: the loop of every white-box attack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from erase.losses import denoising
from erase.parallel.processes import progress
from erase.task import Task
from erase.training.batches import PromptedRows


def descend(
    task: Task,
    batches: Callable[[int], PromptedRows],
    prefix: Callable[[int], Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    steps: int,
    what: str,
    after: Callable[[Tensor], None] = lambda loss: None,
    error: Callable[[Tensor, Tensor], Tensor] = denoising,
) -> None:
    """Lower the error of the model's predictions by what stands before the prompts.

    Args:
        task: the attacked model, whose weights take no gradient.
        batches: step -> rows, whose target is what the attacker wants to see predicted, and the
            prompts that stand behind the prefix.
        prefix: number of rows -> embeddings by text encoder, shape (k, dim), or (rows, k, dim)
            for one each; made anew at each step, with gradient to what the optimizer holds.
        optimizer: over leaves.
        steps: of it.
        what: names the progress bar.
        after: what follows each step, given its loss, such as a projection.
        error: of a prediction and its target.
    """
    with progress(what, "step", steps) as bar:
        for step in range(steps):
            after(step_down(task, batches(step), prefix, optimizer, error))
            bar.update()


def step_down(
    task: Task,
    batch: PromptedRows,
    prefix: Callable[[int], Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    error: Callable[[Tensor, Tensor], Tensor] = denoising,
) -> Tensor:
    """One step of `descend`, on this batch; returns the error before it. Weights that are being
    trained get no gradient of it."""
    leaves = [leaf for group in optimizer.param_groups for leaf in group["params"]]
    rows, prompts = batch
    with torch.enable_grad():
        cond = task.cond(prompts, prefix(len(prompts)))
        loss = error(task.model.predict(rows.noisy, rows.t, cond), rows.target)
        optimizer.zero_grad()
        loss.backward(inputs=leaves)
    optimizer.step()
    return loss.detach()


def renamed(
    batches: Callable[[int], PromptedRows], change: Callable[[str], str]
) -> Callable[[int], PromptedRows]:
    """The same rows under changed prompts."""

    def batch(step: int) -> PromptedRows:
        rows, prompts = batches(step)
        return rows, _all(change, prompts)

    return batch


def _all(change: Callable[[str], str], prompts: Sequence[str]) -> list[str]:
    return [change(prompt) for prompt in prompts]
