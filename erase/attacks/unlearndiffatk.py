"""UnlearnDiffAtk: words before the prompt that make the model denoise an image of the concept.

Zhang et al., ECCV 2024, https://arxiv.org/abs/2310.11868. The denoising error of the attacked model
on images of the concept is minimised over k words (eq. 6). A word is a point w of the simplex over
the vocabulary: the words of a row are drawn from w, the gradient passes straight through to w, a
step of Adam follows, and w is projected onto the simplex again. A white-box attack.

The paper searches for each prompt by itself, 40 iterations at each of 50 timesteps in turn. Here
the timesteps are drawn at random, and by default one prefix is sought for all prompts, which costs
as much as a single prompt; `per_prompt` is the paper's way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from erase.attacks import NAMED, NAMELESS, Asked, Attack, Found, Known, descended, seed_of
from erase.attacks.descent import descend, renamed
from erase.attacks.pseudo_token import nameless
from erase.attacks.words import Words, onto_simplex, words_of
from erase.latents.batches import draw_rows
from erase.latents.latent_set import LatentSet, texts_of
from erase.prompts.errors import COUNT, FINITE, POSITIVE, check_names, check_ranges
from erase.task import Task
from erase.training.batches import PromptedRows, row_batches


@dataclass(frozen=True)
class UnlearnDiffAtkConfig:
    """unlearndiffatk: the attacker's budget."""

    words: int = 5
    """before each prompt; the paper takes 5 for nudity and 3 for styles and objects"""
    steps: int = 150
    """of Adam; the paper allows 2000 for each prompt"""
    lr: float | None = None
    """step size; default: in an evaluation the attack's own rates, else the paper's, 1e-2"""
    weight_decay: float = 0.1
    """of Adam, the paper's"""
    batch_size: int = 8
    """latents per step; with per_prompt, prompts at a time"""
    prompt: str = NAMED
    """what stands behind the words: named (the prompt itself, as in the paper), nameless (the
    prompt without the concept's names)"""
    per_prompt: bool = False
    """seek words for each prompt by itself"""

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("words", "steps", "batch_size"), COUNT)
        check_ranges(
            self, {**counts, "lr": POSITIVE, "weight_decay": FINITE}, "attack.unlearndiffatk"
        )
        check_names(self, {"prompt": (NAMED, NAMELESS)})


def squared_norm(prediction: Tensor, target: Tensor) -> Tensor:
    """The squared norm of each row's error, averaged over the rows. Adam takes the mean over values
    alike, but its weight decay does not: beside that gradient it would be all that moves w."""
    return (prediction - target).float().square().flatten(1).sum(1).mean()


def find(
    task: Task, latents: LatentSet, config: UnlearnDiffAtkConfig, restart: int, known: Known
) -> Found:
    """Words for all prompts, or for the prompt of each latent by itself.

    Args:
        task: the attacked model, and the concepts.
        latents: images of the concept with prompts; with `per_prompt`, one image for each prompt
            that is attacked.
        config: the budget.
        restart: another start, other draws.
        known: not needed.
    """
    words, seed = words_of(task.model), seed_of(task, restart)
    change = nameless(task.concepts) if config.prompt == NAMELESS else str
    if not config.per_prompt:
        batches = row_batches(task, latents, config.batch_size, seed)
        weights = search(task, words, renamed(batches, change), config, seed)
        chosen = weights.argmax(-1)
        return Found(words.embedded(chosen), config.prompt, (words.text(chosen),))

    parts = []
    for start in range(0, len(latents), config.batch_size):
        rows = torch.arange(start, min(start + config.batch_size, len(latents)))
        batches = renamed(_same_rows(task, latents, rows, seed), change)
        parts.append(search(task, words, batches, config, seed + start, len(rows)))
    chosen = torch.cat(parts).argmax(-1)
    return Found(words.embedded(chosen), config.prompt, tuple(map(words.text, chosen)))


def _same_rows(
    task: Task, latents: LatentSet, rows: Tensor, seed: int
) -> Callable[[int], PromptedRows]:
    """Step -> the same rows, under other noise."""
    prompts = texts_of(latents.prompts, rows)

    def batch(step: int) -> PromptedRows:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + int(rows[0]) * 1009 + step)
        return draw_rows(task.model, latents, rows, generator), prompts

    return batch


def search(
    task: Task,
    words: Words,
    batches: Callable[[int], PromptedRows],
    config: UnlearnDiffAtkConfig,
    seed: int,
    prompts: int | None = None,
) -> Tensor:
    """Points of the simplex, shape (k, words), or (prompts, k, words)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (config.words, len(words)) if prompts is None else (prompts, config.words, len(words))
    device = task.model.device
    weights = onto_simplex(torch.rand(shape, generator=generator)).to(device).requires_grad_()
    adam = torch.optim.Adam([weights], lr=config.lr or 1e-2, weight_decay=config.weight_decay)

    def prefix(rows: int) -> dict[str, Tensor]:
        each = weights.expand(rows, *shape[-2:])  # one prefix for all: every row draws from it
        flat = each.detach().cpu().reshape(-1, len(words))
        drawn = torch.multinomial(flat, 1, generator=generator).view(each.shape[:-1])
        # one-hot rows, whose gradient passes to w as it is
        hot = F.one_hot(drawn.to(device), len(words)) + (each - each.detach())
        return {name: hot.to(table.dtype) @ table for name, table in words.tables.items()}

    @torch.no_grad()
    def project(loss: Tensor) -> None:
        weights.copy_(onto_simplex(weights))

    descend(task, batches, prefix, adam, config.steps, "UnlearnDiffAtk", project, squared_norm)
    return weights.detach().cpu()


UNLEARNDIFFATK = Attack(
    "unlearndiffatk",
    "https://arxiv.org/abs/2310.11868",
    UnlearnDiffAtkConfig(),
    "the weights, images of the concept and words before the prompt",
    find,
    rates=(3e-2, 1e-1),
    per_prompt=lambda config: config.per_prompt,
    asks=lambda config, prompts: (
        Asked(),
        descended(config.steps, prompts if config.per_prompt else config.batch_size),
    ),
)
