"""STEREO: both stages written out on the bare UNet, and that what it found is what it erases."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from erase.attacks import RESTART
from erase.attacks.pseudo_token import (
    PseudoTokenConfig,
    find_each,
    find_pseudo_token,
    predict_behind,
)
from erase.attacks.relearning import changed_to
from erase.latents.latent_set import Given, LatentSet
from erase.mask import SaliencyMask
from erase.methods import get_method
from erase.models import wrap
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.task import Task
from erase.training.batches import row_batches
from erase.training.config import MaskConfig
from erase.training.trainable import Trained
from tests.bare import (
    ANCHORS,
    CONCEPT,
    FORGET,
    PROMPTS,
    SGD,
    SIZE,
    Bare,
    check,
    drawn,
    mean,
    task_of,
)
from tests.bare_text import ids_of, spoken
from tests.families import FAMILIES

ETA, VECTORS = 1.5, 2
UNNAMED = ("a", "a red", "a")
SMALL = replace(
    get_method("stereo").config,
    scope="xattn",
    guidance=ETA,
    prompts="captions",
    rounds=2,
    search_steps=2,
    search_lr=0.05,
    attack=PseudoTokenConfig(vectors=VECTORS, steps=2, lr=0.05, batch_size=SIZE),
    train=SGD,
)


@pytest.fixture
def task(make_pico_pipeline):
    return task_of(make_pico_pipeline())


def edit(task, **change):
    return get_method("stereo").edit(task, replace(SMALL, **change))


class Literal(Bare):
    """The two stages on the bare pipeline, row by row; a prompt is a function of a row's number
    that gives its text states."""

    def states(self, texts, found=None):
        holders = "a " * VECTORS if found is not None else ""
        ids = ids_of(self.pipeline, [holders + text for text in texts])
        prefix = None if found is None else found[None].expand(len(ids), -1, -1)
        return spoken(self.pipeline.text_encoder, ids, prefix)[0]

    def seen(self, unet, row, states):
        latent, noise, t, _ = row
        noisy = self.schedule.add_noise(latent[None], noise[None], t[None])
        return unet(noisy, t[None], states[None]).sample[0]

    def descend(self, loss, steps, lr):
        for step in range(steps):
            params = [p for name, p in self.unet.named_parameters() if "attn2" in name]
            slopes = torch.autograd.grad(loss(step), [p.requires_grad_(True) for p in params])
            with torch.no_grad():
                for p, slope in zip(params, slopes, strict=True):
                    p -= lr * slope

    def guided_loss(self, teacher, prompt, target):
        """Mean over a step's rows of |eps(p) - target(teacher, row)|^2."""

        def loss(step):
            errors = []
            for row in drawn(FORGET, step, 0):
                with torch.no_grad():
                    wanted = target(teacher, row)
                found = self.seen(self.unet, row, prompt(step)[row[3]])
                errors.append((found - wanted).square().mean())
            return mean(errors)

        return loss

    def found_again(self, restart):
        """Textual inversion on the model as it is."""
        seed = -RESTART * (1 + restart)
        table = self.pipeline.text_encoder.get_input_embeddings().weight.detach()
        start = torch.Generator().manual_seed(seed)
        vectors = table[torch.randint(len(table), (VECTORS,), generator=start)]
        vectors = vectors.clone().requires_grad_()
        adam = torch.optim.Adam([vectors], lr=0.05)
        for step in range(2):
            states = self.states(UNNAMED, vectors)
            errors = [
                (self.seen(self.unet, row, states[row[3]]) - row[1]).square().mean()
                for row in drawn(FORGET, step, seed)
            ]
            (vectors.grad,) = torch.autograd.grad(mean(errors), vectors)
            adam.step()
        return vectors.detach()

    def erase(self, words, anchor_words, unnamed):
        """`words`: what the concept is called at each row; the attack searches under the rows' own
        prompts, less the name."""
        empty, prompts = self.states([""])[0], [self.states(words)]
        anchors, base = self.states(anchor_words), deepcopy(self.unet)
        for round in range(2):
            before, last = deepcopy(self.unet), prompts[-1]

            def away(teacher, row, last=last):
                null = self.seen(teacher, row, empty)
                return null - ETA * (self.seen(teacher, row, last[row[3]]) - null)

            self.descend(self.guided_loss(before, lambda step, last=last: last, away), 2, 0.05)
            prompts.append(self.states(unnamed, self.found_again(round)))

        def composed(teacher, row):
            null = self.seen(teacher, row, empty)
            anchor = ETA * (self.seen(teacher, row, anchors[row[3]]) - null)
            erased = [ETA * (self.seen(teacher, row, p[row[3]]) - null) for p in prompts]
            return null + anchor - mean(erased)

        self.unet.load_state_dict(self.base)
        loss = self.guided_loss(base, lambda step: prompts[step % 3], composed)
        self.descend(loss, SGD.steps, SGD.lr)
        named = self.unet.named_parameters()
        return {f"unet.{name}": p.detach() for name, p in named if "attn2" in name}


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("captions", (PROMPTS, ANCHORS, UNNAMED)),
        ("names", (("heart",) * 3, ("mushroom",) * 3, ("",) * 3)),
    ],
)
def test_stereo_takes_the_steps_of_its_algorithm(task, make_pico_pipeline, prompts, words):
    literal = Literal(make_pico_pipeline())
    literal.pipeline.text_encoder.requires_grad_(False)
    check(edit(task, prompts=prompts).values, literal.erase(*words))


@pytest.fixture
def attacked(monkeypatch):
    """(weights, what was found) of each attack on the way."""
    attacks = []

    def keep(task, latents, config, restart=0):
        found = find_pseudo_token(task, latents, config, restart)
        weights = {name: p.detach().clone() for name, p in task.model.parameters().items()}
        attacks.append((weights, found))
        return found

    monkeypatch.setattr("erase.attacks.pseudo_token.find_pseudo_token", keep)
    return attacks


def test_what_was_found_behind_a_pseudo_token_goes_too(task, attacked):
    """The prediction behind it moves further than by ESD, which has never seen it; here it was
    found on the base, for the rounds' own erasures change next to nothing."""
    train = replace(SGD, steps=12, lr=0.3, batch_size=3)
    attack = PseudoTokenConfig(vectors=VECTORS, steps=20, lr=0.05, batch_size=3)
    still = {"rounds": 1, "search_lr": 1e-30, "search_steps": 1, "attack": attack}
    robust = edit(task, train=train, **still).values
    plain = get_method("esd").edit(
        task, replace(get_method("esd").config, train=train, guidance=ETA, prompts="captions")
    )
    ((_, found),) = attacked
    rows, prompts = row_batches(task, FORGET, 3)(0)
    before = predict_behind(task, rows, prompts, found)

    def moved(values):
        with changed_to(task.model, values):
            after = predict_behind(task, rows, prompts, found)
        return float((after - before).square().mean())

    assert moved(robust) > 1.2 * moved(plain.values) > 0


def test_each_of_several_concepts_is_sought_in_its_own_images(make_pico_pipeline, monkeypatch):
    """And a prompt is asked behind what speaks for its own concept."""
    prompts = ("a heart", "a red star", "a Star", "a heart")
    anchors = ("a mushroom", "a red moon", "a moon", "a mushroom")
    model = wrap(make_pico_pipeline())
    points = LatentSet(torch.randn(4, 4, 8, 8), None, prompts, anchors)
    concepts = [CONCEPT, ConceptSpec("star", "moon", retain=("a fish",))]
    task, sought = Task(model, concepts, Given(points, points)), []

    def keep(task, latents, config, restart=0):
        sought.append((latents, find_pseudo_token(task, latents, config, restart)))
        return sought[-1][1]

    monkeypatch.setattr("erase.attacks.pseudo_token.find_pseudo_token", keep)
    ask = find_each(task, SMALL.attack, restart=-1)
    assert [latents.prompts for latents, _ in sought] == [prompts[::3], prompts[1:3]]
    assert torch.equal(sought[1][0].latents, points.latents[1:3])
    assert sought[1][0].anchors == anchors[1:3]
    (_, heart), (_, star) = sought
    rows = row_batches(task, points, 4)(0)[0]
    with torch.no_grad():
        alone = [predict_behind(task, rows, prompts, found) for found in (heart, star)]
        got = ask(rows, ["a heart", "a red star", "Star", "no name"])
        bare = predict_behind(task, rows, ["", "a red", "", "no name"], star)
    assert not torch.allclose(*alone)
    assert torch.allclose(got[0], alone[0][0], atol=1e-6)
    assert torch.allclose(got[1:3], bare[1:3], atol=1e-6)


def test_outside_the_mask_no_stage_changes_a_weight(task, attacked):
    """Nor do the models that are attacked on the way, whose mask is the same."""
    base = {name: p.detach().clone() for name, p in task.model.parameters().items()}
    found = edit(task, mask=MaskConfig(rule="remap", density=0.1, batches=2))
    assert isinstance(found.mask, SaliencyMask) and len(attacked) == 2
    for values in (*(weights for weights, _ in attacked), found.values):
        changed = [name for name, value in values.items() if not torch.equal(value, base[name])]
        assert changed and all(name in found.mask for name in changed)
        for name in changed:
            outside = ~found.mask[name]
            assert torch.equal(values[name][outside], base[name][outside])


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_stereo_goes_with_several_encoders_and_pooled_states(family):
    model = wrap(FAMILIES[family](), family)
    shape = len(PROMPTS), *model.latent_shape
    points = LatentSet(torch.randn(shape, generator=torch.Generator()), None, PROMPTS, ANCHORS)
    task, base = Task(model, [CONCEPT], Given(points, points)), model.parameters()
    found = edit(task, rounds=1, train=replace(SGD, steps=2)).values
    assert any(not torch.equal(value, base[name]) for name, value in found.items())


@pytest.mark.parametrize(
    ("setting", "value"),
    [("rounds", 0), ("search_steps", 0), ("search_lr", 0), ("guidance", 1e400)],
)
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ErasureError, match=setting):
        replace(SMALL, **{setting: value})


def test_a_training_that_ends_before_all_that_was_found_is_forgotten_is_refused(task):
    with pytest.raises(ErasureError, match="train.steps is 2; it must be between 3 and"):
        edit(task, rounds=2, train=replace(SGD, steps=2))


def test_the_search_keeps_what_the_mask_holds_and_no_whole_weights(task, monkeypatch):
    kept = []

    def spy(model, values):
        kept.append(values)
        return changed_to(model, values)

    monkeypatch.setattr("erase.methods.stereo.changed_to", spy)
    edit(task, rounds=1, mask=MaskConfig(rule="random", density=0.02))
    assert [type(values) for values in kept] == [dict, Trained] and not kept[0]
