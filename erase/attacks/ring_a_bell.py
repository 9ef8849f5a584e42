"""Ring-A-Bell: a prompt whose text states lie where a concept vector says that the concept is.

Tsai et al., ICLR 2024, https://arxiv.org/abs/2310.10012. The concept vector is the mean difference
of the text states of prompts with and without the concept; a genetic search over K words minimises
the distance to the states of a harmless prompt plus eta times that vector (eq. 3). A black-box
attack: it has a text encoder, the base's, and never asks the erased model.

The paper searches for each prompt by itself, over 3000 generations of 200. Here the prompt pairs
are the concept's templates with its name and with its anchor's, and one prompt is sought for all
seeds. Each of several concepts has a vector of its own, and the prompt counts by the nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from erase.attacks import ALONE, Asked, Attack, Found, Known, seed_of
from erase.attacks.words import Words, words_of
from erase.latents.latent_set import LatentSet
from erase.parallel.processes import progress
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import COUNT, FINITE, FRACTION, check_ranges
from erase.task import Task


@dataclass(frozen=True)
class RingABellConfig:
    """ring_a_bell: the attacker's budget."""

    words: int = 16
    """of the whole prompt"""
    population: int = 100
    """prompts of a generation; the paper takes 200"""
    generations: int = 150
    """the paper takes 3000"""
    mutation: float = 0.25
    """share of children of which a word changes"""
    crossover: float = 0.5
    """share of children with two parents"""
    strength: float = 3.0
    """eta, of the concept vector"""
    pairs: int = 32
    """prompt pairs of the concept vector, at most"""

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("words", "population", "generations", "pairs"), COUNT)
        shares = dict.fromkeys(("mutation", "crossover"), FRACTION)
        check_ranges(self, {**counts, **shares, "strength": FINITE}, "attack.ring_a_bell")


def learn(task: Task, latents: LatentSet, config: RingABellConfig, restart: int) -> Known:
    """The places of the words that were found, `words`, shape (K,)."""
    words = words_of(task.model)
    wanted = wanted_states(task, config, restart)
    generator = torch.Generator().manual_seed(seed_of(task, restart))
    shape = (config.population, config.words)
    people = torch.randint(len(words), shape, generator=generator)
    with torch.no_grad(), progress("Ring-A-Bell", "generation", config.generations) as bar:
        for _ in range(config.generations):
            order = _distance(task, words, people, wanted).argsort(stable=True)
            parents = people[order[: max(config.population // 2, 1)]]
            people = torch.cat([parents, _children(parents, len(words), config, generator)])
            bar.update()
        best = _distance(task, words, people, wanted).argmin()
    return {"words": people[best]}


def find(
    task: Task, latents: LatentSet, config: RingABellConfig, restart: int, known: Known
) -> Found:
    """The words, in the attacked model's own embeddings, in the place of every prompt."""
    words = words_of(task.model)
    return Found(words.embedded(known["words"]), ALONE, (words.text(known["words"]),))


def wanted_states(task: Task, config: RingABellConfig, restart: int = 0) -> Tensor:
    """Of each concept, the states of a prompt of the anchor, plus the strength times the concept
    vector, shape (concepts, tokens, dim)."""
    return torch.stack([_wanted(task, concept, config, restart) for concept in task.concepts])


def _wanted(task: Task, concept: ConceptSpec, config: RingABellConfig, restart: int) -> Tensor:
    listed = concept.pairs()
    count = min(config.pairs, len(listed))
    pairs = [listed[place * len(listed) // count] for place in range(count)]
    shown, safe = (task.cond(list(side)).embeddings for side in zip(*pairs, strict=True))
    vector = (shown - safe).mean(0)
    return safe[restart % count] + config.strength * vector


def _distance(task: Task, words: Words, people: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared distance of the states of each prompt to the nearest that are wanted, shape
    (population,)."""
    states = task.cond([""] * len(people), words.embedded(people)).embeddings
    return torch.stack([(states - one).square().mean((1, 2)) for one in wanted]).amin(0).cpu()


def _children(
    parents: Tensor, vocabulary: int, config: RingABellConfig, generator: torch.Generator
) -> Tensor:
    """As many as complete the population: a parent each, or the head of one and the tail of
    another; and a new word in some."""
    count, length = config.population - len(parents), parents.shape[1]

    def draw(high: int) -> Tensor:
        return torch.randint(high, (count, 1), generator=generator)

    first, second = (parents[draw(len(parents))[:, 0]] for _ in range(2))
    crossed = torch.rand(count, 1, generator=generator) < config.crossover
    children = torch.where(crossed & (torch.arange(length) >= draw(length)), second, first)
    mutated = torch.rand(count, 1, generator=generator) < config.mutation
    place = torch.arange(length) == draw(length)
    return torch.where(mutated & place, draw(vocabulary).expand(-1, length), children)


RING_A_BELL = Attack(
    "ring_a_bell",
    "https://arxiv.org/abs/2310.10012",
    RingABellConfig(),
    "a text encoder and words in the place of the prompt",
    find,
    learn,
    asks=lambda config, prompts: (
        Asked(texts=(config.generations + 1) * config.population + 2 * config.pairs),
        Asked(),
    ),
)
