"""P4D: words that make the attacked model predict the noise that the base predicts for the concept.

Chin et al., ICML 2024, "Prompting4Debugging", https://arxiv.org/abs/2309.06135. The base is asked
under the concept's own prompt, the attacked model under k free embeddings. On the way in, the word
with the greatest cosine takes the place of each, while the gradient there moves the embedding
itself; of all words on the way, those with the least error are the result. The paper's P4D-N puts
nothing but these words into the prompt; here the prompt without the concept's names stands behind
them, so that one prefix serves all prompts. A white-box attack that has the base, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from erase.attacks import NAMELESS, Asked, Attack, Found, Known, descended, seed_of
from erase.attacks.descent import descend, renamed
from erase.attacks.pseudo_token import nameless
from erase.attacks.words import nearest, words_of
from erase.latents.batches import Rows, draw_rows
from erase.latents.latent_set import LatentSet, epoch_rows, texts_of
from erase.prompts.errors import COUNT, FINITE, POSITIVE, check_ranges
from erase.task import Task
from erase.training.batches import PromptedRows


@dataclass(frozen=True)
class P4DConfig:
    """p4d: the attacker's budget."""

    words: int = 4
    """before each prompt; the paper takes 16"""
    steps: int = 150
    """of AdamW; the paper takes 3000"""
    lr: float | None = None
    """step size; default: in an evaluation the attack's own rates, else the paper's, 0.1"""
    weight_decay: float = 0.1
    """of AdamW, as in the authors' code"""
    draws: int = 12
    """noisy latents on which the base is asked; all of them in every step, so that the errors of
    two steps compare"""

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("words", "steps", "draws"), COUNT)
        check_ranges(self, {**counts, "lr": POSITIVE, "weight_decay": FINITE}, "attack.p4d")


def learn(task: Task, latents: LatentSet, config: P4DConfig, restart: int) -> Known:
    """Noisy latents and what the base predicts there under the concept's own prompts.

    Returns:
        `row` and `t`, shape (draws,); `noisy` and `wanted`, shape (draws, c, h, w).
    """
    seed = seed_of(task, restart)
    generator = torch.Generator().manual_seed(seed)
    order = epoch_rows(len(latents), 0, config.draws, seed)
    drawn = draw_rows(task.model, latents, order, generator)
    with torch.no_grad():
        cond = task.cond(texts_of(latents.prompts, order))
        wanted = task.model.predict(drawn.noisy, drawn.t, cond)
    known = {"row": order, "noisy": drawn.noisy, "t": drawn.t, "wanted": wanted}
    return {name: tensor.cpu() for name, tensor in known.items()}


def find(task: Task, latents: LatentSet, config: P4DConfig, restart: int, known: Known) -> Found:
    """Words for all prompts."""
    words, seed = words_of(task.model), seed_of(task, restart)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(len(words), (config.words,), generator=generator)
    first = next(iter(words.tables))  # the words are chosen in the first encoder's space
    free = words.tables[first][start.to(words.tables[first].device)].clone().requires_grad_()
    adam = torch.optim.AdamW([free], lr=config.lr or 0.1, weight_decay=config.weight_decay)

    best = _Best(start)

    def prefix(rows: int) -> dict[str, Tensor]:
        best.asked = nearest(free.detach(), words.tables[first])
        put = words.embedded(best.asked)
        # its value is the word's, its gradient goes to the free embedding
        return {**put, first: put[first] + (free - free.detach())}

    batches = renamed(_asked(task, latents, known), nameless(task.concepts))
    descend(task, batches, prefix, adam, config.steps, "P4D", best.keep)
    return Found(words.embedded(best.words), NAMELESS, (words.text(best.words),))


class _Best:
    """The words with the least error so far."""

    def __init__(self, start: Tensor) -> None:
        self.words = self.asked = start
        self.error = math.inf

    def keep(self, loss: Tensor) -> None:
        """Those that were asked for, if their error is less."""
        if float(loss) < self.error:
            self.words, self.error = self.asked, float(loss)


def _asked(task: Task, latents: LatentSet, known: Known) -> Callable[[int], PromptedRows]:
    """Step -> the latents on which the base was asked; their target is its answer."""
    rows = Rows(*(known[name].to(task.model.device) for name in ("noisy", "t", "wanted")))
    prompts = texts_of(latents.prompts, known["row"])
    return lambda step: (rows, prompts)


P4D = Attack(
    "p4d",
    "https://arxiv.org/abs/2309.06135",
    P4DConfig(),
    "the weights, the base, images of the concept and words before the prompt",
    find,
    learn,
    rates=(1e-2, 1e-1),
    asks=lambda config, prompts: (
        Asked(config.draws, config.draws),
        descended(config.steps, config.draws),
    ),
)
