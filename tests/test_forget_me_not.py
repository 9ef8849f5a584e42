"""Forget-Me-Not and what it looks at: against diffusers' own attention scores."""

from dataclasses import replace

import pytest
import torch

from erase.latents.config import LatentConfig
from erase.latents.latent_set import Given
from erase.methods import get_method
from erase.models import wrap
from erase.objectives.cross_attention import name_places, recorded
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.task import Task
from erase.training.config import TrainConfig
from tests.attention import keeping
from tests.bare import (
    CONCEPT,
    FORGET,
    PROMPTS,
    RETAIN,
    RETAINED,
    SGD,
    Bare,
    check,
    drawn,
    mean,
    task_of,
)
from tests.families import FAMILIES

PLACES = ([2], [3], [2])
"""of "heart" in the prompts: begin, "a", ("red",) "heart", end"""


@pytest.fixture
def task(make_pico_pipeline):
    return task_of(make_pico_pipeline())


def resteered(bare, kept, latent, noise, t, row):
    """The loss of one latent, token by token and head by head."""
    kept.clear()
    bare.predict(latent, noise, t, PROMPTS[row])
    total = 0
    for scores in kept:  # (heads, positions, tokens)
        for token in PLACES[row]:
            total = total + mean(scores[head, :, token].square().sum() for head in range(4))
    return total


def test_forget_me_not_takes_the_steps_of_its_equation(task, make_pico_pipeline):
    bare = Bare(make_pico_pipeline())
    kept = keeping(bare.unet)

    def loss(step):
        forgot = mean(resteered(bare, kept, *row) for row in drawn(FORGET, step, 0))
        held = mean(bare.error(*row[:3], RETAINED[row[3]]) for row in drawn(RETAIN, step, 1))
        return forgot + 0.7 * held

    config = replace(get_method("forget-me-not").config, alpha=0.7, train=SGD)
    check(get_method("forget-me-not").edit(task, config).values, bare.train("attn2", loss))


def test_what_is_recorded_is_what_the_attention_computes(task, make_pico_pipeline):
    bare = Bare(make_pico_pipeline())
    kept = keeping(bare.unet)
    (latent, noise, t, row), *_ = drawn(FORGET, 0, 0)
    bare.predict(latent, noise, t, PROMPTS[row])
    noisy = task.model.add_noise(latent[None], noise[None], t[None])
    with recorded(task.model) as layers:
        task.model.predict(noisy, t[None], task.cond([PROMPTS[row]]))
    assert len(layers) == len(kept) > 1
    found = [layer.probabilities()[0] for layer in layers]
    # the module's order is down, up, middle; that of a pass down, middle, up
    for scores in kept:
        assert any(
            one.shape == scores.shape and torch.allclose(one, scores, atol=1e-5) for one in found
        )
    hooks = [m._forward_hooks for m in task.model.component("unet").modules()]
    assert not any(hooks)


def test_less_is_looked_at_the_name_and_more_at_the_rest(task):
    config = replace(
        get_method("forget-me-not").config, train=TrainConfig(steps=10, lr=1e-2, batch_size=2)
    )
    found = get_method("forget-me-not").edit(task, config)
    assert found.losses[-1] < 0.7 * found.losses[0]

    (latent, noise, t, row), *_ = drawn(FORGET, 0, 0)
    noisy = task.model.add_noise(latent[None], noise[None], t[None])
    shares = []
    for values in ({}, found.values):
        for name, value in values.items():
            task.model.parameters()[name].data.copy_(value)
        with recorded(task.model) as layers:
            task.model.predict(noisy, t[None], task.cond([PROMPTS[row]]))
        shares.append(
            mean(float(layer.probabilities()[..., PLACES[row]].mean()) for layer in layers)
        )
    assert shares[1] < 0.9 * shares[0]


def test_names_are_found_where_they_stand(task):
    concept = ConceptSpec("heart", "moon", synonyms=("red fish",))
    prompts = ["a heart a heart", "a red fish", "a red heart"]
    places = name_places(task, [concept], prompts, 77)
    assert [row.nonzero().flatten().tolist() for row in places] == [[2, 4], [2, 3], [3]]
    with pytest.raises(ErasureError, match="'a tree' names none of 'heart'.*synonyms"):
        name_places(task, [CONCEPT], ["a heart", "a tree"], 77)


def test_a_name_is_found_as_the_prompt_writes_it(task):
    concept = ConceptSpec("heart", "moon", synonyms=("chain saw",))
    written = ["hearts", "Heart", "chainsaw", "chain-saw"]
    places = name_places(task, [concept], [f"a {word}-shaped box" for word in written], 77)
    for row, tokens in zip(places, task.model.tokens(written)["text_encoder"], strict=True):
        assert row.nonzero().flatten().tolist() == list(range(2, 2 + len(tokens.seen)))


def test_a_caption_without_the_name_is_refused_before_training(make_pico_pipeline, monkeypatch):
    monkeypatch.setattr("erase.methods.forget_me_not.fine_tune", lambda *_: pytest.fail("trained"))
    without = replace(FORGET, prompts=("a heart", "a tree", "a heart"))
    task = Task(wrap(make_pico_pipeline()), [CONCEPT], Given(without, RETAIN))
    with pytest.raises(ErasureError, match="'a tree' names none of 'heart'"):
        get_method("forget-me-not").edit(task, get_method("forget-me-not").config)


def test_every_unet_has_it_and_a_joint_attention_says_so():
    method = get_method("forget-me-not")
    config, few = (
        replace(method.config, train=replace(SGD, steps=1)),
        LatentConfig(n_forget=2, n_retain=2, steps=1),
    )
    for family in ("sd2", "sdxl"):
        task = Task(wrap(FAMILIES[family](), family), [CONCEPT], few)
        assert method.edit(task, config).losses[0] > 0
    with pytest.raises(ErasureError, match="no UNet.*take a method that looks at predictions"):
        method.edit(Task(wrap(FAMILIES["sd3"](), "sd3"), [CONCEPT], few), config)
