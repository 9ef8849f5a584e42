"""AdvUnlearn and RACE: their steps against their equations, written out, and what their attacks
do."""

from dataclasses import replace

import pytest
import torch
from transformers import CLIPTextModel

from erase.attacks.relearning import changed_to
from erase.attacks.words import words_of
from erase.export import export_diffusers
from erase.latents.config import LatentConfig
from erase.latents.latent_set import Given, LatentSet
from erase.methods import advunlearn, get_method, race
from erase.models import wrap
from erase.models.pipelines import text_encoders
from erase.prompts.errors import ErasureError
from erase.run import EraseConfig, erase_concept
from erase.task import Task
from erase.training.batches import row_batches
from tests.bare import (
    CONCEPT,
    FORGET,
    PROMPTS,
    RETAIN,
    RETAINED,
    SGD,
    SIZE,
    Bare,
    check,
    drawn,
    mean,
    task_of,
)
from tests.bare_text import ids_of, spoken, train
from tests.families import FAMILIES

ADV, RACE = (
    replace(get_method(name).config, prompts="captions") for name in ("advunlearn", "race")
)
ETA, GAMMA = 1.5, 0.7


@pytest.fixture
def task(make_pico_pipeline):
    return task_of(make_pico_pipeline())


def guided_away(base, row, eta=ETA):
    """eps_0(x_t) - eta (eps_0(x_t, c) - eps_0(x_t)), and eps_0(x_t, c)."""
    latent, noise, t, index = row
    null, concept = (
        base.predict(latent, noise, t, prompt).detach() for prompt in ("", PROMPTS[index])
    )
    return null - eta * (concept - null), concept


def seen(bare, row, states):
    """The prediction of one row under given text states, shape (tokens, dim)."""
    latent, noise, t, _ = row
    noisy = bare.schedule.add_noise(latent[None], noise[None], t[None])
    return bare.unet(noisy, t[None], states[None]).sample[0]


@pytest.mark.parametrize(("name", "config"), [("advunlearn", ADV), ("race", RACE)])
def test_c_is_the_concepts_name_alone(make_pico_pipeline, name, config):
    """By default as if each forget prompt were the name that stands in it, and nothing else."""
    alone = replace(FORGET, prompts=("heart",) * 3, anchors=("mushroom",) * 3)
    config = replace(config, train=SGD, attack_from=1, attack_steps=2)

    def values(forget, prompts):
        task = Task(wrap(make_pico_pipeline()), [CONCEPT], Given(forget, RETAIN))
        return get_method(name).edit(task, replace(config, prompts=prompts)).values

    by_name, expected = values(FORGET, "names"), values(alone, "captions")
    assert get_method(name).config.prompts == "names"
    for key, value in expected.items():
        torch.testing.assert_close(by_name[key], value)
    assert any(
        not torch.equal(by_name[key], value) for key, value in values(FORGET, "captions").items()
    )


# ---- AdvUnlearn ----------------------------------------------------------------------------------


@pytest.mark.parametrize("attack_from", [2, 1])
def test_advunlearn_takes_the_steps_of_its_equation(task, make_pico_pipeline, attack_from):
    """Before the attacks begin, they are those of ESD over the text encoder with a retain term."""
    bare, base = Bare(make_pico_pipeline()), Bare(make_pico_pipeline())
    encoder, words = bare.pipeline.text_encoder, words_of(wrap(make_pico_pipeline()))
    config = replace(
        ADV, guidance=ETA, alpha=GAMMA, train=SGD, vectors=2,
        attack_from=attack_from, attack_steps=2, attack_lr=0.05,
    )  # fmt: skip

    def states(row, delta):
        if delta is None:
            return spoken(encoder, ids_of(bare.pipeline, [PROMPTS[row[3]]]))[0][0]
        ids = ids_of(bare.pipeline, ["a a " + PROMPTS[row[3]]])
        return spoken(encoder, ids, delta[None])[0][0]

    def attacked(rows, step):
        stream = torch.Generator().manual_seed(~step)
        places = torch.randint(len(words), (SIZE, 2), generator=stream)
        delta = words.tables["text_encoder"][places].clone().requires_grad_()
        adam = torch.optim.Adam([delta], lr=0.05)
        for _ in range(2):
            errors = [
                (seen(bare, row, states(row, one)) - guided_away(base, row)[1]).square().mean()
                for row, one in zip(rows, delta, strict=True)
            ]
            (delta.grad,) = torch.autograd.grad(mean(errors), delta)
            adam.step()
        return delta.detach()

    def loss(step):
        rows, kept = drawn(FORGET, step, 0), []
        deltas = attacked(rows, step) if step >= attack_from else [None] * SIZE
        forgot = [
            (seen(bare, row, states(row, delta)) - guided_away(base, row)[0]).square().mean()
            for row, delta in zip(rows, deltas, strict=True)
        ]
        for row in drawn(RETAIN, step, 1):
            prompt = RETAINED[row[3]]
            kept.append(bare.error(*row[:3], prompt, base.predict(*row[:3], prompt).detach()))
        return mean(forgot) + GAMMA * mean(kept)

    found = get_method("advunlearn").edit(task, config).values
    assert not any("embed" in name for name in found)
    check(found, train(encoder, r"^(?!.*embed)", loss))


@pytest.fixture
def erased(task):
    """The task, its encoder erased with one attack at the end, and what the base predicted of
    rows."""
    rows, prompts = row_batches(task, FORGET, 3)(0)
    concept = task.predict(rows, prompts).detach()
    train = replace(ADV.train, steps=20, lr=3e-3, batch_size=3)
    config = replace(ADV, train=train, attack_from=19, attack_steps=1)
    with changed_to(task.model, get_method("advunlearn").edit(task, config).values):
        yield Task(task.model, [CONCEPT], Given(FORGET, RETAIN)), rows, prompts, concept


def test_advunlearns_attack_brings_the_concept_nearer_and_trains_nothing(erased):
    task, rows, prompts, concept = erased
    start = words_of(task.model).embedded(torch.tensor([[3], [40], [100]]))

    def error(steps):
        config = replace(ADV, attack_steps=steps, attack_lr=0.05 if steps > 1 else 1e-9)
        asked = replace(rows, target=concept), prompts
        found = advunlearn.attack(task, asked, start, config)
        states = task.cond(prompts, found)
        return float((task.model.predict(rows.noisy, rows.t, states) - concept).square().mean())

    errors = [error(steps) for steps in (1, 5, 20)]
    assert errors[2] < errors[1] < errors[0]
    assert all(param.grad is None for param in task.model.parameters().values())


def test_advunlearns_encoder_serves_another_denoiser(make_pico_pipeline, tmp_path):
    """Exported, it is read by a pipeline whose denoiser is another one; that one keeps its bits."""
    config = replace(ADV, attack_from=1, attack_steps=2, train=replace(SGD, lr=1.0))
    model, other = wrap(make_pico_pipeline()), make_pico_pipeline(seed=1)
    data = EraseConfig(method="advunlearn", latents=LatentConfig(n_forget=4, n_retain=4, steps=2))
    delta = erase_concept(CONCEPT, data, config, model=model)
    assert delta.components == ["text_encoder"]
    export_diffusers(delta, model, tmp_path / "out")

    before = {name: value.clone() for name, value in other.unet.state_dict().items()}
    other.text_encoder = CLIPTextModel.from_pretrained(tmp_path / "out" / "text_encoder")
    changed = wrap(other)
    with delta.applied(model):
        wanted = model.encode(["a heart"]).embeddings
    assert torch.equal(changed.encode(["a heart"]).embeddings, wanted)
    assert not torch.equal(model.encode(["a heart"]).embeddings, wanted)
    assert all(torch.equal(value, before[n]) for n, value in other.unet.state_dict().items())


# ---- RACE ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack_from", [2, 1])
def test_race_takes_the_steps_of_its_equation(task, make_pico_pipeline, attack_from):
    """Before the attacks begin, they are those of ESD."""
    bare, base, radius = Bare(make_pico_pipeline()), Bare(make_pico_pipeline()), 0.3
    config = replace(
        RACE, guidance=ETA, radius=radius, attack_steps=3, attack_from=attack_from, train=SGD
    )

    def states(row):
        return bare.pipeline.encode_prompt(PROMPTS[row[3]], "cpu", 1, False)[0][0].detach()

    def attacked(rows, step):
        stream = torch.Generator().manual_seed(~step)
        delta = radius * (2 * torch.rand((SIZE, 32, 32), generator=stream) - 1)
        for _ in range(3):
            delta = delta.detach().requires_grad_()
            errors = [
                (seen(bare, row, states(row) + one) - row[1]).square().mean()
                for row, one in zip(rows, delta, strict=True)
            ]
            (slope,) = torch.autograd.grad(mean(errors), delta)
            delta = (delta - radius / 4 * slope.sign()).clamp(-radius, radius)
        return delta.detach()

    def loss(step):
        rows = drawn(FORGET, step, 0)
        deltas = attacked(rows, step) if step >= attack_from else [0] * SIZE
        return mean(
            (seen(bare, row, states(row) + delta) - guided_away(base, row)[0]).square().mean()
            for row, delta in zip(rows, deltas, strict=True)
        )

    found = get_method("race").edit(task, config).values
    check(found, bare.train("attn2", loss))


def test_races_attack_stays_in_its_box_and_brings_the_concept_nearer(erased):
    task, rows, prompts, _ = erased
    cond, config = task.cond(prompts), replace(RACE, radius=0.2, attack_steps=8)
    start = 0.4 * torch.rand(cond.embeddings.shape, generator=torch.Generator()) - 0.2
    found = race.attack(task, rows, cond, start, config)
    assert found.abs().max() <= 0.2

    def error(delta):
        states = replace(cond, embeddings=cond.embeddings + delta)
        return float((task.model.predict(rows.noisy, rows.t, states) - rows.target).square().mean())

    assert error(found) < error(start) and error(found) < error(torch.zeros_like(start))


@pytest.mark.usefixtures("short_t5")
@pytest.mark.parametrize("name", ["advunlearn", "race"])
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_attacks_go_with_several_encoders_and_pooled_states(name, family):
    model = wrap(FAMILIES[family](), family)
    shape = len(PROMPTS), *model.latent_shape
    points = LatentSet(torch.randn(shape, generator=torch.Generator()), None, PROMPTS, PROMPTS)
    settings = {"attack_from": 0, "attack_steps": 1, "train": replace(SGD, steps=1)}
    config = replace(get_method(name).config, **settings)
    found = get_method(name).edit(Task(model, [CONCEPT], Given(points, points)), config).values
    base = model.parameters()
    changed = {n.split(".")[0] for n, value in found.items() if not torch.equal(value, base[n])}
    encoders = set(text_encoders(model.pipeline()))
    assert changed == (encoders if name == "advunlearn" else changed - encoders) and changed


@pytest.mark.parametrize("name", ["advunlearn", "race"])
@pytest.mark.parametrize("saving", ["gradient_checkpointing", "selective_recompute"])
def test_attacks_go_with_activations_that_are_computed_anew(task, name, saving):
    config = replace(get_method(name).config, attack_from=0, attack_steps=2, train=SGD)
    plain = get_method(name).edit(task, config).values
    config = replace(config, train=replace(SGD, **{saving: True}))
    again = get_method(name).edit(task, config).values
    assert all(torch.allclose(again[n], value, atol=1e-5) for n, value in plain.items())


@pytest.mark.parametrize("name", ["advunlearn", "race"])
def test_attacks_split_with_the_batch(task, name):
    """Each row is attacked by itself, so that parts of a batch add up to it."""
    config = replace(get_method(name).config, attack_from=0, attack_steps=2, train=SGD)
    whole = get_method(name).edit(task, config).values
    config = replace(config, train=replace(SGD, accumulation=2))
    parts = get_method(name).edit(task, config).values
    assert all(torch.allclose(parts[n], value, atol=1e-5) for n, value in whole.items())


@pytest.mark.parametrize(
    ("method", "setting", "value"),
    [
        ("advunlearn", "attack_steps", 0),
        ("advunlearn", "attack_lr", 0),
        ("advunlearn", "alpha", -1),
        ("race", "radius", 0),
        ("race", "attack_from", -1),
    ],
)
def test_settings_out_of_range_are_refused(method, setting, value):
    with pytest.raises(ErasureError, match=setting):
        replace(get_method(method).config, **{setting: value})


@pytest.mark.parametrize("name", ["advunlearn", "race"])
def test_a_training_that_ends_before_its_attack_begins_is_refused(name):
    config = get_method(name).config
    shorter = replace(config.train, steps=config.attack_from)
    with pytest.raises(ErasureError, match=r"attack_from is \d+.*train\.steps"):
        replace(config, train=shorter)
    assert replace(config, train=replace(shorter, steps=config.attack_from + 1))
