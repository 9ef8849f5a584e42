"""Probes without a prompt: the sampler's equations by diffusers' own, and known answers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from erase.attacks.probes import (
    Inverted,
    Sampling,
    boosted_noise,
    complete,
    halves,
    inpaint,
    invert,
    redraw,
)
from erase.attacks.walk import Level, Walker, levels, start_noise
from erase.eval import inversion
from erase.eval.case import Case
from erase.eval.detectors import Detector
from erase.eval.evaluators import probes
from erase.eval.evaluators.probes import Config, _possible, check, evaluate
from erase.eval.images import ImageRow, ImageSet
from erase.models import wrap
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from tests.families import FAMILIES

CONCEPT = ConceptSpec("heart", "star", retain=("a moon", "a sun"))
PROMPTS, SEEDS, HOW = ["a heart", "a moon"], [3, 4], Sampling(steps=5, guidance=3.0)
pytestmark = pytest.mark.usefixtures("short_t5")
of_each_kind = pytest.mark.parametrize("family", ["sd1", "sd2-v", "sdxl", "sd3", "flux"])


@pytest.fixture
def model(make_pico_pipeline):
    return wrap(make_pico_pipeline())


@pytest.fixture
def latents(model):
    return torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(9))


def ordinary(model):
    """Plain sampling by the probes' sampler."""
    path = levels(model, HOW.steps)
    return Walker.under(model, PROMPTS, HOW.guidance).forwards(start_noise(model, SEEDS), path)


# ---- the sampler ---------------------------------------------------------------------------------


@of_each_kind
def test_the_parts_of_a_state_are_those_it_was_made_of(family):
    model = wrap(FAMILIES[family]())
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, *model.latent_shape, generator=generator)
    for t in (0, 500, model.timesteps - 1):
        at = torch.tensor([t])
        x, y = model.add_noise(clean, noise, at), model.target(clean, noise, at)
        level = Level.of(model, t)
        found = level.parts(x, y)
        assert torch.allclose(found[0], clean, atol=2e-4)
        assert torch.allclose(found[1], noise, atol=2e-4)
        for there in (Level(None), Level.of(model, 100)):
            own, predicted = level.step(there)
            expected = there.signal * clean + there.sigma * noise
            assert torch.allclose(own * x + predicted * y, expected, atol=2e-4)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("family", ["sd1", "sd2-v"])
def test_it_is_diffusers_ddim(family, eta):
    model = wrap(FAMILIES[family]())
    scheduler = DDIMScheduler.from_config(
        model.pipeline().scheduler.config,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
    )
    scheduler.set_timesteps(HOW.steps)
    streams = [torch.Generator().manual_seed(~seed) for seed in SEEDS]
    x, walker = start_noise(model, SEEDS), Walker.under(model, PROMPTS, HOW.guidance)
    for t in scheduler.timesteps:
        fresh = torch.stack([torch.randn(x.shape[1:], generator=one) for one in streams])
        predicted = walker.predict(x, Level.of(model, int(t)))
        x = scheduler.step(predicted, t, x, eta=eta, variance_noise=fresh).prev_sample
    assert torch.allclose(boosted_noise(model, PROMPTS, SEEDS, eta, HOW), x, atol=1e-3)
    if eta == 0:
        assert torch.allclose(ordinary(model), x, atol=1e-3)


def test_on_flow_it_is_eulers_method():
    model = wrap(FAMILIES["sd3"]())
    path = levels(model, HOW.steps)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(model.pipeline().scheduler.config)
    scheduler.set_timesteps(sigmas=[level.sigma for level in path[:-1]])
    # the pipeline's own shift is in the levels already
    scheduler.sigmas = torch.tensor([level.sigma for level in path])
    x, walker = start_noise(model, SEEDS), Walker.under(model, PROMPTS, HOW.guidance)
    for level, t in zip(path, scheduler.timesteps, strict=False):
        x = scheduler.step(walker.predict(x, level), t, x).prev_sample
    assert torch.allclose(ordinary(model), x, atol=1e-4)


def test_more_noise_than_there_is_room_for_stays_finite(model):
    plain, boosted = (boosted_noise(model, PROMPTS, SEEDS, eta, HOW) for eta in (1.0, 1.85))
    assert boosted.isfinite().all() and not torch.equal(plain, boosted)


def test_who_asks_for_all_probes_gets_those_that_a_model_has():
    flow, diffusion = wrap(FAMILIES["sd3"]()), wrap(FAMILIES["sd1"]())
    assert _possible(Config(), flow).probes == ["completion", "inpainting", "inversion"]
    assert _possible(Config(), diffusion) == Config()
    alone = Config(probes=["noise", "completion"])
    assert _possible(alone, flow) == alone


def test_boosted_noise_is_refused_for_flow():
    with pytest.raises(ErasureError, match="flow matching.*leave the probe noise out"):
        boosted_noise(wrap(FAMILIES["sd3"]()), PROMPTS, SEEDS, 1.4, HOW)


# ---- known answers -------------------------------------------------------------------------------


@of_each_kind
def test_completion_of_everything_is_ordinary_sampling_and_of_nothing_the_image(family):
    model = wrap(FAMILIES[family]())
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(9))
    whole, half, none = (
        complete(model, latents, PROMPTS, SEEDS, level, HOW) for level in (1.0, 0.6, 0.0)
    )
    assert torch.equal(whole, ordinary(model))
    assert torch.equal(none, latents)
    assert not torch.allclose(half, latents, atol=0.1)


def test_inpainting_keeps_what_it_is_told_to(model, latents):
    nothing, everything = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    drawn = inpaint(model, latents, nothing, PROMPTS, SEEDS, HOW)
    assert torch.equal(drawn, ordinary(model))
    assert torch.equal(inpaint(model, latents, everything, PROMPTS, SEEDS, HOW), latents)

    keep = halves(model, 2).expand_as(latents)
    found = inpaint(model, latents, halves(model, 2), PROMPTS, SEEDS, HOW)
    assert torch.equal(found[keep], latents[keep]) and not torch.equal(found[~keep], latents[~keep])
    assert keep[0, :, :, :4].all() and keep[1, :, :, 4:].all() and keep.float().mean() == 0.5


@of_each_kind
def test_inversion_leads_back_to_the_models_own_image(family):
    """Relative error of the latents, below 1 in 1000 with enough iterations; one alone (DDIM's own)
    is worse."""
    model = wrap(FAMILIES[family]())
    how = replace(HOW, guidance=1.0)
    path = levels(model, how.steps)
    own = Walker.under(model, PROMPTS, 1.0).forwards(start_noise(model, SEEDS), path)

    def error(iterations):
        found = invert(model, own, PROMPTS, how, iterations)
        again = redraw(model, found, PROMPTS, how)
        return float((again - own).norm() / own.norm())

    enough = error(20)
    assert enough < 1e-3 and enough <= error(1)


def test_an_enlarged_start_is_told():
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    starts = torch.cat([noise, 10 * noise])
    squares = Inverted(starts).mean_square()
    assert squares[1] == pytest.approx(100 * squares[0]) and 0.5 < squares[0] < 2


# ---- the evaluator -------------------------------------------------------------------------------


@pytest.fixture
def case(model, tmp_path, monkeypatch):
    """A heart is seen where an image is brighter at its left than at its right."""

    def sees(images):
        left, right = images.mean((1, 2)).chunk(2, dim=-1)
        return (left.mean(-1) > right.mean(-1)).tolist()

    monkeypatch.setattr(probes, "detector", lambda case, judge: Detector("left", sees))
    return make_case(model, tmp_path / "work" / "base")


def make_case(model, folder, shared=None):
    rows = [ImageRow("", i, "a heart", i, 3.0, {}, "") for i in range(3)]
    images = ImageSet(Path("nowhere"), rows, {"steps": 3, "guidance": 3.0, "batch_size": 2})
    return Case(images, [CONCEPT], base=model, folder=folder, shared=shared)


SMALL = Config(images=3, etas=[1.0, 1.85], levels=[0.7, 1.0])


def test_each_probe_has_a_share_with_its_interval_and_inversion_a_control(case, model):
    before = {name: param.detach().clone() for name, param in model.parameters().items()}
    scores = {score.name: score for score in evaluate(case, SMALL)}
    assert list(scores) == [
        "boosted noise",
        "completion of 70 %",
        "completion of 100 %",
        "inpainting",
        "CRR",
        "CRR, start found on the base",
        "inversion PSNR dB, concept",
        "inversion PSNR dB, other things",
    ]
    shares = [score for score in scores.values() if score.unit == "%"]
    assert len(shares) == 6 and all(s.n == 3 and not s.higher_is_better for s in shares)
    # of the base itself, both starts are one
    assert scores["CRR"].value == scores["CRR, start found on the base"].value
    alone = case.extras["probes"]["shown by the images alone"]
    assert set(alone) == {"whole", "half"}
    for name, param in model.parameters().items():
        assert torch.equal(param, before[name])


def test_the_same_again_in_other_batches_and_nothing_when_all_is_kept(
    case, model, tmp_path, monkeypatch
):
    whole = evaluate(case, SMALL)
    again = make_case(model, tmp_path / "work" / "base")
    with monkeypatch.context() as patched:
        patched.setattr(probes.Attempts, "judged", None)  # nothing is judged anew
        kept = evaluate(again, replace(SMALL, probes=["noise", "inpainting"]))
    assert kept == [score for score in whole if score.name in ("boosted noise", "inpainting")]
    other = make_case(model, None)
    other.images.settings["batch_size"] = 3
    assert [one.value for one in evaluate(other, SMALL)] == pytest.approx(
        [one.value for one in whole], abs=0.05
    )


def test_each_row_is_drawn_with_its_own_guidance(case, model, monkeypatch):
    rows = [
        replace(row, guidance=guidance)
        for row, guidance in zip(case.images.rows, (7.5, 3.0, 7.5), strict=True)
    ]
    images = replace(case.images, rows=rows)
    asked, judged = [], []

    def boosted(_, prompts, seeds, eta, how):
        asked.append((seeds, how.guidance))
        return torch.tensor(seeds, dtype=torch.float32)

    def shown(attempts, model, latents):
        judged.extend(latents.tolist())
        return [False] * len(latents)

    def completed(_, latents, prompts, seeds, level, how):
        asked.append(how.guidance)
        return latents[:, 0, 0, 0]

    monkeypatch.setattr(probes.probes, "boosted_noise", boosted)
    monkeypatch.setattr(probes.probes, "complete", completed)
    monkeypatch.setattr(probes.Attempts, "judged", shown)
    evaluate(Case(images, [CONCEPT], base=model), Config(probes=["noise"], images=3, etas=[1.0]))
    assert asked == [([0], 7.5), ([1], 3.0), ([2], 7.5)] and judged == [0, 1, 2]
    asked.clear()
    evaluate(Case(images, [CONCEPT], base=model), Config(probes=["completion"], images=3))
    assert asked == [7.5, 7.5]


def test_what_another_vae_showed_is_not_taken(case, model, tmp_path, make_pico_pipeline):
    config = replace(SMALL, probes=["inpainting"])
    evaluate(case, config)
    (kept,) = (tmp_path / "work" / "base").iterdir()
    model.pipeline().vae = make_pico_pipeline(7).vae
    evaluate(make_case(model, tmp_path / "work" / "base"), config)
    assert len(list(kept.parent.iterdir())) == 2


def test_what_is_of_the_base_alone_is_found_once(case, model, tmp_path, monkeypatch):
    """The starts of the base's images serve whatever is evaluated beside it."""
    inverted = []
    before = inversion.invert
    monkeypatch.setattr(inversion, "invert", lambda *given: inverted.append(1) or before(*given))
    config = replace(SMALL, probes=["inversion"])
    first = evaluate(make_case(model, tmp_path / "one", tmp_path / "shared"), config)
    assert len(inverted) == 2  # images of the concept, and of other things
    again = evaluate(make_case(model, tmp_path / "two", tmp_path / "shared"), config)
    assert again == first and len(inverted) == 3


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"probes": ["nosie"]}, "did you mean 'noise'"),
        ({"etas": [0.0]}, "probes.etas holds 0.0"),
        ({"levels": [1.5]}, "probes.levels holds 1.5"),
        ({"levels": []}, "one value or more"),
        ({"prompt": "none"}, "prompt"),
    ],
)
def test_impossible_settings_are_refused(wrong, said):
    with pytest.raises(ErasureError, match=said):
        Config(**wrong)


def test_check_refuses_what_cannot_be_probed(case, monkeypatch):
    with pytest.raises(ErasureError, match="needs the model"):
        check(Case(case.images, [CONCEPT]), SMALL)
    flow = Case(case.images, [CONCEPT], base=wrap(FAMILIES["sd3"]()))
    with pytest.raises(ErasureError, match="leave the probe noise out"):
        check(flow, replace(SMALL, probes=["noise", "completion"]))
    check(flow, SMALL)
    with pytest.raises(ErasureError, match="probes.levels holds 0.001, .* not one"):
        check(flow, replace(SMALL, probes=["completion"], levels=[0.5, 0.001]))
    bare = Case(case.images, [ConceptSpec("heart", "star")], base=flow._base)
    with pytest.raises(ErasureError, match="leave inversion out"):
        check(bare, replace(SMALL, probes=["inversion"]))
