"""The free pseudo-token: embeddings of no word that make the model draw a concept again.

Textual inversion (Gal et al., ICLR 2023, https://arxiv.org/abs/2208.01618) on the attacked model,
as Concept Inversion does with erased ones (Pham et al., ICLR 2024, "Circumventing Concept Erasure
Methods For Text-to-Image Generative Models"): the denoising error on images of the concept is
minimised over the embeddings alone. The concept's names are left out of the prompts, so that the
embeddings stand for it. A white-box attack: it has the weights and images of the concept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor

from erase.attacks import NAMELESS, Asked, Attack, Found, Known, descended, seed_of
from erase.attacks.descent import descend, renamed
from erase.latents.batches import Rows
from erase.latents.latent_set import LatentSet
from erase.models.pipelines import text_encoders
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import COUNT, POSITIVE, check_ranges
from erase.prompts.names import Names
from erase.task import Task
from erase.training.batches import row_batches, rows_naming


@dataclass(frozen=True)
class PseudoTokenConfig:
    """pseudo_token: the attacker's budget."""

    vectors: int = 4
    """embeddings in each text encoder"""
    steps: int = 300
    """of Adam"""
    lr: float | None = None
    """step size; default: in an evaluation the attack's own rates, else 5e-3"""
    batch_size: int = 8
    """latents per step"""

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("vectors", "steps", "batch_size"), COUNT)
        check_ranges(self, {**counts, "lr": POSITIVE}, "attack.pseudo_token")


def find_pseudo_token(
    task: Task, latents: LatentSet, config: PseudoTokenConfig, restart: int = 0
) -> dict[str, Tensor]:
    """Embeddings that stand before a nameless prompt and mean the concept to the task's model.

    Args:
        task: the attacked model, which is left as it was found, and the concepts.
        latents: images of the concept, with prompts.
        config: the budget.
        restart: another start and another order of the latents.

    Returns:
        Text encoder -> embeddings, shape (vectors, width), as `DiffusionModel.encode` takes them.
    """
    seed = seed_of(task, restart)
    prefix = _start(task, config.vectors, seed)
    optimizer = torch.optim.Adam(list(prefix.values()), lr=config.lr or 5e-3)
    batches = row_batches(task, latents, config.batch_size, seed)
    unnamed = renamed(batches, nameless(task.concepts))
    descend(task, unnamed, lambda rows: prefix, optimizer, config.steps, "pseudo-token")
    return {name: embeddings.detach() for name, embeddings in prefix.items()}


def find(
    task: Task, latents: LatentSet, config: PseudoTokenConfig, restart: int, known: Known
) -> Found:
    """See `find_pseudo_token`; they stand before prompts that leave the names out."""
    return Found(find_pseudo_token(task, latents, config, restart), NAMELESS)


def predict_behind(
    task: Task, rows: Rows, prompts: Sequence[str], found: Mapping[str, Tensor]
) -> Tensor:
    """The prediction of these rows behind a pseudo-token, under these prompts without names; with
    gradient where enabled.

    Args:
        task: the model, and the concepts whose names are left out.
        rows: n of them.
        prompts: one each.
        found: text encoder -> embeddings, shape (vectors, width) or (n, vectors, width).
    """
    unnamed = [*map(nameless(task.concepts), prompts)]
    cond = task.cond(unnamed, found).to(rows.noisy.device)  # from an encoder that waits elsewhere
    return task.model.predict(rows.noisy, rows.t, cond)


def find_each(
    task: Task, config: PseudoTokenConfig, restart: int
) -> Callable[[Rows, list[str]], Tensor]:
    """A function of rows and prompts that predicts behind what is found now (`predict_behind`):
    each concept is sought by itself, on the images whose prompts name it, and a prompt is asked
    behind what speaks for the concept that it names (the first, where it names none)."""
    forget = task.forget()
    owner = {name: i for i, concept in enumerate(task.concepts) for name in concept.names}
    named, parts = Names(owner), [forget]
    if len(task.concepts) > 1:
        every = torch.arange(len(forget))
        parts = [forget.at(rows_naming(forget, concept, every)) for concept in task.concepts]
    found = [find_pseudo_token(task, part, config, restart) for part in parts]

    def behind(prompt: str) -> dict[str, Tensor]:
        return found[next((owner[name] for name in named.found(prompt)), 0)]

    def ask(rows: Rows, prompts: list[str]) -> Tensor:
        each = [*map(behind, prompts)]
        prefix = {name: torch.stack([*map(itemgetter(name), each)]) for name in each[0]}
        return predict_behind(task, rows, prompts, prefix)

    return ask


def nameless(concepts: tuple[ConceptSpec, ...], word: str = "") -> Callable[[str], str]:
    """A function that leaves every name of the concepts out of a prompt, or has this word there."""
    listed = [name for concept in concepts for name in concept.names]
    names, words = Names(listed), dict.fromkeys(listed, word)
    return lambda prompt: " ".join(names.replaced(prompt, words).split())


def _start(task: Task, count: int, seed: int) -> dict[str, Tensor]:
    """Embeddings of tokens drawn at random."""
    generator, start = torch.Generator().manual_seed(seed), {}
    for name, encoder in text_encoders(task.model.pipeline()).items():
        table = encoder.get_input_embeddings().weight.detach()
        rows = torch.randint(len(table), (count,), generator=generator)
        start[name] = table[rows.to(table.device)].clone().requires_grad_()
    return start


PSEUDO_TOKEN = Attack(
    "pseudo_token",
    "https://arxiv.org/abs/2308.01508",
    PseudoTokenConfig(),
    "the weights, images of the concept and the way to give embeddings instead of words",
    find,
    rates=(5e-3, 2e-2),
    asks=lambda config, prompts: (Asked(), descended(config.steps, config.batch_size)),
)
