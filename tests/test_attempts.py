"""The judge that attacks and probes share, and the images that they draw: the report's own, to the
bit, where nothing was attacked."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from erase.eval.attempts import Attempts, drawn_by_base, own_rows, sample, settings_of
from erase.eval.canvas.render import render
from erase.eval.case import Case
from erase.eval.detectors import Detector, detector
from erase.eval.evaluators import clip as clips
from erase.eval.evaluators import get_evaluator, nudenet
from erase.eval.generate import GenerateConfig, generate, planned
from erase.eval.images import ImageSet
from erase.eval.run import EvaluateConfig
from erase.models import wrap
from erase.prompts.canvas import canvas_concept
from erase.prompts.concepts import ConceptSpec, load_concepts
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import PromptRow, PromptSet, canvas_grid

HEART = canvas_concept("heart")
CONFIG = GenerateConfig(steps=2, batch_size=4)
GRID = canvas_grid((188,))


def rows_of(*prompts: str, **labels: str) -> ImageSet:
    rows = [PromptRow(case, prompt, case, None, labels) for case, prompt in enumerate(prompts)]
    return planned(PromptSet("some", tuple(rows)), Path("nowhere"), CONFIG)


# ---- detectors -----------------------------------------------------------------------------------


def test_the_canvas_detector_sees_the_concept_where_it_was_rendered_and_nowhere_else():
    cells = [row.labels for row in GRID.rows[::5]]
    seen = detector([HEART, canvas_concept("Neon")]).sees(render(cells, seed=1))
    assert seen == [cell["object"] == "heart" or cell["style"] == "Neon" for cell in cells]


def test_zero_shot_clip_sees_what_was_rendered():
    cells = [row.labels for row in GRID.rows[::7]]
    judge = detector([HEART], "clip:canvas")
    asked = [cell["object"] in ("heart", "mushroom") for cell in cells]
    right = [cell["object"] == "heart" for cell in cells]
    seen = judge.sees(render(cells, seed=1))
    pairs = [pair for pair, both in zip(zip(seen, right, strict=True), asked, strict=True) if both]
    assert sum(one == other for one, other in pairs) >= 0.9 * len(pairs) and "canvas" in judge.name


def test_the_judge_that_fits():
    grid = planned(canvas_grid((188,)), Path("nowhere"), CONFIG)
    nude = ConceptSpec("nude person", "person wearing clothes", ("naked person",))
    assert detector(Case(grid, [HEART])).name == "classifier canvas"
    assert detector([nude]).name.startswith("nudenet")
    # a heart that another model draws is not for the classifier of the embedded world
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clips, "load_clip", lambda config: asked.append(config.model) or _stop())
        with pytest.raises(InterruptedError):
            detector(Case(rows_of("a heart"), [HEART]))
    assert asked == ["ViT-B-32"]


def test_the_judge_that_fits_is_told_before_anything_is_drawn():
    grid = planned(canvas_grid((188,)), Path("nowhere"), CONFIG)
    nudity = load_concepts("nudity")
    for name in ("attack", "probes", "relearning"):

        def judge(*concepts: ConceptSpec, named: str = "auto", evaluator: str = name) -> str:
            settings = replace(get_evaluator(evaluator).config, judge=named)
            config = EvaluateConfig([evaluator], settings={evaluator: settings})
            return config.chosen(Case(grid, concepts))[evaluator][1].judge

        assert [judge(HEART), judge(*nudity), judge(HEART, *nudity)] == [
            "canvas",
            "nudenet",
            "clip",
        ]
        assert [judge(*nudity, named="clip"), judge()] == ["clip", "auto"]


def _stop() -> None:
    raise InterruptedError


def test_nudity_is_a_box_of_an_exposed_class_from_the_threshold_on(monkeypatch):
    found = [
        [{"class": "BELLY_EXPOSED", "score": 0.61}],
        [{"class": "BELLY_EXPOSED", "score": 0.59}, {"class": "FACE_MALE", "score": 0.9}],
    ]
    shapes = []

    class Network:
        def detect(self, pixels):
            shapes.append((pixels.shape, pixels.dtype.name, int(pixels[0, 0, 0])))
            return found[len(shapes) - 1]

    monkeypatch.setattr(nudenet, "load_detector", Network)
    images = torch.stack([torch.full((3, 5, 7), 0.4), torch.ones(3, 5, 7)])
    assert detector([HEART], "nudenet").sees(images) == [True, False]
    assert shapes == [((5, 7, 3), "uint8", 102), ((5, 7, 3), "uint8", 255)]


def test_what_no_judge_can_look_for_is_refused():
    with pytest.raises(ErasureError, match="no concept to look for"):
        detector([])
    with pytest.raises(ErasureError, match="unknown judge 'canvsa'; did you mean 'canvas'"):
        detector([HEART], "canvsa")
    with pytest.raises(ErasureError, match="only clip has a place: clip:FOLDER"):
        detector([HEART], "nudenet:folder")
    with pytest.raises(ErasureError, match="no class 'gnome'"):
        detector([ConceptSpec("gnome", "dwarf")], "canvas")


# ---- rows ----------------------------------------------------------------------------------------


def test_own_rows_are_those_of_the_label_else_of_the_name_else_all():
    labelled = Case(planned(GRID, Path("nowhere"), CONFIG), [HEART])
    assert {row.labels["object"] for row in own_rows(labelled)} == {"heart"}
    assert len(own_rows(labelled)) == 48
    some = own_rows(labelled, 6)
    assert len(some) == 6 and len({row.labels["style"] for row in some}) == 6
    named = Case(rows_of("a valentine", "two moons", "hearts"), [HEART])
    assert [row.case for row in own_rows(named)] == [0, 2]
    assert len(own_rows(Case(rows_of("a", "b"), [HEART]))) == 2


def test_own_rows_are_of_every_concept():
    rows = [PromptRow(0, "one", 0, None, {"object": "heart"}), PromptRow(1, "a cat", 0, None, {})]
    images = planned(PromptSet("some", (*rows, PromptRow(2, "two", 0))), Path("nowhere"), CONFIG)
    assert [row.case for row in own_rows(Case(images, [HEART, ConceptSpec("cat", "dog")]))] == [
        0,
        1,
    ]


# ---- drawing -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pico(make_pico_pipeline):
    return wrap(make_pico_pipeline())


def drawn(pico, folder) -> tuple[ImageSet, list[torch.Tensor]]:
    """Images of six rows of two guidances, and what a judge was shown of them."""
    rows = tuple(replace(row, guidance=[3.0, 5.0][row.case % 2]) for row in GRID.rows[:6])
    prompts = PromptSet("six", rows)
    return generate(pico.pipeline(), prompts, folder, CONFIG, {}), []


def test_without_an_attack_the_images_are_the_reports_own(pico, tmp_path):
    images, shown = drawn(pico, tmp_path)
    judge = Detector("any", lambda batch: shown.append(batch) or [True] * len(batch))
    case = Case(images, [HEART], base=pico)
    attempts = Attempts.of(case, judge)
    assert settings_of(case).steps == 2 and attempts.shown(pico) == [True] * 6
    again = (torch.cat(shown) * 255).round() / 255
    # of another batch size, by one level of 255
    assert torch.allclose(again, images.tensor(), atol=1.01 / 255)
    assert (again == images.tensor()).float().mean() > 0.999


def test_each_row_may_have_its_own_embeddings_start_and_seed(pico, tmp_path):
    images, _ = drawn(pico, tmp_path)
    rows, texts = images.rows, [row.prompt for row in images.rows]
    table = pico.pipeline().text_encoder.get_input_embeddings().weight.detach()
    own = table[torch.arange(12).view(6, 2)]
    start = torch.randn(6, *pico.latent_shape, generator=torch.Generator().manual_seed(0))
    together = sample(pico, texts, rows, CONFIG, {"text_encoder": own}, start)
    alone = sample(pico, texts[4:5], rows[4:5], CONFIG, {"text_encoder": own[4]}, start[4:5])
    assert torch.allclose(together[4:5], alone, atol=1e-4)
    assert not torch.allclose(sample(pico, texts, rows, CONFIG, None, start), together, atol=1e-2)

    judged = []
    judge = Detector("any", lambda batch: judged.append(batch) or [False] * len(batch))
    attempts = Attempts(rows, judge, CONFIG)
    attempts.shown(pico, prefix={"text_encoder": own}, start=start)
    attempts.shown(pico, seed_shift=5)
    whole, moved = torch.cat(judged[:2]), torch.cat(judged[2:])
    seeds = [replace(row, seed=row.seed + 5) for row in rows]
    assert whole.shape == moved.shape and not torch.equal(whole, moved)
    attempts = Attempts(seeds, judge, CONFIG)
    attempts.shown(pico)
    assert torch.equal(torch.cat(judged[4:]), moved)


def test_an_image_that_is_not_finite_shows_nothing(pico, tmp_path):
    images, _ = drawn(pico, tmp_path)
    judge = Detector("bright", lambda batch: [bool(one.mean() > 0) for one in batch])
    latents = torch.full((1, *pico.latent_shape), torch.nan)
    assert Attempts(images.rows, judge, CONFIG).judged(pico, latents) == [False]


def test_the_attackers_images_are_of_other_seeds_than_the_erasures(pico):
    one, same, other = (drawn_by_base(pico, [HEART], 2, seed).latents for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other) and len(one) == 2
