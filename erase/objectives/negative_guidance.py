"""The target of erased Stable Diffusion: away from the concept, as negative guidance of the base
would lead (Gandikota et al., ICCV 2023, https://arxiv.org/abs/2303.07345, eq. 5)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain
from typing import ClassVar

from torch import Tensor

from erase.latents.batches import Rows
from erase.latents.latent_set import LatentSet
from erase.losses import denoising
from erase.prompts.errors import FINITE, ErasureError, check_names, check_ranges
from erase.prompts.names import Names
from erase.task import Task
from erase.training.batches import PromptedRows
from erase.training.config import TunedConfig
from erase.training.loop import LossFn
from erase.training.trainable import Base

Ask = Callable[[Rows, list[str]], Tensor]
"""(rows, prompts) -> the model's prediction"""


@dataclass
class AwayConfig(TunedConfig):
    """Settings of training away from the concept."""

    draws: ClassVar[tuple[str, ...]] = ("n_forget",)
    guidance: float = 1.0
    """eta: how far away from the concept"""
    prompts: str = "names"
    """c: names (the concept's name or synonym, alone) or captions (whole forget prompts: what else
    they speak of goes, too)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"guidance": FINITE})
        check_names(self, {"prompts": ("names", "captions")})


def check_attacked(attack_from: int, steps: int) -> None:
    """Refuse an adversarial training that ends before its attack begins."""
    if attack_from >= steps:
        raise ErasureError(
            f"attack_from is {attack_from}, and training ends after train.steps {steps}, so that "
            "nothing would be attacked; lower attack_from or raise train.steps (esd trains without "
            "an attack)"
        )


def forget_set(task: Task, prompts: str) -> LatentSet:
    """The task's forget latents, and under which prompts they shall be forgotten.

    Args:
        task: the erasure.
        prompts: captions, as they are; or names: the concept's name that stands in each, alone, and
            the anchor's alone beside it, as the papers do. A whole caption takes what else it
            speaks of along. One that names no concept stays; of several concepts that one names,
            the one that has come least so far is taken.
    """
    forget = task.forget()
    if prompts == "captions":
        return forget
    owner = {name: concept for concept in task.concepts for name in concept.names}
    named, taken = Names(owner), Counter[str]()
    words, alone = list[str](), list[str]()
    for prompt, anchor in zip(forget.prompts, forget.anchors or forget.prompts, strict=True):
        word = min(named.found(prompt), key=lambda name: taken[owner[name].target], default=prompt)
        concept = owner.get(word)
        words.append(word)
        alone.append(concept.anchor if concept else anchor)
        if concept:
            taken[concept.target] += 1
    task.cond([*words, *alone])  # while the text encoders are at hand
    return replace(forget, prompts=tuple(words), anchors=tuple(alone))


def away(null: Tensor, concept: Tensor, eta: float, start: Tensor | None = None) -> Tensor:
    """`start - eta (eps_0(x_t, c) - eps_0(x_t))`, of the predictions under the empty prompt and
    under the concept's; it starts from that under the empty prompt, unless another is given."""
    return (null if start is None else start) - eta * (concept - null)


def target(
    task: Task,
    rows: Rows,
    prompts: list[str],
    base: Base,
    eta: float,
    ask: Ask | None = None,
    starts: list[str] | None = None,
) -> Tensor:
    """The same of these rows and prompts, by the base; `ask` in the place of `task.predict`;
    `starts`: prompts from whose predictions it starts."""
    asked = [[""] * len(rows)]
    if starts:
        asked.append(starts)
    if not ask:
        asked.append(prompts)
    again = reduce(Rows.cat, [rows] * len(asked))
    with base():
        answers = task.predict(again, list(chain(*asked))).chunk(len(asked))
        concept = ask(rows, prompts) if ask else answers[-1]
    return away(answers[0], concept, eta, answers[1] if starts else None)


def away_loss(
    task: Task, eta: float, ask: Ask | None = None, start: Mapping[str, str] | None = None
) -> LossFn:
    """The loss of going there, as the loop takes it: `|eps(x_t, c) - target|^2`. `start`: prompt ->
    the one that its target starts from."""

    def loss(batch: PromptedRows, base: Base) -> dict[str, Tensor]:
        rows, prompts = batch
        starts = [start[prompt] for prompt in prompts] if start else None
        wanted = target(task, rows, prompts, base, eta, ask, starts)
        return {"forget": denoising((ask or task.predict)(rows, prompts), wanted)}

    return loss
