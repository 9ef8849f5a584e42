"""HiRM and the few-shot text encoder, against their equations on an encoder that is written
out."""

import re
from dataclasses import replace

import pytest
import torch

from erase.attacks.relearning import changed_to
from erase.latents.latent_set import epoch_rows
from erase.methods import get_method
from erase.models import wrap
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.run import EraseConfig, erase_concept
from erase.task import Task
from tests.bare import CONCEPT, FORGET, PROMPTS, SGD, SIZE, Bare, check, drawn, mean, task_of
from tests.bare_text import ids_of, spoken, train
from tests.families import FAMILIES

WEIGHT = r"text_encoder\..*layers\.0\.self_attn\.v_proj\.weight"
HIRM, FEW_SHOT = get_method("hirm").config, get_method("few-shot").config


@pytest.fixture
def task(make_pico_pipeline):
    return task_of(make_pico_pipeline())


def rows_of(texts, step):
    return [texts[row] for row in epoch_rows(len(texts), step * SIZE, SIZE, 0)]


# ---- HiRM ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_hirm_takes_the_steps_of_its_equation(task, make_pico_pipeline, alpha):
    """|h - s u|^2 at every token but the first, and with alpha the retained prompts' states."""
    pipeline, base = make_pico_pipeline(), make_pico_pipeline()
    forget, retain = [prompt for prompt, _ in CONCEPT.pairs()], list(CONCEPT.retain)
    shape = pipeline.tokenizer.model_max_length, 32
    u = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def loss(step):
        _, said = spoken(pipeline.text_encoder, ids_of(pipeline, rows_of(forget, step)))
        value = (said - 3 * u)[:, 1:].square().mean()
        if not alpha:
            return value
        ids = ids_of(pipeline, rows_of(retain, step))
        now, then = (spoken(one.text_encoder, ids)[0] for one in (pipeline, base))
        return value + alpha * (now - then.detach()).square().mean()

    config = replace(HIRM, strength=3.0, alpha=alpha, train=SGD)
    found = get_method("hirm").edit(task, config).values
    check(found, train(pipeline.text_encoder, r"layers\.0\.(self_attn|mlp)", loss))


def test_hirm_turns_what_is_said_of_the_concept_and_leaves_the_denoiser(make_pico_pipeline):
    """Of each of two concepts, towards one direction; nothing but the first layer changes."""
    pipeline = make_pico_pipeline()
    model = wrap(pipeline)
    concepts = [CONCEPT, ConceptSpec("moon", "star", retain=("a fish",))]
    config = replace(HIRM, train=replace(HIRM.train, lr=1e-2))
    delta = erase_concept(concepts, EraseConfig(method="hirm"), config, model=model)
    assert all(re.match(r"text_encoder\..*layers\.0\.", name) for name in delta.values)

    u = torch.randn((32, 32), generator=torch.Generator().manual_seed(0))[1:]

    def towards(prompt):
        said = spoken(pipeline.text_encoder, ids_of(pipeline, [prompt]))[1][0, 1:]
        return float(torch.cosine_similarity(said.flatten(), u.flatten(), dim=0))

    before = [towards(f"a {name}") for name in ("heart", "moon")]
    with delta.applied(model):
        after = [towards(f"a {name}") for name in ("heart", "moon")]
    assert all(old < 0.1 and new > 0.2 for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize(("family", "encoders"), [("sdxl", 2), ("sd3", 2), ("flux", 1), ("sd2", 1)])
def test_hirm_reaches_every_clip(family, encoders):
    model = wrap(FAMILIES[family](), family)
    found = get_method("hirm").edit(Task(model, [CONCEPT]), replace(HIRM, train=SGD))
    base = model.parameters()
    changed = {n.split(".")[0] for n, v in found.values.items() if not torch.equal(v, base[n])}
    assert len(changed) == encoders and "text_encoder_3" not in changed


@pytest.mark.parametrize("family", ["sd2", "sdxl", "sd3", "flux"])
def test_alpha_holds_pooled_states_too(monkeypatch, family):
    """FLUX.1's CLIP gives nothing else to the denoiser."""
    model, losses = wrap(FAMILIES[family](), family), []
    monkeypatch.setattr(
        "erase.methods.hirm.fine_tune", lambda task, loss, batches, config: losses.append(loss)
    )
    get_method("hirm").edit(Task(model, [CONCEPT]), replace(HIRM, alpha=0.7))
    (name,) = (name for name in model.parameters() if re.match(WEIGHT, name))
    moved = {name: model.parameters()[name].detach() + 0.1}
    model.parameters()[name].requires_grad_(True)  # as in training: states are live
    prompts = list(CONCEPT.retain)

    def states():
        cond = model.encode(prompts)
        return [cond.embeddings, *cond.extras.values()]

    now = states()
    with changed_to(model, moved):
        then = states()
    expected = 0.7 * sum((one - two).square().mean() for one, two in zip(now, then, strict=True))
    found = losses[0]((prompts, prompts), lambda: changed_to(model, moved))["retain"]
    assert expected > 0 and torch.allclose(found, expected, rtol=1e-3)


def test_surgery_of_hirm_on_flux():
    """The retain term has a gradient."""
    model = wrap(FAMILIES["flux"](), "flux")
    config = replace(HIRM, alpha=1.0, combine="surgery", train=SGD)
    assert get_method("hirm").edit(Task(model, [CONCEPT]), config).losses


def test_hirm_never_makes_a_latent(task, monkeypatch):
    monkeypatch.setattr(Task, "forget", lambda *_: pytest.fail("latents were made"))
    assert get_method("hirm").edit(task, replace(HIRM, train=SGD)).losses


def test_hirm_refuses_a_scope_outside_of_the_encoders(task):
    with pytest.raises(ErasureError, match="hirm trains text encoders, and scope 'xattn'"):
        get_method("hirm").edit(task, replace(HIRM, scope="xattn", train=SGD))


def test_hirm_checkpoints_its_layers(task):
    """Activations that are computed anew give the same gradient."""
    plain = get_method("hirm").edit(task, replace(HIRM, train=SGD)).values
    less = replace(HIRM, train=replace(SGD, gradient_checkpointing=True))
    again = get_method("hirm").edit(task, less).values
    assert all(torch.allclose(again[name], value, atol=1e-6) for name, value in plain.items())


# ---- few-shot text encoder -----------------------------------------------------------------------


def test_few_shot_takes_the_steps_of_its_equation(task, make_pico_pipeline):
    bare = Bare(make_pico_pipeline())

    def loss(step):
        return -mean(bare.error(*row[:3], PROMPTS[row[3]]) for row in drawn(FORGET, step, 0))

    found = get_method("few-shot").edit(task, replace(FEW_SHOT, ceiling=1e9, train=SGD)).values
    assert all(name.startswith("text_encoder.") and ".mlp." in name for name in found)
    check(found, train(bare.pipeline.text_encoder, r"\.mlp\.", loss))


def test_few_shot_raises_the_error(task):
    """Measured before and after on the same latents, with 32 noises and timesteps of each."""
    rows = torch.arange(3).repeat(32)
    t, noise = FORGET.draw_noise(rows, 1000, task.generator(7))
    noisy, errors = task.model.add_noise(FORGET.latents[rows], noise, t), []
    training = replace(FEW_SHOT.train, steps=16, lr=1e-3, batch_size=3)
    learnt = get_method("few-shot").edit(task, replace(FEW_SHOT, train=training)).values
    for values in ({}, learnt):
        with changed_to(task.model, values), torch.no_grad():
            found = task.model.predict(noisy, t, task.model.encode([*PROMPTS] * 32))
        errors.append(float((found - noise).square().mean()))
    assert errors[1] > errors[0] + 5e-4


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_few_shot_finds_the_words_of_every_clip(family):
    model = wrap(FAMILIES[family](), family)
    scope = Task(model, [CONCEPT]).weights(FEW_SHOT.scope)
    assert {name.split(".")[0] for name in scope} == {"text_encoder", "text_encoder_2"}


@pytest.mark.parametrize(
    ("method", "setting", "value"),
    [("hirm", "strength", 0), ("hirm", "alpha", -1), ("few-shot", "ceiling", 0)],
)
def test_settings_out_of_range_are_refused(method, setting, value):
    with pytest.raises(ErasureError, match=setting):
        replace(get_method(method).config, **{setting: value})
