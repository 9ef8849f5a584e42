"""Flow transformers behind a language model are, behind the one protocol, what their stock
pipelines are: text states, one pass, images, pixels; and what the methods make of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from erase.eval.generate_config import GenerateConfig
from erase.eval.sampling import prepared
from erase.latents.prepare import LatentConfig
from erase.methods import get_method
from erase.models import wrap
from erase.models.pipelines import decode, stock
from erase.models.prompt_checks import cut_prompts
from erase.models.scopes import select
from erase.prompts.errors import ErasureError
from erase.task import Task
from tests.flow_families import FLOWS
from tests.test_methods import CONCEPT, quick

PROMPTS = ["a red heart", "a moon, in a long sentence", ""]


@pytest.fixture(params=FLOWS)
def family(request):
    return request.param


@pytest.fixture
def pipeline(family):
    return FLOWS[family]()


@pytest.fixture
def short(monkeypatch):
    """Few tokens are read, so that tests which ask no stock pipeline take less time."""
    for make in FLOWS.values():
        monkeypatch.setattr(type(stock(make())), "tokens", 40)


def drawn(pipeline, prompts, seeds, guidance, **more):
    """A stock call, prompts given as text; `guidance` counts 1 as none."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    given = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "pt"} | more
    scale = stock(pipeline).guided(guidance)
    return pipeline(prompts, **scale, **given, generator=generators).images


# ---- conditions ----


def stock_states(pipeline, prompt):
    """What the stock pipeline's `encode_prompt` says of a prompt, at the length of its call."""
    found = pipeline.encode_prompt([prompt], max_sequence_length=512)[0]
    return found[0]


@pytest.mark.parametrize("prompt", [*PROMPTS, "a red heart " * 200], ids=["", "", "null", "cut"])
def test_text_states_are_the_stock_pipelines_bit_for_bit(pipeline, prompt):
    found, expected = wrap(pipeline).encode([prompt]), stock_states(pipeline, prompt)
    states = found.embeddings[0, : len(expected)]
    assert torch.equal(states, expected) and not found.embeddings[0, len(expected) :].any()
    if "length" in found.extras:
        assert found.extras["length"].tolist() == [len(expected)]


def test_a_prompt_is_cut_where_its_last_token_is_no_more_read(pipeline):
    """One token more changes nothing, and is counted; one fewer does."""
    model, way = wrap(pipeline), stock(pipeline)
    room = way.room(pipeline.tokenizer)
    full, longer, other = ("a" + " a" * (room - 2) + end for end in (" red", " red red", " blue"))
    states = [model.encode([prompt]).embeddings for prompt in (full, longer, other)]
    assert not torch.equal(states[0], states[2])
    cut = cut_prompts([full, longer], model.tokens)
    assert (cut["count"], cut["prompts"], cut["room"]) == (1, [longer], {"text_encoder": room})


# ---- one pass ----


def first_pass(pipeline, prompt):
    """What the denoiser is shown and says in the first step of a stock call without guidance, as
    velocity of latents."""
    steps = []

    def keep(pipe, step, t, tensors):
        steps.append(tensors["latents"])
        return tensors

    start = torch.randn(1, *wrap(pipeline).latent_shape, generator=torch.Generator().manual_seed(5))
    way = stock(pipeline)
    drawn(
        pipeline,
        [prompt],
        [1],
        1.0,
        latents=way.taken(start),
        output_type="latent",
        callback_on_step_end=keep,
    )
    sigmas, after = pipeline.scheduler.sigmas, way.given(steps[0], start.shape[-1])
    return start, sigmas[0], (after - start) / (sigmas[1] - sigmas[0])


def test_a_pass_is_the_velocity_that_the_stock_sampler_steps_by(pipeline):
    """Its step is x' = x + (sigma' - sigma) v: the sign and the time are the house's."""
    start, sigma, velocity = first_pass(pipeline, "a red heart")
    model = wrap(pipeline)
    assert sigma == 1
    ours = model.predict(start, torch.tensor([999]), model.encode(["a red heart"]))
    assert ours.shape == start.shape and torch.allclose(ours, velocity, atol=1e-5)


def test_rows_of_one_pass_do_not_know_of_each_other(pipeline):
    """Prompts of several lengths, each as alone, to rounding."""
    model = wrap(pipeline)
    xt = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    t, cond = torch.tensor([10, 500, 990]), model.encode(PROMPTS)
    together = model.predict(xt, t, cond)
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.allclose(together[one], model.predict(xt[one], t[one], cond[one]), atol=1e-5)


def test_the_noise_levels_are_the_samplers(pipeline):
    model = wrap(pipeline)
    every = torch.arange(model.timesteps)
    assert model.sigma(every[-1:]) == 1 and (model.sigma(every).diff() > 0).all()
    assert torch.equal(model.timestep(model.sigma(every) * model.timesteps), every)
    x0, noise = torch.randn(2, 2, *model.latent_shape)
    xt, t = model.add_noise(x0, noise, torch.tensor([0, 700])), torch.tensor([0, 700])
    sigma = model.sigma(t).view(-1, 1, 1, 1)
    assert torch.equal(xt, (1 - sigma) * x0 + sigma * noise)
    assert torch.equal(model.target(x0, noise, t), noise - x0)


# ---- images ----


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_images_are_the_stock_pipelines_bit_for_bit(pipeline, guidance):
    model, prompts = wrap(pipeline), ["a red heart", "a moon"]
    latents = model.sample(prompts, [3, 4], 2, guidance)
    assert torch.equal(decode(pipeline, latents, "no"), drawn(pipeline, prompts, [3, 4], guidance))


def test_guidance_is_away_from_the_empty_prompt(pipeline):
    """v("") + g (v(c) - v("")), of which g = 1 is one pass."""
    calls = []
    pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    images = {g: wrap(pipeline).sample(["a red heart"], [3], 1, g) for g in (1.0, 2.0, 3.0)}
    assert sum(calls) >= 3
    first, second = images[2.0] - images[1.0], images[3.0] - images[2.0]
    assert first.abs().max() > 1e-4 and torch.allclose(first, second, atol=1e-5)


def test_an_image_is_encoded_as_it_is_decoded(pipeline):
    """The latents' scale is that by which they are decoded: what the VAE makes of its own mean."""
    model, images = wrap(pipeline), torch.rand(2, 3, 64, 64) * 2 - 1
    mean, std = model.encode_images(images)
    assert mean.shape == std.shape == (2, *model.latent_shape) and (std > 0).all()
    frames = images.unsqueeze(2) if pipeline.vae.encoder.conv_in.weight.dim() == 5 else images
    own = pipeline.vae.decode(pipeline.vae.encode(frames).latent_dist.mean).sample
    own = own[:, :, 0] if own.dim() == 5 else own
    own = pipeline.image_processor.postprocess(own, output_type="pt")
    assert torch.allclose(decode(pipeline, mean, "no"), own, atol=1e-5)


def test_a_trajectory_is_what_the_sampler_passes_through(pipeline):
    model = wrap(pipeline)
    latents, noise, t = model.trajectory(["a moon"], [1], 3, 2.0)
    start = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(latents, model.sample(["a moon"], [1], 3, 2.0)) and (t.diff() < 0).all()
    assert torch.allclose(model.add_noise(latents, noise[0], t[:1]), start, atol=1e-5)


def test_images_of_broken_patches_and_other_samplers_are_refused(pipeline):
    with pytest.raises(ErasureError, match="images of 72 pixels .* multiple of 16"):
        prepared(pipeline, GenerateConfig(scheduler="euler", resolution=72))
    if stock(pipeline).tells_levels:
        with pytest.raises(ErasureError, match=r"dpm\+\+ cannot be told .*; use euler"):
            prepared(pipeline, GenerateConfig(scheduler="dpm++"))


# ---- scopes ----


def test_scopes_divide_the_denoiser(pipeline):
    params = wrap(pipeline).parameters()
    full, text, kv, image, ff, rest = (
        set(select(params, s)) for s in ("full", "xattn", "xattn_kv", "selfattn", "ff", "noxattn")
    )
    assert text | rest == full and not text & rest and kv < text and image < rest
    assert (
        ff < rest and not ff & image and set(select(params, "text_encoder")) == set(params) - full
    )
    assert all(name.endswith(".weight") or name.endswith(".bias") for name in kv) and len(kv) >= 2


def inputs(model, scope):
    """Whether a change of the prompt alone, and one of the image alone, changes what the layers of
    a scope are given."""
    linear = {
        name.removesuffix(".weight").removeprefix("transformer.")
        for name in select(model.parameters(), scope)
    }
    net, seen = model.component("transformer"), []
    hooks = [
        module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        for name, module in net.named_modules()
        if name in linear and isinstance(module, torch.nn.Linear)
    ]
    noise, t = torch.randn(2, *model.latent_shape), torch.tensor([500])
    shown = []
    for xt, prompt in ((0, "a red heart"), (0, "a blue heart"), (1, "a red heart")):
        model.predict(noise[xt : xt + 1], t, model.encode([prompt]))
        shown.append([*seen])
        seen.clear()
    for hook in hooks:
        hook.remove()
    first = [not torch.equal(one[0], other[0]) for one, other in ((shown[0], x) for x in shown[1:])]
    return tuple(first)


def test_the_texts_projections_are_given_text_and_the_images_the_image(pipeline):
    """Told by the first layer of each, before the streams have met."""
    model = wrap(pipeline)
    assert inputs(model, "xattn_kv") == (True, False)
    assert inputs(model, "selfattn") == (False, True)


# ---- methods ----

ERASE = ("salun", "esd", "fia", "advunlearn", "few-shot")
REFUSE = {
    "uce": "no closed form",
    "rece": "no closed form",
    "mace": "no closed form",
    "speed": "matches none",
    "forget-me-not": "UNet",
    "hirm": "CLIP's last attention",
}


def edit(model, name):
    task = Task(model, [CONCEPT], LatentConfig(n_forget=4, n_retain=4, steps=2), 0)
    config = quick(name)
    if hasattr(config, "ceiling"):  # random weights err by more than it
        config = replace(config, ceiling=100.0)
    return get_method(name).edit(task, config)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ERASE)
def test_a_method_erases_within_its_scope_and_leaves_the_base(pipeline, name):
    model = wrap(pipeline, "base")
    before = {key: param.detach().clone() for key, param in model.parameters().items()}
    found, again = edit(model, name), edit(model, name)
    assert set(found.values) <= set(select(model.parameters(), quick(name).scope))
    assert any(not torch.equal(value, before[key]) for key, value in found.values.items())
    assert all(torch.equal(again.values[key], value) for key, value in found.values.items())
    assert all(torch.equal(p, before[key]) for key, p in model.parameters().items())


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", REFUSE)
def test_a_method_that_cannot_erase_says_why(pipeline, name):
    with pytest.raises(ErasureError, match=REFUSE[name]):
        edit(wrap(pipeline, "base"), name)
