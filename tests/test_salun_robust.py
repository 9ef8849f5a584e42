"""SalUn in rounds: its equation written out on the bare UNet, and what the rounds are for."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from erase.attacks.pseudo_token import PseudoTokenConfig, find_pseudo_token, predict_behind
from erase.attacks.relearning import changed_to
from erase.latents.latent_set import Given, LatentSet
from erase.methods import get_method
from erase.models import wrap
from erase.prompts.errors import ErasureError
from erase.task import Task
from erase.training.batches import row_batches
from erase.training.config import MaskConfig
from tests.bare import (
    ANCHORS,
    CONCEPT,
    FORGET,
    PROMPTS,
    RETAINED,
    SGD,
    SIZE,
    check,
    drawn_by_remap,
    mean,
    task_of,
)
from tests.bare_text import BareText
from tests.families import FAMILIES

ALPHA, VECTORS = 0.7, 2
UNNAMED = ("a", "a red", "a")
SMALL = replace(
    get_method("salun-robust").config,
    scope="xattn",
    alpha=ALPHA,
    beyond=0.0,
    noise_power=1.0,
    anchor_latents=0.0,
    retain_dropout=0.0,
    mask=MaskConfig(density=1.0),
    rounds=2,
    round_steps=2,
    round_lr=0.05,
    attack=PseudoTokenConfig(vectors=VECTORS, steps=2, lr=0.05, batch_size=SIZE),
    train=SGD,
)


@pytest.fixture
def task(make_pico_pipeline):
    return task_of(make_pico_pipeline())


def edit(task, **change):
    return get_method("salun-robust").edit(task, replace(SMALL, **change))


class Literal(BareText):
    """The rounds."""

    def erase(self):
        base, found = deepcopy(self.unet), []
        named, anchors, kept = map(self.states, (PROMPTS, ANCHORS, RETAINED))

        def apart(row, states, reference):
            with torch.no_grad():
                wanted = self.seen(base, row, reference[row[3]])
            return (self.seen(self.unet, row, states[row[3]]) - wanted).square().mean()

        def loss(step):
            retain, forget = drawn_by_remap(step)
            under = [[named] for _ in forget]
            for i, known in enumerate(under):
                known += [found[(step * SIZE + i) % len(found)]] if found else []
            forgot = mean(
                mean([apart(row, states, anchors) for states in known])
                for row, known in zip(forget, under, strict=True)
            )
            return forgot + ALPHA * mean(apart(row, kept, kept) for row in retain)

        self.descend(loss, 3, SGD.lr)
        for begin in (3, 5):
            again = self.found_again(len(found), UNNAMED, VECTORS)
            found.append(self.states(UNNAMED, again))
            self.descend(lambda step, begin=begin: loss(begin + step), 2, 0.05)
        named = self.unet.named_parameters()
        return {f"unet.{name}": p.detach() for name, p in named if "attn2" in name}


def test_it_takes_the_steps_of_its_rounds(task, make_pico_pipeline):
    literal = Literal(make_pico_pipeline())
    literal.pipeline.text_encoder.requires_grad_(False)
    check(edit(task).values, literal.erase())


def test_what_was_found_is_led_to_the_anchor(task, monkeypatch):
    """Behind the embeddings of the last round the prediction is nearer to the anchor's than one
    that has never seen them leaves it."""
    found = []

    def keep(*given, **named):
        found.append(find_pseudo_token(*given, **named))
        return found[-1]

    monkeypatch.setattr("erase.methods.salun_robust.find_pseudo_token", keep)
    train = replace(SGD, steps=12, lr=0.3, batch_size=3)
    change = {"train": train, "rounds": 1, "round_steps": 12, "round_lr": 0.3}
    robust = edit(task, **change).values
    plain = {name: getattr(SMALL, name) for name in vars(get_method("salun").config)}
    plain |= {"train": replace(train, steps=24)}
    salun = get_method("salun")
    blind = salun.edit(task, replace(salun.config, **plain)).values

    rows, prompts = row_batches(task, FORGET, 3)(0)
    wanted = task.predict(rows, row_batches(task, replace(FORGET, prompts=ANCHORS), 3)(0)[1])

    def left(values):
        with changed_to(task.model, values):
            seen = predict_behind(task, rows, prompts, found[0])
        return float((seen - wanted).square().mean())

    assert left(robust) < 0.8 * left(blind)


def test_the_attacker_is_shown_the_concept_alone(task, monkeypatch):
    shown = []

    def keep(task, latents, config, restart):
        shown.append(latents)
        return find_pseudo_token(task, latents, config, restart)

    monkeypatch.setattr("erase.methods.salun_robust.find_pseudo_token", keep)
    mixed = replace(FORGET, shows_anchor=torch.tensor([False, True, False]))
    edit(Task(task.model, [CONCEPT], Given(mixed, task.retain())), rounds=1)
    (latents,) = shown
    assert torch.equal(latents.latents, FORGET.latents[[0, 2]]) and latents.anchors
    assert latents.prompts == (PROMPTS[0], PROMPTS[2])


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_it_goes_with_several_encoders_and_pooled_states(family):
    model = wrap(FAMILIES[family](), family)
    shape = len(PROMPTS), *model.latent_shape
    points = LatentSet(torch.randn(shape, generator=torch.Generator()), None, PROMPTS, ANCHORS)
    task, base = Task(model, [CONCEPT], Given(points, points)), model.parameters()
    found = edit(task, rounds=2, train=replace(SGD, steps=1)).values
    assert any(not torch.equal(value, base[name]) for name, value in found.items())


@pytest.mark.parametrize(("setting", "value"), [("rounds", 0), ("round_steps", 0), ("round_lr", 0)])
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ErasureError, match=setting):
        replace(SMALL, **{setting: value})
