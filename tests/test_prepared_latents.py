"""The latents that a run trains on: shared among concepts, mixed with the anchor's, made from
images, and kept in a cache."""

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch

from erase.latents.prepare import LatentSet, prepare_latents
from erase.latents.sampling import sample_points
from erase.mask import SaliencyMask
from erase.models import load_model, wrap
from erase.prompts.canvas import canvas_concept
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.run import EraseConfig, erase_concept
from erase.task import Task, describe
from erase.tensors import sha256_of
from tests.run_fixtures import DATA, METHOD
from tests.run_fixtures import base as base
from tests.run_fixtures import erased as erased


def test_several_concepts_share_the_data_evenly_and_keep_what_neither_names(base):
    model = load_model(str(base))
    concepts = [canvas_concept("heart"), canvas_concept("Neon")]
    forget, retain = prepare_latents(model, concepts, DATA, 0)
    named = [("heart" in p or "valentine" in p) for p in forget.prompts]
    assert len(forget) == 6 and 3 <= sum(named) <= 6
    words = ("heart", "valentine", "neon", "glowing")
    kept = [*retain.prompts, *forget.anchors]
    assert not any(word in prompt.lower() for prompt in kept for word in words)
    assert all(a != p for a, p in zip(forget.anchors, forget.prompts, strict=True))


def test_a_share_of_the_forget_latents_shows_the_anchor(base):
    model, spec = load_model(str(base)), [canvas_concept("heart")]
    plain, _ = prepare_latents(model, spec, DATA, 0)
    mixed, _ = prepare_latents(model, spec, DATA, 0, None, 0.5)
    assert plain.shows_anchor is None and mixed.shows_anchor.tolist() == [False] * 3 + [True] * 3
    assert mixed.prompts == plain.prompts and mixed.anchors == plain.anchors
    assert torch.allclose(mixed.latents[:3], plain.latents[:3], atol=1e-5)
    shown = model.sample(
        [*mixed.prompts[:3], *mixed.anchors[3:]][:4], [0, 1, 2, 3], DATA.steps, DATA.guidance
    )
    assert torch.allclose(mixed.latents[3], shown[3], atol=1e-5) and not torch.allclose(
        plain.latents[3], shown[3], atol=1e-3
    )


def test_latents_from_images_and_their_cache(base, tmp_path, monkeypatch):
    from PIL import Image

    model = load_model(str(base))
    for i in range(3):
        Image.fromarray(np.full((40, 60, 3), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
    config = replace(DATA, forget_images=str(tmp_path))
    forget, _ = prepare_latents(model, [canvas_concept("heart")], config, 0, tmp_path / "cache")
    assert forget.std is not None and forget.latents.shape == (6, 4, 8, 8)
    assert torch.equal(forget.latents[0], forget.latents[3])  # three files, taken in turn
    found = [LatentSet.load(path) for path in (tmp_path / "cache").glob("forget*")]
    assert (
        len(found) == 1
        and torch.equal(found[0].latents, forget.latents)
        and found[0].anchors == forget.anchors
    )
    draws = [forget.draw(torch.tensor([0]), torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    Image.new("RGB", (40, 60), "red").save(tmp_path / "3.bmp")
    before, _ = prepare_latents(model, [canvas_concept("heart")], config, 0, tmp_path / "cache")
    # as many bytes, under the same name
    Image.new("RGB", (40, 60), "blue").save(tmp_path / "3.bmp")
    after, _ = prepare_latents(model, [canvas_concept("heart")], config, 0, tmp_path / "cache")
    assert torch.equal(before.latents[2], after.latents[2]) and not torch.equal(
        before.latents[3], after.latents[3]
    )
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(ErasureError, match=r"cannot read the image .*1\.png"):
        prepare_latents(model, [canvas_concept("heart")], config, 1)
    # refused before anything is sampled
    monkeypatch.setattr("erase.latents.prepare.sample_points", None)
    with pytest.raises(ErasureError, match="no images"):
        prepare_latents(
            model,
            [canvas_concept("heart")],
            replace(DATA, retain_images=str(tmp_path / "nowhere")),
            0,
        )


# ---- a cache that runs share ---------------------------------------------------------------------


def shared(base, cache):
    return EraseConfig(model=str(base), latents=replace(DATA, cache=str(cache)))


def calls_of(monkeypatch, place):
    """How often the function at a place is called from here on: one word in the list for each."""
    module, name = place.rsplit(".", 1)
    real, calls = getattr(import_module(module), name), []

    def counted(*args, **named):
        calls.append(name)
        return real(*args, **named)

    monkeypatch.setattr(place, counted)
    return calls


def test_runs_with_a_cache_in_common_make_its_latents_once_and_the_same_delta(
    base, erased, tmp_path, monkeypatch
):
    concept, config = canvas_concept("heart"), shared(base, tmp_path / "cache")
    made = calls_of(monkeypatch, "erase.latents.prepare.sample_points")
    first = erase_concept(concept, config, METHOD, out=tmp_path / "first")
    assert len(made) == 2, "forget and retain"
    faster = replace(METHOD, train=replace(METHOD.train, lr=2e-3))
    other = erase_concept(concept, config, faster, out=tmp_path / "other")
    assert len(made) == 2 and other.sha256 != first.sha256
    assert not (tmp_path / "first" / "latents").exists()

    # where latents are kept is no part of the result: the same file, byte for byte
    for name in ("delta", "mask", "saliency"):
        own, common = (folder / f"{name}.safetensors" for folder in (erased, tmp_path / "first"))
        assert own.read_bytes() == common.read_bytes(), name
    # and a run goes on whichever cache it is given
    again = erase_concept(
        concept, EraseConfig(model=str(base), latents=DATA), METHOD, out=tmp_path / "first"
    )
    assert again.sha256 == first.sha256 and len(made) == 2


@pytest.mark.parametrize("trajectory", [0, 2])
def test_retain_images_may_have_a_guidance_of_their_own(base, tmp_path, monkeypatch, trajectory):
    pico = load_model(str(base))
    concepts, config = [canvas_concept("heart")], replace(DATA, trajectory=trajectory)
    forget, retain = prepare_latents(pico, concepts, config, 0, tmp_path)
    made = calls_of(monkeypatch, "erase.latents.prepare.sample_points")
    unguided = replace(config, retain_guidance=1.0)
    same, other = prepare_latents(pico, concepts, unguided, 0, tmp_path)
    assert len(made) == 1 and torch.equal(same.latents, forget.latents)
    assert other.prompts == retain.prompts
    seeds, prompts = range(500_000, 500_000 + DATA.n_retain), other.prompts[:: max(1, trajectory)]
    drawn = pico.sample(list(prompts), list(seeds), DATA.steps, 1.0)
    assert torch.allclose(other.latents[:: max(1, trajectory)], drawn, atol=1e-5)
    assert not torch.allclose(other.latents, retain.latents, atol=1e-2)
    named = replace(config, retain_guidance=config.guidance)
    assert torch.equal(
        prepare_latents(pico, concepts, named, 0, tmp_path)[1].latents, retain.latents
    )
    assert len(made) == 1  # the same latents, by whatever option


def test_a_density_sweep_computes_neither_latents_nor_gradients_twice(base, tmp_path, monkeypatch):
    """The loop of docs/sweeps.md."""
    concept, config = canvas_concept("heart"), shared(base, tmp_path / "cache")
    erase_concept(concept, config, METHOD, out=tmp_path / "first")
    for place in (
        "erase.latents.prepare.sample_points",
        "erase.training.saliency.compute_statistics",
    ):
        monkeypatch.setattr(place, None)
    statistics = str(tmp_path / "first" / "saliency.safetensors")
    for density in (0.1, 0.5):
        mask = replace(METHOD.mask, density=density, saliency=statistics)
        out = tmp_path / str(density)
        erase_concept(concept, config, replace(METHOD, mask=mask), out=out)
        cut = SaliencyMask.load(out / "mask.safetensors")
        assert cut.count() == int(density * cut.size)
    # to cut given statistics, and to compute them, is one mask
    assert cut.sha256 == SaliencyMask.load(tmp_path / "first" / "mask.safetensors").sha256


def test_what_another_run_needs_otherwise_is_another_file_of_the_cache(base, tmp_path):
    model, concepts = load_model(str(base)), [canvas_concept("heart")]
    cache = tmp_path / "cache"
    sets = [
        prepare_latents(model, concepts, config, seed, cache)[0]
        for config, seed in ((DATA, 0), (DATA, 1), (replace(DATA, steps=3), 0))
    ]
    assert len(list(cache.glob("forget-*.safetensors"))) == 3
    assert not torch.equal(sets[0].latents, sets[1].latents)
    assert not torch.equal(sets[0].latents, sets[2].latents)
    model.pipeline().vae.register_to_config(scaling_factor=0.5)
    prepare_latents(model, concepts, DATA, 0, cache)
    assert len(list(cache.glob("forget-*.safetensors"))) == 4


def test_two_runs_that_fill_a_cache_at_once_leave_it_whole(base, tmp_path, monkeypatch):
    """One run makes and writes all of it while the other is still sampling: either's is the same,
    and neither ever reads half of the other's."""
    model, concepts, cache = load_model(str(base)), [canvas_concept("heart")], tmp_path / "cache"
    alone = prepare_latents(model, concepts, DATA, 0)
    real, inner = sample_points, []

    def overtaken(*args, **named):
        if not inner:
            inner.append(None)
            inner[0] = prepare_latents(model, concepts, DATA, 0, cache)
        return real(*args, **named)

    monkeypatch.setattr("erase.latents.prepare.sample_points", overtaken)
    outer = prepare_latents(model, concepts, DATA, 0, cache)
    monkeypatch.setattr("erase.latents.prepare.sample_points", None)
    found = prepare_latents(model, concepts, DATA, 0, cache)
    for sets in zip(alone, inner[0], outer, found, strict=True):
        assert len({sha256_of(vars(each)) for each in sets}) == 1
    assert len(list(cache.iterdir())) == 2, "one file a set, and nothing unfinished"


@pytest.mark.parametrize(("cache", "words"), [(" ", "latents.cache is empty"), ("f", "a file")])
def test_a_cache_that_cannot_be_is_refused(cache, words, base, tmp_path):
    (tmp_path / "f").touch()
    with pytest.raises(ErasureError, match=words):
        latents = replace(DATA, cache=cache.strip() and str(tmp_path / cache) or cache)
        erase_concept(
            canvas_concept("heart"), EraseConfig(model=str(base), latents=latents), METHOD
        )


def test_latents_are_asked_for_as_they_were_last(make_pico_pipeline):
    task = Task(wrap(make_pico_pipeline()), [ConceptSpec("heart", "mushroom")], DATA)
    half, none = task.forget(0.5), task.forget(0.0)
    assert task.forget() is none and task.forget(0.5) is half
    assert task.forget() is half and describe(task)["forget"] == sha256_of(vars(half))


def test_latents_that_are_not_finite_name_the_settings_that_may_be_why(
    make_pico_pipeline, monkeypatch
):
    model = wrap(make_pico_pipeline())
    beyond = torch.full((1, *model.latent_shape), torch.inf)
    monkeypatch.setattr(model, "sample", lambda *asked: beyond)
    settings = {"steps": 1, "guidance": 3.0, "trajectory": 0, "precision": "bf16"}
    with pytest.raises(ErasureError, match=r"latents.guidance 3 .* latents.mixed_precision bf16"):
        sample_points(model, ("a heart",), 0, **settings, batch_size=1, what="forget")
