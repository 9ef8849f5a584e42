"""The target of erased Stable Diffusion: away from the concept, as negative guidance of the base
would lead (Gandikota et al., ICCV 2023, https://arxiv.org/abs/2303.07345, eq. 5)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from erase.latents.batches import Rows
from erase.losses import denoising
from erase.task import Task
from erase.training.batches import PromptedRows
from erase.training.loop import LossFn
from erase.training.trainable import Base

Ask = Callable[[Rows, list[str]], Tensor]
"""(rows, prompts) -> the model's prediction"""


def away(null: Tensor, concept: Tensor, eta: float) -> Tensor:
    """`eps_0(x_t) - eta (eps_0(x_t, c) - eps_0(x_t))`, of the predictions under the empty prompt
    and under the concept's."""
    return null - eta * (concept - null)


def target(
    task: Task,
    rows: Rows,
    prompts: list[str],
    base: Base,
    eta: float,
    ask: Ask | None = None,
) -> Tensor:
    """The same of these rows and prompts, by the base; `ask` in the place of `task.predict`."""
    with base():
        if ask:
            null, concept = task.predict(rows, [""] * len(rows)), ask(rows, prompts)
        else:
            both = task.predict(rows.cat(rows), [""] * len(rows) + prompts)
            null, concept = both.chunk(2)
    return away(null, concept, eta)


def away_loss(task: Task, eta: float, ask: Ask | None = None) -> LossFn:
    """The loss of going there, as the loop takes it: `|eps(x_t, c) - target|^2`."""

    def loss(batch: PromptedRows, base: Base) -> dict[str, Tensor]:
        rows, prompts = batch
        wanted = target(task, rows, prompts, base, eta, ask)
        return {"forget": denoising((ask or task.predict)(rows, prompts), wanted)}

    return loss
