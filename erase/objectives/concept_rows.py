"""Batches of the concept's own latents under its own prompts: for methods that need no anchor."""

from __future__ import annotations

from erase.latents.batches import Rows, draw_rows
from erase.latents.latent_set import epoch_rows
from erase.task import Task
from erase.training.loop import Batches

ConceptBatch = tuple[Rows, list[str]]
"""rows and the prompt of each"""


def concept_batches(task: Task, size: int) -> Batches:
    """Step -> `size` rows of the forget latents, each once per epoch, and their prompts."""
    forget = task.forget()

    def batches(step: int) -> ConceptBatch:
        rows = epoch_rows(len(forget), step * size, size, task.seed)
        drawn = draw_rows(task.model, forget, rows, task.generator(step))
        return drawn, [forget.prompts[row] for row in rows.tolist()]

    return batches
