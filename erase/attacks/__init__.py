"""Attacks on an erasure: what brings a concept back. Shared by the evaluation and by adversarial
training; one file and one index line each, or an entry point `concept_erasure.attacks`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor

from erase.latents.latent_set import LatentSet
from erase.plugins import Index
from erase.prompts.errors import ErasureError
from erase.task import Task

C = TypeVar("C")
NAMED, NAMELESS, ALONE = "named", "nameless", "alone"
"""the prompt behind what was found: as it is, without the concept's names, or none"""
GRADIENT = 3
"""passes that one with a gradient is worth: the way back costs about two ways there"""
RESTART = 7919
"""between the seeds of two restarts"""
Known = Mapping[str, Tensor]
"""what an attacker brings from the base, by name"""


@dataclass(frozen=True)
class Found:
    """What the attacker changes in a prompt, or in its drawing."""

    prefix: Mapping[str, Tensor] = field(default_factory=dict)
    """text encoder -> embeddings behind the start token, shape (k, dim), or (n, k, dim) where each
    of n prompts has its own"""
    prompt: str = NAMED
    """of NAMED, NAMELESS, ALONE"""
    texts: tuple[str, ...] = ()
    """the embeddings as words, one text for all prompts or one each; none where they are no
    words"""
    seed_shift: int = 0
    """added to the seeds"""


@dataclass(frozen=True)
class Asked:
    """How often a search asks the model: rows that pass the denoiser, prompts that pass the text
    encoders. A pass with a gradient counts as `GRADIENT`."""

    predictions: float = 0
    texts: float = 0

    def __add__(self, other: Asked) -> Asked:
        return Asked(self.predictions + other.predictions, self.texts + other.texts)

    def times(self, count: float) -> Asked:
        """So many of it."""
        return Asked(self.predictions * count, self.texts * count)


def descended(steps: int, rows: int) -> Asked:
    """Of descent on what stands before prompts."""
    return Asked(GRADIENT * steps * rows, GRADIENT * steps * rows)


def seed_of(task: Task, restart: int) -> int:
    """The seed of one start of an attack."""
    return task.seed + RESTART * restart


def never(config: Any) -> bool:
    """Of an attack that seeks one thing for all prompts."""
    return False


def nothing_known(task: Task, latents: LatentSet, config: Any, restart: int) -> Known:
    """Of an attack that takes nothing from the base but its images."""
    return {}


@dataclass(frozen=True)
class Attack(Generic[C]):
    """A way to bring a concept back: its functions, its budget, and what it needs to have."""

    name: str
    """an identifier"""
    paper: str
    config: C
    """a dataclass instance with the default budget; its type is this attack's alone"""
    has: str
    """what the attacker has, for a sentence"""
    find: Callable[[Task, LatentSet, C, int, Known], Found]
    """(task of the attacked model, images of the concept with prompts, budget, restart, what
    `learn` gave) -> what to put into prompts; leaves the model as it was found"""
    learn: Callable[[Task, LatentSet, C, int], Known] = nothing_known
    """(task of the base, and as above) -> what the attacker brings from there"""
    rates: tuple[float, ...] = ()
    """values of the budget's `lr` that an evaluation tries; none: it has no `lr`"""
    per_prompt: Callable[[C], bool] = never
    """whether, with this budget, it wants one latent for each prompt that is attacked, in their
    order"""
    asks: Callable[[C, int], tuple[Asked, Asked]] | None = None
    """(budget, prompts that are attacked) -> what one `learn` and one `find` ask of the model, for
    an estimate; None: not known"""
    repeated: bool = False
    """whether a prompt is broken if any of the budget's `tries` breaks it, as of a baseline; else
    the best try counts, for all prompts alike"""


ATTACKS: Index[Attack[Any]] = Index(
    "attack",
    {
        "pseudo_token": "erase.attacks.pseudo_token:PSEUDO_TOKEN",
        "unlearndiffatk": "erase.attacks.unlearndiffatk:UNLEARNDIFFATK",
        "p4d": "erase.attacks.p4d:P4D",
        "ring_a_bell": "erase.attacks.ring_a_bell:RING_A_BELL",
        "transferred": "erase.attacks.transferred:TRANSFERRED",
        "random_tokens": "erase.attacks.baselines:RANDOM_TOKENS",
        "seed_search": "erase.attacks.baselines:SEED_SEARCH",
    },
    Attack,
)
"""attack -> where it is defined"""


def get_attack(name: str) -> Attack[Any]:
    """The attack of this name, or at this `package.module:NAME`.

    Raises:
        ErasureError: an unknown name (the near one is suggested), or a plugin that cannot be used.
    """
    return ATTACKS.get(name)


def check_own_rows(latents: LatentSet, found: Found) -> None:
    """Refuse embeddings of each prompt that are of other prompts.

    Raises:
        ErasureError: there are more or fewer than latents.
    """
    for vectors in found.prefix.values():
        if vectors.dim() == 3 and len(vectors) != len(latents):
            raise ErasureError(
                f"the attack found embeddings for {len(vectors)} prompts, and there are "
                f"{len(latents)}; give it one latent for each prompt"
            )
