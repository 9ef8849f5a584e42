"""The latents that a run trains on: shared among concepts, mixed with the anchor's, made from
images, and kept in a cache."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from erase.latents.prepare import LatentSet, prepare_latents
from erase.models import load_model
from erase.prompts.canvas import canvas_concept
from erase.prompts.errors import ErasureError
from tests.run_fixtures import DATA
from tests.run_fixtures import base as base


def test_several_concepts_share_the_data_evenly_and_keep_what_neither_names(base):
    model = load_model(str(base))
    concepts = [canvas_concept("heart"), canvas_concept("Neon")]
    forget, retain = prepare_latents(model, concepts, DATA, 0)
    named = [("heart" in p or "valentine" in p) for p in forget.prompts]
    assert len(forget) == 6 and 3 <= sum(named) <= 6
    words = ("heart", "valentine", "neon", "glowing")
    assert not any(word in prompt.lower() for prompt in retain.prompts for word in words)
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
