"""Flow transformers behind a language model are, behind the one protocol, what their stock
pipelines are: text states, one pass, images, pixels; and what the methods make of them."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from math import exp

import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from erase.eval.generate_config import GenerateConfig
from erase.eval.sampling import prepared
from erase.latents.config import LatentConfig
from erase.methods import get_method
from erase.models import wrap
from erase.models.patches import pack
from erase.models.pipelines import decode, stock
from erase.models.prompt_checks import cut_prompts
from erase.models.scopes import select
from erase.prompts.errors import ErasureError
from erase.task import Task
from tests.flow_families import (
    FLOWS,
    chat_tokenizer,
    tiny_klein,
    tiny_qwen_image,
    tiny_z_image,
)
from tests.test_methods import CONCEPT, quick

pytestmark = pytest.mark.usefixtures("short_chat")
PROMPTS = ["a red heart", "a moon, in a long sentence", ""]


@pytest.fixture(params=FLOWS)
def family(request):
    return request.param


@pytest.fixture
def pipeline(family):
    return FLOWS[family]()


def drawn(pipeline, prompts, seeds, guidance, **more):
    """A stock call, prompts given as text; `guidance` counts 1 as none."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    way = stock(pipeline)
    given = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "pt"} | more
    given |= way.guided(guidance) | {"max_sequence_length": way.tokens}
    if "negative_prompt" in signature(pipeline.__call__).parameters:
        given |= {"negative_prompt": [""] * len(prompts)}
    return pipeline(prompt=prompts, generator=generators, **given).images


# ---- conditions ----


def stock_states(pipeline, prompt):
    """What the stock pipeline's `encode_prompt` says of a prompt."""
    return pipeline.encode_prompt([prompt], max_sequence_length=stock(pipeline).tokens)[0][0]


def test_as_many_tokens_are_read_as_in_a_stock_call(pipeline, monkeypatch):
    monkeypatch.undo()
    stated = signature(type(pipeline).__call__).parameters["max_sequence_length"]
    assert stock(pipeline).tokens == stated.default


@pytest.mark.parametrize("prompt", [*PROMPTS, "a red heart " * 20], ids=["", "", "null", "cut"])
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
def test_images_are_the_stock_pipelines_bit_for_bit(family, pipeline, guidance):
    """Qwen-Image's to rounding with torch 2.6, whose sums depend on how many prompts are encoded
    at once."""
    model, prompts = wrap(pipeline), ["a red heart", "a moon"]
    latents = model.sample(prompts, [3, 4], 2, guidance)
    found, expected = decode(pipeline, latents, "no"), drawn(pipeline, prompts, [3, 4], guidance)
    atol = 2e-6 if family == "qwen-image" else 0
    assert torch.allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("make", [tiny_z_image, tiny_klein])
def test_guidance_is_away_from_the_empty_prompt(make):
    """v("") + g (v(c) - v("")); of Qwen-Image see below."""
    model = wrap(make())
    images = {g: model.sample(["a red heart"], [3], 1, g) for g in (1.0, 2.0, 3.0)}
    first, second = images[2.0] - images[1.0], images[3.0] - images[2.0]
    assert torch.allclose(first, second, atol=1e-5) and first.abs().max() > 1e-4


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
    pipe = prepared(pipeline, GenerateConfig(scheduler="euler", steps=2))
    assert type(pipe.scheduler) is type(pipeline.scheduler)
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

ERASE = {
    "z-image": ("salun", "esd", "uce", "rece", "fia", "advunlearn", "few-shot"),
    "klein": ("esd", "uce", "rece", "fia"),
    "qwen-image": ("salun", "esd", "uce", "rece", "fia", "advunlearn", "few-shot"),
}
REFUSE = {
    "mace": "UNet",
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


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in ERASE for name in ERASE[family]]
)
def test_a_method_erases_within_its_scope_and_leaves_the_base(family, name):
    model = wrap(FLOWS[family](), "base")
    before = {key: param.detach().clone() for key, param in model.parameters().items()}
    found, again = edit(model, name), edit(model, name)
    assert set(found.values) <= set(select(model.parameters(), quick(name).scope))
    assert any(not torch.equal(value, before[key]) for key, value in found.values.items())
    assert all(torch.equal(again.values[key], value) for key, value in found.values.items())
    assert all(torch.equal(p, before[key]) for key, p in model.parameters().items())


@pytest.mark.parametrize("family", ERASE)
@pytest.mark.parametrize("name", REFUSE)
def test_a_method_that_cannot_erase_says_why(family, name):
    with pytest.raises(ErasureError, match=REFUSE[name]):
        edit(wrap(FLOWS[family](), "base"), name)


# ---- what only one family has ----


def test_z_images_guidance_is_the_houses():
    """Of which 1 is none; its own pipeline counts from 0."""
    pipeline = tiny_z_image()
    latents = wrap(pipeline).sample(["a red heart"], [3], 2, 4.0)
    generator = torch.Generator().manual_seed(3)
    given = {"num_inference_steps": 2, "height": 64, "width": 64, "max_sequence_length": 40}
    given |= {"guidance_scale": 3.0, "generator": generator, "output_type": "latent"}
    assert torch.equal(latents, pipeline("a red heart", **given).images)


def test_z_image_follows_a_shift_by_size():
    model = wrap(tiny_z_image(by_size=True))
    assert model.shift() == pytest.approx(exp(0.5 + (16 - 256) / (4096 - 256) * (1.15 - 0.5)))


def test_kleins_latents_are_normalised_patches():
    """As its pipeline makes them of a reference image."""
    pipeline = tiny_klein()
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    mean, std = wrap(pipeline).encode_images(images)
    theirs = pipeline._encode_vae_image(images, torch.Generator())
    assert mean.shape == (1, 32, 4, 4) and torch.equal(mean, theirs)
    patches = pipeline._patchify_latents(pipeline.vae.encode(images).latent_dist.std)
    spread = (pipeline.vae.bn.running_var + pipeline.vae.config.batch_norm_eps).sqrt()
    assert torch.allclose(std, patches / spread.view(1, -1, 1, 1))


def test_klein_takes_the_samplers_shift_at_fifty_steps_and_dpm_its_own():
    pipeline = tiny_klein()
    model = wrap(pipeline)
    latents, _, t = model.trajectory(["a moon"], [1], 50, 1.0)
    drawn(pipeline, ["a moon"], [1], 1.0, num_inference_steps=50)
    assert torch.allclose(model.sigma(t), pipeline.scheduler.sigmas[:-1], atol=5e-3)
    pipe = prepared(pipeline, GenerateConfig(scheduler="dpm++", steps=4))
    drawn(pipe, ["a moon"], [1], 1.0, num_inference_steps=4)
    shift = exp(compute_empirical_mu(16, 4))
    linear = torch.tensor([1.0, 0.75, 0.5, 0.25])
    expected = shift * linear / (1 + (shift - 1) * linear)
    assert torch.allclose(pipe.scheduler.sigmas[:-1].float(), expected, atol=2e-3)


def test_a_distilled_klein_is_drawn_in_one_pass():
    pipeline, calls = tiny_klein(distilled=True), []
    pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    wrap(pipeline).sample(["a moon"], [1], 2, 4.0)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.transformer.register_to_config(guidance_embeds=True), "no FLUX.2 klein"),
        (lambda p: p.scheduler.register_to_config(use_dynamic_shifting=False), "does not follow"),
    ],
    ids=["dev", "shift"],
)
def test_other_models_in_kleins_place_are_refused(change, message):
    pipeline = tiny_klein()
    change(pipeline)
    with pytest.raises(ErasureError, match=message):
        wrap(pipeline, "base")


def test_qwen_image_gives_what_is_guided_the_norm_of_what_is_not():
    """Patch by patch: its step is along v("") + g (v(c) - v("")), at the length of v(c)."""
    pipeline = tiny_qwen_image()
    model = wrap(pipeline)
    start = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(3))
    plain, none = (
        pack(model.predict(start, torch.tensor([999]), model.encode([prompt])))
        for prompt in ("a red heart", "")
    )
    _, states, sampled = model._denoise(["a red heart"], [3], 2, 4.0)
    sigma = sampled / 1000
    step = pack(states[1] - states[0]) / (sigma[1] - sigma[0])
    along = none + 4 * (plain - none)
    wanted = along * plain.norm(dim=-1, keepdim=True) / along.norm(dim=-1, keepdim=True)
    assert torch.allclose(step, wanted, atol=1e-4)


def test_qwen_images_sight_is_no_weight_that_may_change():
    model = wrap(tiny_qwen_image())
    names = [name for name, _ in model.component("text_encoder").named_parameters()]
    own = {name for name in model.parameters() if name.startswith("text_encoder.")}
    assert own == {f"text_encoder.{name}" for name in names if ".visual." not in f".{name}"}
    assert len(own) < len(names)


def test_qwen_images_sampler_ends_above_zero_and_its_training_does_not():
    pipeline = tiny_qwen_image()
    model = wrap(pipeline)
    drawn(pipeline, ["a moon"], [1], 1.0, num_inference_steps=4)
    sigmas = pipeline.scheduler.sigmas
    assert sigmas[-2].item() == pytest.approx(0.02) and model.sigma(torch.tensor([0])) < 0.002
    _, _, t = model.trajectory(["a moon"], [1], 4, 1.0)
    assert torch.allclose(model.sigma(t), sigmas[:-1], atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.transformer.register_to_config(zero_cond_t=True), "Qwen-Image's siblings"),
        (lambda p: setattr(p, "tokenizer", chat_tokenizer()), "instruction is .* tokens .* of 34"),
    ],
    ids=["edit", "tokenizer"],
)
def test_other_models_in_qwen_images_place_are_refused(change, message):
    pipeline = tiny_qwen_image()
    change(pipeline)
    with pytest.raises(ErasureError, match=message):
        wrap(pipeline, "base")
