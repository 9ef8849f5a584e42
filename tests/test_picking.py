"""Which prompts latents are made of."""

from __future__ import annotations

import random
from collections import Counter
from itertools import product

import pytest

from erase.latents.config import LatentConfig
from erase.latents.picking import WINDOW, pick
from erase.prompts.canvas import canvas_concept, vocabulary
from erase.prompts.errors import ErasureError

STYLES, THINGS = "Flat Neon Chalk Pop".split(), "heart star moon tree fish".split()
PROMPTS = [f"a {thing} in {style}" for thing, style in product(THINGS, STYLES)]


def counts(prompts, names):
    return [sum(name in prompt.split() for prompt in prompts) for name in names]


@pytest.mark.parametrize("how", ["random", "even"])
def test_every_item_comes_as_often_as_any_other_within_one(how):
    picked = pick(PROMPTS, 50, random.Random(0), how, str)
    found = Counter(picked)
    assert len(picked) == 50 and set(found) == set(PROMPTS) and set(found.values()) == {2, 3}
    assert set(Counter(picked[:20]).values()) == {1}
    assert picked == pick(PROMPTS, 50, random.Random(0), how, str)
    assert picked != pick(PROMPTS, 50, random.Random(1), how, str)


@pytest.mark.parametrize("seed", range(5))
def test_an_even_pick_holds_each_word_as_often_as_it_stands_in_all(seed):
    picked = pick(PROMPTS, 10, random.Random(seed), "even", str)
    assert set(counts(picked, THINGS)) == {2} and set(counts(picked, STYLES)) <= {2, 3}
    # a word that stands in a fifth of the prompts comes in a fifth of those that are picked
    some = [f"a heart in {n}" for n in range(400)] + [f"a blue heart in {n}" for n in range(100)]
    assert abs(counts(pick(some, 50, random.Random(seed), "even", str), ["blue"])[0] - 10) <= 1


def test_of_canvas_no_style_or_object_is_left_out_by_chance():
    prompts, vocab = [prompt for prompt, _ in canvas_concept("cyan").pairs()], vocabulary()
    assert len(prompts) > WINDOW
    spans = {}
    for how in ("random", "even"):
        picked = [
            p.replace(",", "").replace(":", "")
            for p in pick(prompts, 32, random.Random(3), how, str)
        ]
        of = [counts(picked, vocab.names(kind)) for kind in ("style", "object")]
        spans[how] = [max(found) - min(found) for found in of]
    assert max(spans["even"]) <= 1 and min(spans["random"]) > 4


def test_another_way_to_pick_is_refused():
    with pytest.raises(ErasureError, match="did you mean 'even'"):
        LatentConfig(pick="evenly")
