"""Tries of an attack: what is found with a budget, from a start, and in which prompts it shows the
concept; kept in files, so that a stopped evaluation goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erase.attacks import ALONE, NAMED, Attack, Found, Known, check_own_rows
from erase.attacks.pseudo_token import nameless
from erase.eval.attempts import Attempts
from erase.files import errors_named
from erase.latents.latent_set import Given, LatentSet
from erase.models import DiffusionModel
from erase.parallel.processes import exists_on_all, processes
from erase.prompts.concepts import ConceptSpec
from erase.task import Task
from erase.tensor_files import load_tensors, save_tensors
from erase.tensors import sha256_of

Planned = tuple[Attack[Any], Any, int]
"""an attack, its budget, the restart"""


@dataclass(frozen=True)
class Try:
    """One try of an attack, and what came of it."""

    budget: dict[str, Any]
    restart: int
    shown: tuple[bool, ...]
    """whether each prompt's image shows the concept"""
    texts: tuple[str, ...] = ()
    """the words that were put into the prompts"""
    pictures: Mapping[int, np.ndarray] = field(default_factory=dict, compare=False)
    """a few of the images, by the place of their prompt"""

    @property
    def count(self) -> int:
        """Images that show it."""
        return sum(self.shown)


@dataclass(frozen=True)
class Attacker:
    """What all attacks of a case share: the concepts, images of them, and the prompts to break."""

    concepts: Sequence[ConceptSpec]
    attempts: Attempts
    latents: LatentSet
    """images of the concepts by the base, of other seeds than the erasure's"""
    own: LatentSet
    """the base's image of each prompt that is attacked, where an attack asks for them"""
    frozen: Mapping[str, Any]
    """what is the same on every model under evaluation (`frozen_facts`)"""
    seed: int = 0
    shared: Path | None = None
    """folder of what is learned from the base, the same for every model under evaluation"""
    folder: Path | None = None
    """folder of what is found on the model under evaluation"""

    def images_for(self, attack: Attack[Any], budget: Any) -> LatentSet:
        """The latents that the attack wants."""
        return self.own if attack.per_prompt(budget) else self.latents

    def learn(self, base: DiffusionModel, attack: Attack[Any], budget: Any, restart: int) -> Known:
        """What the attack brings from the base."""
        latents = self.images_for(attack, budget)
        digest = self._digest(base, attack, budget, restart, latents)
        path = self.shared and self.shared / f"{attack.name}-{digest}.safetensors"
        if path and exists_on_all(path):
            return load_tensors(path, "attack")[0]
        known = attack.learn(self._task(base, latents), latents, budget, restart)
        if path and known and processes().is_main_process:
            save_tensors(path, known, {"format": "attack"})
        return known

    def attack(
        self, model: DiffusionModel, attack: Attack[Any], budget: Any, restart: int, known: Known
    ) -> Try:
        """Seek, draw and judge; or read what an earlier run found."""
        latents = self.images_for(attack, budget)
        digest = self._digest(model, attack, budget, restart, latents)
        path = self.folder and self.folder / f"{attack.name}-{digest}.safetensors"
        if path and exists_on_all(path):
            return _read(path, budget, restart)
        pictures: dict[int, np.ndarray] = {}
        found = attack.find(self._task(model, latents), latents, budget, restart, known)
        if attack.per_prompt(budget):
            check_own_rows(latents, found)
        shown = self.attempts.shown(
            model,
            [behind(found, self.concepts)(prompt) for prompt in self.attempts.prompts],
            prefix=found.prefix or None,
            seed_shift=found.seed_shift,
            what=attack.name,
            pictures=pictures,
        )
        if path and processes().is_main_process:
            _write(path, found, shown, pictures)
        return Try(asdict(budget), restart, tuple(shown), found.texts, pictures)

    def _task(self, model: DiffusionModel, latents: LatentSet) -> Task:
        return Task(model, self.concepts, Given(latents, latents), self.seed)

    def _digest(
        self,
        model: DiffusionModel,
        attack: Attack[Any],
        budget: Any,
        restart: int,
        images: LatentSet,
    ) -> str:
        """Of all that a try depends on."""
        rows = [(row.prompt, row.seed, row.guidance) for row in self.attempts.rows]
        about = {
            "weights": model.fingerprint,
            "frozen": self.frozen,
            "attack": [attack.name, asdict(budget), restart, self.seed],
            "concepts": [concept.to_dict() for concept in self.concepts],
            "images": vars(images),
            "judged": [self.attempts.detector.name, asdict(self.attempts.settings), rows],
            "threads": torch.get_num_threads(),
        }
        return sha256_of(about)[:16]


@dataclass
class Part:
    """The prompts of one concept among all that are attacked, and what comes of them."""

    places: Sequence[int]
    before: Sequence[bool]
    """whether the report's own image of each shows it"""
    attacker: Attacker
    known: dict[tuple[str, str, int], Known] = field(default_factory=dict)
    """(attack, budget, restart) -> what it brings from the base"""
    tries: dict[str, list[Try]] = field(default_factory=dict)
    """attack -> what came of each"""

    def learn(self, base: DiffusionModel, planned: Iterable[Planned]) -> None:
        """What every try brings from the base."""
        for attack, budget, restart in planned:
            learned = self.attacker.learn(base, attack, budget, restart)
            self.known[attack.name, str(budget), restart] = learned

    def attack(self, model: DiffusionModel, planned: Iterable[Planned]) -> None:
        """Every try, until one breaks all prompts: there is none better."""
        for attack, budget, restart in planned:
            tries = self.tries.setdefault(attack.name, [])
            if not (tries and all(tries[-1].shown)):
                known = self.known[attack.name, str(budget), restart]
                tries.append(self.attacker.attack(model, attack, budget, restart, known))

    def success(self, attack: Attack[Any]) -> list[bool]:
        """Of each prompt (see `success`)."""
        return success(attack, self.before, self.tries[attack.name])


def together(parts: Sequence[Part], flags: Sequence[Sequence[bool]]) -> list[bool]:
    """What these say of the prompts of each part, as one list of all prompts."""
    placed: dict[int, bool] = {}
    for part, own in zip(parts, flags, strict=True):
        placed |= zip(part.places, own, strict=True)
    return [placed[place] for place in range(len(placed))]


def success(attack: Attack[Any], before: Sequence[bool], tries: Sequence[Try]) -> list[bool]:
    """Whether each prompt shows the concept before the attack or after it: after its best try, or,
    of a baseline, after any."""
    if not tries:
        return list(before)
    tried = tries if attack.repeated else [max(tries, key=lambda one: broken(before, one))]
    after = [one.shown for one in tried]
    return [any(column) for column in zip(before, *after, strict=True)]


def broken(before: Sequence[bool], one: Try) -> int:
    """Prompts that show the concept after the try and did not before."""
    return sum(shown and not earlier for earlier, shown in zip(before, one.shown, strict=True))


def behind(found: Found, concepts: Sequence[ConceptSpec]) -> Callable[[str], str]:
    """What stands behind the prefix in the place of a prompt."""
    if found.prompt == NAMED:
        return str
    return (lambda prompt: "") if found.prompt == ALONE else nameless(tuple(concepts))


def tries_of(
    attack: Attack[Any], budget: Any, rates: Sequence[float] | None, restarts: int
) -> Iterator[tuple[Any, int]]:
    """(budget, restart) of each try: a baseline's own number of tries, else every rate from every
    start.

    Args:
        attack: may have rates of its own.
        budget: its config; an `lr` that is given is tried alone.
        rates: in the place of its own; None: its own.
        restarts: starts at each rate.
    """
    if attack.repeated:
        yield from ((budget, restart) for restart in range(budget.tries))
        return
    budgets = [budget]
    if attack.rates:
        given = budget.lr != attack.config.lr  # a rate that the user sets is the one to try
        tried = (budget.lr,) if given else rates or attack.rates
        budgets = [replace(budget, lr=rate) for rate in tried]
    for restart in range(restarts):
        yield from ((one, restart) for one in budgets)


def _write(
    path: Path, found: Found, shown: Sequence[bool], pictures: Mapping[int, np.ndarray]
) -> None:
    tensors: dict[str, Tensor] = {"shown": torch.tensor(list(shown))}
    tensors |= {f"picture.{place}": torch.from_numpy(one) for place, one in pictures.items()}
    tensors |= {f"prefix.{name}": vectors for name, vectors in found.prefix.items()}
    texts = json.dumps(found.texts, ensure_ascii=False)
    save_tensors(path, tensors, {"format": "attack", "prompt": found.prompt, "texts": texts})


def _read(path: Path, budget: Any, restart: int) -> Try:
    tensors, metadata = load_tensors(path, "attack")
    with errors_named(path, "delete it to attack again"):
        shown = tuple(bool(one) for one in tensors["shown"])
        pictures = {}
        for name, pixels in tensors.items():
            what, _, place = name.partition(".")
            if what == "picture":
                pictures[int(place)] = pixels.numpy()
        texts = tuple(json.loads(metadata["texts"]))
        return Try(asdict(budget), restart, shown, texts, dict(sorted(pictures.items())))
