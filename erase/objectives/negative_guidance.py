"""The target of erased Stable Diffusion: away from the concept, as negative guidance of the base
would lead (Gandikota et al., ICCV 2023, https://arxiv.org/abs/2303.07345, eq. 5)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from erase.latents.batches import Rows
from erase.task import Task
from erase.training.trainable import Base


def away(null: Tensor, concept: Tensor, eta: float) -> Tensor:
    """`eps_0(x_t) - eta (eps_0(x_t, c) - eps_0(x_t))`, of the predictions under the empty prompt
    and under the concept's."""
    return null - eta * (concept - null)


def target(task: Task, rows: Rows, prompts: Sequence[str], base: Base, eta: float) -> Tensor:
    """The same of these rows and prompts, by the base."""
    with base():
        asked = [""] * len(rows) + list(prompts)
        null, concept = task.predict(rows.cat(rows), asked).chunk(2)
    return away(null, concept, eta)
