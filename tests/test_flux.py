"""FLUX.1, where it is unlike the other families: patches, the guidance that is an input, the shift
by the image's size; and what every method makes of it."""

from __future__ import annotations

from dataclasses import replace
from math import exp

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

from erase.eval.generate_config import GenerateConfig
from erase.eval.sampling import prepared
from erase.latents.config import LatentConfig
from erase.latents.latent_set import Given
from erase.latents.prepare import prepare_latents
from erase.methods import METHODS, get_method
from erase.models import wrap
from erase.models.patches import pack, positions, unpack
from erase.models.scopes import select
from erase.prompts.errors import ErasureError
from erase.task import Task
from tests.families import tiny_flux
from tests.test_methods import CONCEPT, quick

BY_UNETS_ALONE = ("forget-me-not", "mace", "speed")
"""methods that ask for a projection of the text states themselves, or for cross-attention"""


@pytest.fixture(params=[True, False], ids=["dev", "schnell"])
def pipeline(request):
    return tiny_flux(guidance=request.param)


def seen(model, use):
    """What the transformer is given, call by call, while `use` runs."""
    calls = []
    handle = model.component("transformer").register_forward_pre_hook(
        lambda _, args, given: calls.append(given), with_kwargs=True
    )
    use()
    handle.remove()
    return calls


def edit(model, name):
    task = Task(model, [CONCEPT], LatentConfig(n_forget=6, n_retain=6, steps=2), 0)
    config = quick(name)
    if hasattr(config, "ceiling"):  # random weights err by more than it
        config = replace(config, ceiling=100.0)
    return get_method(name).edit(task, config)


# ---- methods ----


@pytest.mark.usefixtures("short_t5")
@pytest.mark.parametrize("name", METHODS)
def test_every_method_erases_or_says_why_it_cannot(name):
    model = wrap(tiny_flux(), "flux")
    before = {key: param.detach().clone() for key, param in model.parameters().items()}
    if name in BY_UNETS_ALONE:
        with pytest.raises(ErasureError, match="UNet|matches none"):
            edit(model, name)
    else:
        found = edit(model, name)
        assert set(found.values) <= set(select(model.parameters(), quick(name).scope))
        assert any(not torch.equal(value, before[key]) for key, value in found.values.items())
        again = edit(model, name)
        assert all(torch.equal(again.values[key], value) for key, value in found.values.items())
    assert all(torch.equal(p, before[key]) for key, p in model.parameters().items())


@pytest.mark.usefixtures("short_t5")
@pytest.mark.parametrize("name", ["esd", "salun-half"])
def test_methods_ask_for_predictions_without_guidance_in_all_branches(name, pipeline):
    model = wrap(pipeline, "flux")
    few = LatentConfig(n_forget=4, n_retain=2, steps=1)
    sets = prepare_latents(model, [CONCEPT], few, 0, anchor_share=0.5)  # drawn with guidance
    task = Task(model, [CONCEPT], Given(*sets))
    calls = seen(model, lambda: get_method(name).edit(task, quick(name)))
    if pipeline.transformer.config.guidance_embeds:
        assert torch.cat([call["guidance"] for call in calls]).unique().tolist() == [1.0]
    else:
        assert {call["guidance"] for call in calls} == {None}


# ---- guidance ----


def test_images_are_drawn_at_the_guidance_that_is_asked_for_in_one_pass(pipeline):
    model, drawn = wrap(pipeline), {}
    for guidance in (1.0, 3.5):
        calls = seen(
            model, lambda g=guidance: drawn.update({g: model.sample(["a moon"], [1], 2, g)})
        )
        assert len(calls) == 2
    assert torch.equal(drawn[1.0], drawn[3.5]) != pipeline.transformer.config.guidance_embeds


# ---- the schedule ----


def test_noise_levels_are_the_samplers(pipeline):
    model = wrap(pipeline)
    _, _, t = model.trajectory(["a moon"], [1], 8, 1.0)
    pipeline("a moon", num_inference_steps=8, output_type="latent")
    assert torch.allclose(model.sigma(t), pipeline.scheduler.sigmas[:-1], atol=1e-3)
    every = torch.arange(model.timesteps)
    assert torch.equal(model.timestep(model.sigma(every) * model.timesteps), every)


def test_dev_at_its_own_resolution_has_the_shift_that_its_configuration_says():
    pipeline = tiny_flux()
    pipeline.vae.register_to_config(sample_size=1024)
    assert wrap(pipeline).shift() == pytest.approx(exp(1.15))
    pipeline.vae.register_to_config(sample_size=256)
    assert wrap(pipeline).shift() == pytest.approx(exp(0.5))
    pipeline.scheduler.register_to_config(time_shift_type="linear")
    assert wrap(pipeline).shift() == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["dpm++", "euler"])
def test_every_scheduler_is_told_the_checkpoints_shift(name, pipeline):
    own = pipeline.scheduler.config
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(own, base_shift=0.3)
    model, pipe = wrap(pipeline), prepared(pipeline, GenerateConfig(scheduler=name, steps=5))
    pipe("a moon", num_inference_steps=5, output_type="latent")
    linear = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2])
    shift = model.shift()
    expected = shift * linear / (1 + (shift - 1) * linear)
    assert torch.allclose(pipe.scheduler.sigmas[:-1].float(), expected, atol=2e-3)
    assert pipeline.scheduler.config.use_dynamic_shifting == (shift != 1)  # as it was


def test_a_shift_that_another_scheduler_cannot_follow_is_refused():
    pipeline = tiny_flux()
    pipeline.scheduler.register_to_config(time_shift_type="linear")
    with pytest.raises(ErasureError, match="time_shift_type 'linear'; use euler"):
        prepared(pipeline, GenerateConfig(scheduler="dpm++"))


# ---- patches ----


def test_patches_are_the_stock_pipelines():
    latents = torch.randn(2, 16, 6, 10)
    patches = pack(latents)
    assert torch.equal(patches, FluxPipeline._pack_latents(latents, 2, 16, 6, 10))
    assert torch.equal(unpack(patches, 6, 10), latents)
    ids = FluxPipeline._prepare_latent_image_ids(1, 3, 5, torch.device("cpu"), torch.float32)
    assert torch.equal(positions(6, 10), ids)


def test_images_of_broken_patches_are_refused_before_the_first():
    pipeline = tiny_flux()
    with pytest.raises(ErasureError, match="images of 72 pixels .* multiple of 16"):
        prepared(pipeline, GenerateConfig(resolution=72))
    with pytest.raises(ErasureError, match="multiple of 16"):
        wrap(pipeline).sample(["a moon"], [1], 1, 1.0, size=72)
    pipeline.vae.register_to_config(sample_size=72)
    with pytest.raises(ErasureError, match="sample_size 72, which patches"):
        wrap(pipeline, "x")


def test_a_vae_that_tells_no_size_leaves_that_of_the_stock_pipeline():
    pipeline = tiny_flux()
    stated = {key: value for key, value in pipeline.vae.config.items() if key != "sample_size"}
    pipeline.vae = AutoencoderKL.from_config(stated)
    pipeline.default_sample_size = 128
    assert (wrap(pipeline).image_size, wrap(pipeline).shift()) == (1024, pytest.approx(exp(1.15)))


def test_models_that_take_more_than_noise_are_refused():
    pipeline = tiny_flux()
    pipeline.transformer.register_to_config(in_channels=384)
    with pytest.raises(ErasureError, match="takes 384 channels .* filling, depth or edge model"):
        wrap(pipeline, "x")


def test_an_image_is_encoded_as_it_is_decoded(pipeline):
    """Latents are (z - shift) * scale, of the VAE's z."""
    model, images = wrap(pipeline), torch.rand(2, 3, 64, 64) * 2 - 1
    mean, std = model.encode_images(images)
    posterior = pipeline.vae.encode(images).latent_dist
    assert torch.allclose(mean, (posterior.mean - 0.1159) * 0.3611)
    assert torch.allclose(std, posterior.std * 0.3611)
