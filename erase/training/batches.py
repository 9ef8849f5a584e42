"""Batches of latent sets under their own prompts, for losses that look at each row by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from erase.latents.batches import Rows, draw_rows, noised
from erase.latents.latent_set import LatentSet, epoch_rows, texts_of
from erase.losses import denoising
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.prompts.names import Names
from erase.task import Task
from erase.training.trainable import Base

PromptedRows = tuple[Rows, list[str]]
"""rows and the prompt of each"""


def row_batches(
    task: Task, latents: LatentSet, size: int, seed: int | None = None
) -> Callable[[int], PromptedRows]:
    """Step -> `size` rows of the set, each once per epoch, and their prompts.

    Args:
        task: gives the random stream of each step.
        latents: whose rows they are.
        size: rows per batch.
        seed: of the order of the rows; None: the task's.
    """
    order = task.seed if seed is None else seed

    def batches(step: int) -> PromptedRows:
        rows = epoch_rows(len(latents), step * size, size, order)
        drawn = draw_rows(task.model, latents, rows, task.generator(step))
        return drawn, texts_of(latents.prompts, rows)

    return batches


def forget_and_retain(
    task: Task, size: int, forget_set: LatentSet | None = None
) -> Callable[[int], tuple[PromptedRows, PromptedRows]]:
    """Step -> `size` forget rows (by default of the task's own set) and as many retain rows, with
    their prompts."""
    forget = row_batches(task, task.forget() if forget_set is None else forget_set, size)
    retain = row_batches(task, task.retain(), size, task.seed + 1)
    return lambda step: (forget(step), retain(step))


def weighed_batches(
    task: Task, size: int, alpha: float, forget_set: LatentSet | None = None
) -> Callable[[int], tuple[PromptedRows, ...]]:
    """Step -> the rows of `forget_and_retain`; the forget rows alone, and no retain latents made,
    where the weight `alpha` of the retain term is 0."""
    if alpha:
        return forget_and_retain(task, size, forget_set)
    forget = row_batches(task, task.forget() if forget_set is None else forget_set, size)
    return lambda step: (forget(step),)


def retain_terms(task: Task, alpha: float, retained: Sequence[PromptedRows]) -> dict[str, Tensor]:
    """The term alpha |eps(x_t, c_r) - noise|^2 of the retain rows of `weighed_batches`; none where
    there are none."""
    terms = {}
    for rows, prompts in retained:
        terms["retain"] = alpha * denoising(task.predict(rows, prompts), rows.target)
    return terms


def rows_naming(latents: LatentSet, concept: ConceptSpec, rows: Tensor) -> Tensor:
    """Those of these rows whose prompts name the concept, in order.

    Raises:
        ErasureError: none does.
    """
    names = Names(concept.names)
    named = [bool(names.found(text)) for text in texts_of(latents.prompts, rows)]
    if not any(named):
        raise ErasureError(
            f"no forget prompt names {concept.target!r}; add what its captions call it to the "
            "synonyms"
        )
    return rows[torch.tensor(named)]


def batches_of(
    task: Task, concept: ConceptSpec, size: int, weights: Tensor
) -> Callable[[int], PromptedRows]:
    """Step -> `size` forget rows whose prompts name one of the task's concepts.

    Args:
        task: gives the latents, and the random stream of each step.
        concept: whose rows they are.
        size: rows per batch.
        weights: how often each timestep is drawn, shape (timesteps,); a set that fixes its
            timesteps keeps them.

    Raises:
        ErasureError: no forget prompt names it.
    """
    forget, model = task.forget(), task.model
    own = rows_naming(forget, concept, torch.arange(len(forget)))

    def batches(step: int) -> PromptedRows:
        generator = task.generator(step)
        rows = own[epoch_rows(len(own), step * size, size, task.seed)]
        clean = forget.draw(rows, generator)
        t, noise = forget.draw_noise(rows, model.timesteps, generator)
        if forget.t is None:
            t = torch.multinomial(weights, size, replacement=True, generator=generator)
        return noised(model, clean, noise, t), texts_of(forget.prompts, rows)

    return batches


def denoising_loss(task: Task) -> Callable[[PromptedRows, Base], dict[str, Tensor]]:
    """The loss of plain fine-tuning, as the loop takes it: each row's own denoising error."""

    def loss(batch: PromptedRows, base: Base) -> dict[str, Tensor]:
        rows, prompts = batch
        return {"forget": denoising(task.predict(rows, prompts), rows.target)}

    return loss
