"""Transferred embeddings: found once on the base, tried on whatever was erased from it.

Han et al. 2024, "Probing Unlearned Diffusion Models: A Transferable Adversarial Attack
Perspective", https://arxiv.org/abs/2404.19382, find embeddings on the original model that several
erased ones answer to; here they are a pseudo-token of the base. The attacker never sees the erased
weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from erase.attacks import NAMELESS, Asked, Attack, Found, Known, descended
from erase.attacks.pseudo_token import PseudoTokenConfig, find_pseudo_token
from erase.latents.latent_set import LatentSet
from erase.task import Task


@dataclass(frozen=True)
class TransferredConfig(PseudoTokenConfig):
    """transferred: the attacker's budget."""


def learn(task: Task, latents: LatentSet, config: TransferredConfig, restart: int) -> Known:
    """Embeddings that stand for the concept in the base."""
    return find_pseudo_token(task, latents, config, restart)


def find(
    task: Task, latents: LatentSet, config: TransferredConfig, restart: int, known: Known
) -> Found:
    """The same embeddings."""
    device = task.model.device
    return Found({name: vectors.to(device) for name, vectors in known.items()}, NAMELESS)


TRANSFERRED = Attack(
    "transferred",
    "https://arxiv.org/abs/2404.19382",
    TransferredConfig(),
    "the base, images of the concept and the way to give embeddings instead of words",
    find,
    learn,
    rates=(5e-3,),
    asks=lambda config, prompts: (descended(config.steps, config.batch_size), Asked()),
)
