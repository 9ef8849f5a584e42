"""Training latents that the model makes itself, and the states on the way to them."""

from dataclasses import replace

import pytest
import torch

from erase.latents.config import LatentConfig
from erase.latents.latent_set import Given, LatentSet
from erase.latents.prepare import prepare_latents
from erase.latents.sampling import choose_states
from erase.methods import get_method
from erase.methods.salun import SalUnHalfConfig
from erase.models import wrap
from erase.models.pipelines import denoiser, stock
from erase.objectives.remap import Remap
from erase.prompts.canvas import canvas_concept
from erase.task import Task
from erase.training.config import MaskConfig, TrainConfig
from erase.training.trainable import Trainable
from tests.families import FAMILIES

DATA = LatentConfig(n_forget=4, n_retain=5, steps=4, batch_size=3, trajectory=3)
CONFIG = SalUnHalfConfig(
    mask=MaskConfig(batch_size=4), train=TrainConfig(steps=3, batch_size=4, lr=1e-3)
)


@pytest.fixture(params=FAMILIES)
def pipeline(request):
    return FAMILIES[request.param]()


@pytest.fixture
def pico(make_pico_pipeline):
    return wrap(make_pico_pipeline())


def test_a_trajectory_is_what_the_stock_pipeline_passes_through(pipeline):
    """Of every family: its denoiser is shown exactly the states that the noise and the timesteps
    give back."""
    model, shown = wrap(pipeline), []
    pipeline.scheduler = model.sampler()
    net = denoiser(pipeline)
    handle = net.register_forward_hook(
        lambda _, args, kwargs, out: shown.append(
            kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        ),
        with_kwargs=True,
    )
    cond, null = model.encode(["a red house", "a moon"]), model.encode(["", ""])
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    given = {
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "generator": generators,
        "output_type": "latent",
    }
    finished = pipeline(**stock(pipeline).arguments(cond, null), **given).images
    handle.remove()
    finished, *shown = (stock(pipeline).given(latents, 8) for latents in (finished, *shown))
    latents, noise, t = model.trajectory(["a red house", "a moon"], [3, 4], 3, 4.0)
    assert torch.equal(latents, finished) and torch.equal(
        latents, model.sample(["a red house", "a moon"], [3, 4], 3, 4.0)
    )
    assert len(shown) == len(t) == len(noise) == 3 and (t.diff() < 0).all()
    for state, seen, step in zip(noise, shown, t, strict=True):
        assert torch.allclose(model.add_noise(latents, state, step.expand(2)), seen[:2], atol=1e-4)
    if not hasattr(pipeline, "transformer"):
        assert torch.equal(t, pipeline.scheduler.timesteps.long())


def test_states_are_spread_over_the_trajectory_and_keep_their_timesteps():
    noise = torch.arange(10.0)[:, None, None, None, None].expand(10, 500, 1, 1, 1)
    t = torch.arange(901, 0, -100)
    chosen, at = choose_states(noise, t, 5, 0, 1000)
    states = chosen.view(500, 5).long()
    assert ((at.view(500, 5) // 200) == torch.arange(5)).all()  # one of every fifth, in order
    high, low = torch.cat([torch.tensor([999]), t[1:]]), torch.cat([t[1:] + 1, torch.tensor([0])])
    assert (
        (at.view(500, 5) >= low[states]) & (at.view(500, 5) <= torch.maximum(high, t)[states])
    ).all()
    assert at.max() > 985 and at.min() < 10  # both ends are trained on
    assert torch.equal(at, choose_states(noise, t, 5, 0, 1000)[1])


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_states_follow_the_law_of_the_timesteps_that_training_draws(power):
    noise = torch.arange(4.0)[:, None, None, None, None].expand(4, 4000, 1, 1, 1)
    chosen, at = choose_states(noise, torch.tensor([900, 600, 300, 0]), 2, 0, 1000, power)
    for t in (100, 301, 601, 900):
        share = float((at < t).double().mean())
        assert share == pytest.approx((t / 1000) ** power, abs=0.02)
    assert torch.equal(
        chosen.flatten().long(), 3 - (at[:, None] > torch.tensor([0, 300, 600])).sum(-1)
    )


@pytest.fixture
def sets(pico):
    return prepare_latents(pico, [canvas_concept("heart")], DATA, 0, anchor_share=0.5)


def test_each_image_gives_its_points(pico, sets, tmp_path):
    forget, retain = sets
    assert (len(forget), len(retain)) == (12, 15)
    assert forget.shows_anchor.tolist() == [False] * 6 + [True] * 6
    assert forget.prompts[:3] == forget.prompts[:1] * 3 and len(forget.anchors) == 12
    assert torch.equal(forget.latents[0], forget.latents[2]) and not torch.equal(
        forget.latents[0], forget.latents[3]
    )
    plain, _ = prepare_latents(
        pico, [canvas_concept("heart")], replace(DATA, trajectory=0), 0, anchor_share=0.5
    )
    assert torch.equal(plain.latents, forget.latents[::3]) and plain.t is None
    assert forget.concept_rows().tolist() == [0, 4] and plain.concept_rows().tolist() == [0, 1]
    rows = torch.tensor([5, 1])
    t, noise = forget.draw_noise(rows, pico.timesteps, torch.Generator())
    assert torch.equal(t, forget.t[rows]) and torch.equal(noise, forget.noise[rows])
    forget.save(tmp_path / "set.safetensors", {})
    again = LatentSet.load(tmp_path / "set.safetensors")
    columns = ("latents", "shows_anchor", "image", "noise", "t")
    assert all(torch.equal(getattr(again, name), getattr(forget, name)) for name in columns)
    assert again.image.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_there_are_no_more_points_than_states(pico):
    forget, _ = prepare_latents(pico, [canvas_concept("heart")], replace(DATA, trajectory=9), 0)
    assert (
        len(forget) == DATA.n_forget * DATA.steps
        and len(forget.t[: DATA.steps].unique()) == DATA.steps
    )


def task_of(pico, sets, config=CONFIG):
    return Remap(Task(pico, [canvas_concept("heart")], Given(*sets)), config)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_targets_known_beforehand_are_those_of_the_frozen_base(pico, sets, dropout, monkeypatch):
    config = replace(CONFIG, retain_dropout=dropout)
    known, asking = task_of(pico, sets, config), task_of(pico, sets, config)
    base = Trainable(pico.parameters("unet")).base
    given = [known.loss(known.batches(step), base) for step in range(CONFIG.train.steps)]

    monkeypatch.setattr("erase.objectives.remap._fixed", lambda points: False)
    for step, terms in enumerate(given):
        asked = asking.loss(asking.batches(step), base)
        assert asked["forget"] > 0
        for name, term in terms.items():
            assert torch.allclose(asked[name], term, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("change", [{"anchor_from": "current"}, {"retain_target": "noise"}])
def test_targets_that_move_or_are_noise_are_not_computed_beforehand(pico, sets, change):
    remap = task_of(pico, sets, replace(CONFIG, **change))
    remap.loss(remap.batches(0), Trainable(pico.parameters("unet")).base)
    assert remap._known is None


def test_an_erasure_from_trajectories_asks_the_base_no_more(pico, sets):
    """The denoiser sees forget and retain rows of each step, and nothing else once the targets are
    there."""
    calls = []
    handle = pico.component("unet").register_forward_hook(
        lambda _, args, out: calls.append(len(out.sample))
    )
    edit = get_method("salun-half").edit(
        Task(pico, [canvas_concept("heart")], Given(*sets)), CONFIG
    )
    handle.remove()
    saliency, targets = [4], [12, 12]  # of 15 retained points three steps see twelve
    assert calls == [*saliency, *targets, *[8] * CONFIG.train.steps]
    assert any(not torch.equal(edit.values[name], p) for name, p in pico.parameters("unet").items())
