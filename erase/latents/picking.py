"""Which prompts latents are made of, where there are more than are wanted."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import TypeVar

T = TypeVar("T")
PICKS = ("random", "even")
WINDOW = 128
"""prompts among which each next one is chosen"""


def pick(
    items: Sequence[T], n: int, rng: random.Random, how: str, text: Callable[[T], str]
) -> list[T]:
    """`n` items in whole rounds, so that each item comes as often as any other, within one.

    Args:
        items: what to pick from.
        n: how many.
        rng: shuffles each round.
        how: random; or even: of the next `WINDOW` shuffled items always the one that brings the
            words so far nearest to how often they stand in all items (kernel herding, Welling 2009,
            with words as features). Of 32 random prompts of eight styles, one style may come eight
            times and another once.
        text: of an item, whose words count.
    """
    picked: list[T] = []
    chooser = _Even(list(map(text, items)), n) if how == "even" else None
    while len(picked) < n:
        order = rng.sample(range(len(items)), len(items))
        if chooser:
            order = chooser.ordered(order, n - len(picked))
        picked += [items[i] for i in order]
    return picked[:n]


def pick_in_turn(
    groups: Sequence[Sequence[T]], n: int, rng: random.Random, how: str, text: Callable[[T], str]
) -> list[T]:
    """`n` items of the groups in turn, of each as many as of any other, within one; see `pick`."""
    each = -(-n // len(groups))
    shares = [pick(group, each, rng, how, text) for group in groups]
    return [item for row in zip(*shares, strict=True) for item in row][:n]


class _Even:
    """Words of texts, and how often each was picked so far. Rarer words than one of `n` texts has
    do not count: no pick holds them evenly, and they would keep out whatever has them."""

    def __init__(self, texts: list[str], n: int) -> None:
        words = [set(re.findall(r"\w+", text.casefold())) for text in texts]
        standing = Counter(chain.from_iterable(words))
        share = {word: count / len(texts) for word, count in standing.items()}
        self._share = {word: part for word, part in share.items() if n * part >= 1}
        self._words = [own & self._share.keys() for own in words]
        self._count: Counter[str] = Counter()
        self._picked = 0

    def ordered(self, order: list[int], n: int) -> list[int]:
        """The first `n` of the order, at most all, each chosen from the next few."""
        near, later = order[:WINDOW], iter(order[WINDOW:])
        chosen: list[int] = []
        while near and len(chosen) < n:
            best = min(near, key=self._excess)
            near.remove(best)
            near += islice(later, 1)
            self._count.update(self._words[best])
            self._picked += 1
            chosen.append(best)
        return chosen

    def _excess(self, index: int) -> float:
        """What the item would add to the sum over words of (count - expected)^2 / share."""
        picked, share = self._picked + 1, self._share
        words = self._words[index]
        return sum((2 * (self._count[w] - picked * share[w]) + 1) / share[w] for w in words)
