"""Pictures of a base and of its erasures, from the same prompt and seeds, with a judge's word."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

from PIL.Image import Image

from erase.compose import compose
from erase.delta import ErasedDelta
from erase.eval.generate import GenerateConfig, generate
from erase.eval.images import ImageSet
from erase.eval.report.tables import Block, blocks
from erase.mask import SaliencyMask
from erase.models import DiffusionModel
from erase.models.prompt_checks import cut_prompts
from erase.prompts.canvas import EMBEDDED, strange_words
from erase.prompts.errors import ErasureError, check_ranges, unknown
from erase.prompts.prompt_sets import PromptRow, PromptSet

MOST_SEEDS = 16
KEPT = 64  # draws whose pictures are remembered
Judge = Callable[[ImageSet], list[str]]
"""images of one prompt -> a word about each"""


@dataclass(frozen=True)
class Erasure:
    """A delta under the name that the page gives it, with its run's mask."""

    name: str
    delta: ErasedDelta
    mask: SaliencyMask | None = None


@dataclass(frozen=True)
class Wish:
    """What is to be drawn."""

    prompt: str
    seeds: tuple[int, ...]
    erasures: tuple[str, ...]
    """names; the changes of several are added"""
    strength: float = 1.0
    """scale of the changes: 0 is the base, 1 the erased model, below 0 the concept is added"""
    steps: int = 20
    guidance: float = 5.0

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ErasureError("there is no prompt; write what is to be drawn")
        if not self.erasures:
            raise ErasureError("no erasure is chosen; choose one to see what it changes")
        check_ranges(self, {"strength": (-inf, inf)})


@dataclass(frozen=True)
class Picture:
    """A picture and what the judge says of it."""

    image: Image
    word: str


@dataclass(frozen=True)
class Pair:
    """The base's picture and the erased model's, of one seed."""

    seed: int
    before: Picture
    after: Picture


@dataclass(frozen=True)
class Layers:
    """Where an erasure changes the network: the share of each block's weights that it moved, and
    the share that its mask let move."""

    name: str
    whole: float
    """share of all weights of the components that it changes"""
    changed: list[Block]
    allowed: dict[str, float]
    """block -> density of the mask; empty without one"""


class Stage:
    """A base with its erasures. One draw at a time: they share the base's weights."""

    def __init__(
        self,
        model: DiffusionModel,
        erasures: Sequence[Erasure],
        config: GenerateConfig,
        judge: Judge | None = None,
    ) -> None:
        """
        Args:
            model: the base; every draw leaves it as it was found.
            erasures: of this base, each under a name of its own.
            config: scheduler, resolution, ...; steps and guidance are the wish's.
            judge: its word is written under each picture; None: nothing is.

        Raises:
            ErasureError: a delta of another base.
        """
        for erasure in erasures:
            erasure.delta.check(model)
        self.model, self.config = model, config
        self.erasures = {erasure.name: erasure for erasure in erasures}
        self._judge, self._lock = judge, Lock()
        self._drawn = lru_cache(KEPT)(self._draw)

    def pairs(self, wish: Wish) -> list[Pair]:
        """A pair of pictures for each seed; what was drawn before is not drawn again.

        Raises:
            ErasureError: an unknown erasure, or a setting with which nothing can be drawn.
        """
        for name in wish.erasures:
            if name not in self.erasures:
                raise unknown("erasure", name, self.erasures)
        with self._lock:
            before = self._drawn(replace(wish, strength=0.0, erasures=tuple(self.erasures)))
            after = self._drawn(wish) if wish.strength else before
        return [Pair(*row) for row in zip(wish.seeds, before, after, strict=True)]

    def notes(self, prompt: str) -> list[str]:
        """What the model cannot see of a prompt, a sentence each."""
        notes = []
        strange = strange_words(prompt) if self.model.name in EMBEDDED else []
        if strange:
            notes.append(
                f"The embedded model has never seen {', '.join(map(repr, strange))}; it draws "
                "objects in a style and a colour, as in “A red heart image in Neon style.”"
            )
        if cut_prompts([prompt], self.model.tokens):
            notes.append("The prompt is longer than the text encoder reads; its end is not seen.")
        return notes

    def layers(self, name: str) -> Layers:
        """Where an erasure changes the network, block by block."""
        erasure = self.erasures[name]
        sizes = {key: param.numel() for key, param in self.model.parameters().items()}
        moved = {key: values.numel() / sizes[key] for key, values in erasure.delta.values.items()}
        touched = [key for key in sizes if key.split(".")[0] in erasure.delta.components]
        allowed = blocks(erasure.mask.layer_density(), sizes) if erasure.mask else []
        return Layers(
            name,
            erasure.delta.count / sum(sizes[key] for key in touched),
            blocks({key: moved.get(key, 0.0) for key in touched}, sizes),
            {block.name: block.density for block in allowed},
        )

    def _draw(self, wish: Wish) -> list[Picture]:
        config = replace(self.config, steps=wish.steps, guidance=wish.guidance)
        rows = [PromptRow(case, wish.prompt, seed) for case, seed in enumerate(wish.seeds)]
        with TemporaryDirectory() as folder, self._changed(wish) as model:
            provenance = {"fingerprint": model.fingerprint}
            prompts = PromptSet("live", tuple(rows))
            images = generate(model.pipeline(), prompts, Path(folder), config, provenance)
            words = self._judge(images) if self._judge else [""] * len(rows)
            return [
                Picture(images.image(row), word)
                for row, word in zip(images.rows, words, strict=True)
            ]

    @contextmanager
    def _changed(self, wish: Wish) -> Iterator[DiffusionModel]:
        """The model with the wish's erasures in it; the base again afterwards."""
        deltas = [self.erasures[name].delta for name in wish.erasures]
        if not wish.strength:
            yield self.model
            return
        with compose(self.model, [(delta, wish.strength) for delta in deltas]).applied(self.model):
            yield self.model


def seeds_of(text: str) -> tuple[int, ...]:
    """Seeds as they are typed: `0, 5, 7` or `0-3`.

    Raises:
        ErasureError: something else, none, a seed twice, or more than are drawn at once.
    """
    seeds: list[int] = []
    for word in re.split(r"[,;\s]+", text.strip()):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ErasureError(f"{text!r} is no list of seeds; write numbers, as in 0, 5 or 0-3")
        seeds += range(first, min(last, first + MOST_SEEDS) + 1)
        if len(seeds) > MOST_SEEDS:
            raise ErasureError(f"{text!r} is more than {MOST_SEEDS} seeds; write fewer")
    if len(set(seeds)) < len(seeds):
        raise ErasureError(f"{text!r} has a seed twice; write each once")
    return tuple(seeds)
