"""The baselines of UnlearnDiffAtk (https://arxiv.org/abs/2310.11868, table 2): words at random, and
other seeds. They tell how much of an attack's success is its trying again and again."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from erase.attacks import RESTART, Asked, Attack, Found, Known, seed_of
from erase.attacks.words import words_of
from erase.latents.latent_set import LatentSet
from erase.prompts.errors import COUNT, check_ranges
from erase.task import Task


@dataclass(frozen=True)
class RandomTokensConfig:
    """random_tokens: words drawn at random before the concept's prompts."""

    words: int = 5
    """before each prompt"""
    tries: int = 2
    """images of each prompt, each behind other words"""

    def __post_init__(self) -> None:
        check_ranges(self, dict.fromkeys(("words", "tries"), COUNT), "attack.random_tokens")


@dataclass(frozen=True)
class SeedSearchConfig:
    """seed_search: the concept's prompts as they are, drawn from other seeds."""

    tries: int = 2
    """images of each prompt, each from another seed"""

    def __post_init__(self) -> None:
        check_ranges(self, {"tries": COUNT}, "attack.seed_search")


def random_words(
    task: Task, latents: LatentSet, config: RandomTokensConfig, restart: int, known: Known
) -> Found:
    """Words drawn at random, the same before all prompts."""
    words = words_of(task.model)
    generator = torch.Generator().manual_seed(seed_of(task, restart))
    chosen = torch.randint(len(words), (config.words,), generator=generator)
    return Found(words.embedded(chosen), texts=(words.text(chosen),))


def other_seed(
    task: Task, latents: LatentSet, config: SeedSearchConfig, restart: int, known: Known
) -> Found:
    """The prompts as they are, drawn from other seeds."""
    return Found(seed_shift=RESTART * (1 + restart))


RANDOM_TOKENS = Attack(
    "random_tokens",
    "https://arxiv.org/abs/2310.11868",
    RandomTokensConfig(),
    "words before the prompt",
    random_words,
    asks=lambda config, prompts: (Asked(), Asked()),
    repeated=True,
)
SEED_SEARCH = Attack(
    "seed_search",
    "https://arxiv.org/abs/2310.11868",
    SeedSearchConfig(),
    "the choice of the seed",
    other_seed,
    asks=lambda config, prompts: (Asked(), Asked()),
    repeated=True,
)
