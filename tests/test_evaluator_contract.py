"""What every evaluator of the index must keep, ours and a fourth, added as CONTRIBUTING says."""

from __future__ import annotations

import importlib
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from erase.eval.canvas.render import render
from erase.eval.case import Case
from erase.eval.evaluators import EVALUATORS, Evaluator, clip_model, get_evaluator
from erase.eval.images import ImageRow, ImageSet, save_image, write_manifest, write_settings
from erase.eval.run import EvaluateConfig, score
from erase.files import file_sha256
from erase.parallel.processes import in_shares
from erase.prompts.canvas import KINDS, canvas_concept
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import PromptRow, canvas_grid
from tests.backbones import write_alexnet

FOURTH = "brightness"
NAMES = [*EVALUATORS.ours, FOURTH]
# those that judge the images of the report; the others draw their own
OF_IMAGES = [name for name in NAMES if name == FOURTH or not get_evaluator(name).needs_model]
CONCEPTS = [canvas_concept("heart")]
# 19: every object, two hearts among them, each of another style and colour
ROWS = canvas_grid(seeds=(0,)).rows[::26]
OF_RETAINED = ("cmmd", "drift", "fid", "lpips")
"""those that look only at prompts which ask for no forgotten concept"""
every_evaluator = pytest.mark.parametrize("name", NAMES)
every_judge = pytest.mark.parametrize("name", OF_IMAGES)


@pytest.fixture(autouse=True)
def fourth(tmp_path_factory, monkeypatch) -> Iterator[None]:
    """One file and one line in the index."""
    folder = tmp_path_factory.mktemp("evaluators")
    shutil.copy(Path(__file__).parent / "plugin_evaluator.py", folder / "brightness.py")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(EVALUATORS.ours, FOURTH, "brightness:BRIGHTNESS")
    yield
    sys.modules.pop("brightness", None)


def drawn(folder: Path, rows: tuple[PromptRow, ...], seed: int = 0) -> ImageSet:
    """Renders of what the prompts say."""
    pixels = (
        (render([row.labels for row in rows], seed=seed) * 255)
        .round()
        .byte()
        .permute(0, 2, 3, 1)
        .numpy()
    )
    made = []
    for row, image in zip(rows, pixels, strict=True):
        file = folder / f"{row.case:05d}.png"
        save_image(file, image, {})
        made.append(
            ImageRow(
                file.name, row.case, row.prompt, row.seed, 5.0, row.labels, file_sha256(file) or ""
            )
        )
    write_settings(folder, {"images": len(made)})
    write_manifest(folder, made)
    return ImageSet.open(folder)


@pytest.fixture(autouse=True)
def trunk(tmp_path_factory, monkeypatch) -> None:
    """LPIPS's trunk in torch's cache, as torchvision publishes it, with random weights; no
    network."""
    home = tmp_path_factory.getbasetemp() / "torch"
    monkeypatch.setenv("TORCH_HOME", str(home))
    if not home.exists():
        write_alexnet(home / "hub/checkpoints/alexnet-owt-7be5be79.pth")
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)


def no_network(*_: object, **__: object) -> None:
    raise OSError("no network")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageSet:
    return drawn(tmp_path_factory.mktemp("images"), ROWS)


def scores_of(name: str, case: Case, **settings: Any) -> list[Any]:
    evaluator = get_evaluator(name)
    return evaluator.evaluate(case, replace(evaluator.config, **settings))


# ---- scores --------------------------------------------------------------------------------------


@every_judge
def test_every_score_has_a_direction_n_an_interval_and_says_what_measured_it(
    name: str, images: ImageSet
) -> None:
    scores = score(images, CONCEPTS, [name])
    assert scores and len({one.name for one in scores}) == len(scores)
    for one in scores:
        assert type(one.higher_is_better) is bool and 1 <= one.n <= len(images.rows) * len(KINDS)
        assert math.isfinite(one.low) and one.low <= one.value <= one.high < math.inf, one
        assert one.evaluator and one.unit in ("%", "", "boxes", "dB")


@every_judge
def test_no_score_depends_on_how_many_images_are_judged_at_once(
    name: str, images: ImageSet, monkeypatch
) -> None:
    """Neither on its batches nor on the shares of several processes: sizes 3 and 100."""
    evaluator = get_evaluator(name)
    own = importlib.import_module(type(evaluator.config).__module__)
    # a CLIP is looked through in its own room, whoever asks
    rooms = [room for room in (own, clip_model) if hasattr(room, "in_shares")]
    shares: list[int] = []

    def judged(size: int) -> list[Any]:
        def resized(count: int, _: int, *rest: Any) -> list[Any]:
            shares.append(count)
            return in_shares(count, size, *rest)

        for room in rooms:
            monkeypatch.setattr(room, "in_shares", resized)
        batched = "batch_size" in {field.name for field in fields(evaluator.config)}
        return scores_of(name, Case(images, CONCEPTS), **({"batch_size": size} if batched else {}))

    few, all_at_once = judged(3), judged(100)
    retained = sum(row.labels["object"] != "heart" for row in images.rows)
    looked_at = retained if name in OF_RETAINED else len(images.rows)
    assert shares == [looked_at] * 2, "images are looked at through in_shares, once"
    assert [(one.name, one.n) for one in few] == [(one.name, one.n) for one in all_at_once]
    assert [one.value for one in few] == pytest.approx([one.value for one in all_at_once], abs=1e-4)


@every_judge
def test_the_same_images_have_the_same_scores_whatever_was_judged_before(
    name: str, images: ImageSet
) -> None:
    some, others = (replace(images, rows=images.rows[start:6]) for start in (0, 3))
    first = scores_of(name, Case(some, CONCEPTS))
    scores_of(name, Case(others))
    assert scores_of(name, Case(some, CONCEPTS)) == first


# ---- check ---------------------------------------------------------------------------------------


def relabelled(
    change: Callable[[int, dict[str, str]], dict[str, str]],
) -> Callable[[ImageSet], ImageSet]:
    def build(images: ImageSet) -> ImageSet:
        rows = [
            replace(row, labels=change(i, dict(row.labels))) for i, row in enumerate(images.rows)
        ]
        return replace(images, rows=rows)

    return build


def hearts(images: ImageSet) -> ImageSet:
    return replace(images, rows=[row for row in images.rows if row.labels["object"] == "heart"])


def darkened(images: ImageSet) -> ImageSet:
    return replace(
        images, rows=[replace(row, prompt=f"a dark {row.prompt}") for row in images.rows]
    )


BAD = {
    "no labels": (relabelled(lambda i, labels: {}), CONCEPTS),
    "one image without labels": (relabelled(lambda i, labels: labels if i else {}), CONCEPTS),
    "an empty label": (
        relabelled(lambda i, labels: labels if i else labels | {"style": ""}),
        CONCEPTS,
    ),
    "a label that no judge knows": (
        relabelled(lambda i, labels: labels if i else labels | {"object": "haert"}),
        CONCEPTS,
    ),
    "a concept that no prompt names": (
        lambda images: images,
        [ConceptSpec("gnome", "dwarf", kind="object")],
    ),
    "a concept of a kind that no label has": (
        lambda images: images,
        [ConceptSpec("Monet", "a painter", kind="artist")],
    ),
    "nothing that was kept": (hearts, CONCEPTS),
    "a prompt that it says it cannot judge": (darkened, CONCEPTS),
}
# how many of them; an evaluator that is not listed may refuse any
# fid: without labels of canvas alone, Inception is asked for, and nothing can be fetched here
REFUSED = {"classifier": 7, "clip": 7, "nudenet": 0, "opennsfw": 0, "q16_type": 0, FOURTH: 1}
REFUSED |= {"cmmd": 1, "drift": 1, "lpips": 1, "fid": 4}


def refusal(judge: Callable[[Case, Any], object], case: Case, config: Any) -> str | None:
    try:
        judge(case, config)
    except ErasureError as error:
        return str(error)
    return None


@every_judge
def test_check_refuses_what_evaluate_could_not_judge_and_needs_no_image_for_it(
    name, images, tmp_path
) -> None:
    evaluator, refused = get_evaluator(name), 0
    images = replace(images, rows=images.rows[::3])
    for change, concepts in BAD.values():
        some = change(images)
        after = refusal(evaluator.evaluate, Case(some, concepts), evaluator.config)
        before = refusal(
            evaluator.check,
            Case(replace(some, folder=tmp_path / "nothing"), concepts),
            evaluator.config,
        )
        if after:
            assert before == after.replace(str(images.folder), str(tmp_path / "nothing"))
        refused += before is not None
    assert refused == REFUSED.get(name, refused)


@every_judge
def test_check_lets_pass_what_evaluate_judges(name: str, images: ImageSet, tmp_path: Path) -> None:
    evaluator = get_evaluator(name)
    evaluator.check(Case(replace(images, folder=tmp_path / "nothing"), CONCEPTS), evaluator.config)


def test_the_default_evaluators_fit_the_prompts(images: ImageSet) -> None:
    named = lambda case: list(EvaluateConfig().chosen(case))  # noqa: E731
    assert named(Case(images, CONCEPTS)) == ["classifier", "clip"]
    bare = replace(images, rows=[replace(row, labels={}) for row in images.rows])
    assert named(Case(bare, CONCEPTS)) == ["clip"]


# ---- the index -----------------------------------------------------------------------------------


@every_evaluator
def test_settings_of_another_evaluator_are_refused(name: str, images: ImageSet) -> None:
    other = get_evaluator(next(one for one in NAMES if one != name))
    config = EvaluateConfig([name], settings={name: other.config})
    with pytest.raises(
        ErasureError, match=f"evaluator {name} takes a .*, not a .*; give that, or leave it out"
    ):
        config.chosen(Case(images, CONCEPTS))


@every_evaluator
def test_an_index_line_and_its_settings_are_one_evaluators_alone(name: str) -> None:
    evaluator = get_evaluator(name)
    assert evaluator.name == name and [
        one for one in map(get_evaluator, NAMES) if type(one.config) is type(evaluator.config)
    ] == [evaluator]
    assert (type(evaluator.config).__doc__ or "").startswith(f"{name}: "), (
        "it heads the options in --help"
    )


def test_settings_of_no_evaluator_and_evaluators_named_twice_are_refused(images: ImageSet) -> None:
    case = Case(images, CONCEPTS)
    with pytest.raises(
        ErasureError, match="unknown evaluator in settings 'clp'; did you mean 'clip'"
    ):
        EvaluateConfig(["nudenet"], settings={"clp": None}).chosen(case)
    with pytest.raises(ErasureError, match="evaluators names 'nudenet' twice"):
        EvaluateConfig(["nudenet", "erase.eval.evaluators.nudenet:NUDENET"]).chosen(case)


def test_two_evaluators_that_give_one_score_are_refused(images: ImageSet, monkeypatch) -> None:
    first = get_evaluator(FOURTH)
    second = Evaluator("again", first.config, first.evaluate, first.check)
    monkeypatch.setattr(sys.modules["brightness"], "AGAIN", second, raising=False)
    with pytest.raises(ErasureError, match="two evaluators give an extra 'brightness'"):
        score(images, CONCEPTS, [FOURTH, "brightness:AGAIN"])
    quiet = Evaluator(
        "quiet", first.config, lambda case, config: score(images, CONCEPTS, [FOURTH]), first.check
    )
    monkeypatch.setattr(sys.modules["brightness"], "AGAIN", quiet)
    with pytest.raises(
        ErasureError,
        match="the score 'bright images' is given twice, by brightness and by brightness:AGAIN",
    ):
        score(images, CONCEPTS, [FOURTH, "brightness:AGAIN"])


# ---- the case ------------------------------------------------------------------------------------


def test_a_case_makes_what_it_is_asked_for_once_and_nothing_else(images: ImageSet) -> None:
    made: list[str] = []

    def make(what: str) -> Callable[[], ImageSet]:
        return lambda: made.append(what) or images  # type: ignore[func-returns-value]

    case = Case(make("own"), CONCEPTS, base_images=make("base"))
    assert made == [] and case.images is case.images and made == ["own"]
    assert case.base_images is images and made == ["own", "base"]
    assert Case(make("own")).base_images is images, "a base's own images"
    assert case.labels["object"][0] == images.rows[0].labels["object"] and set(case.labels) == {
        "object",
        "style",
        "colour",
    }


def test_a_case_of_images_has_no_model(images: ImageSet) -> None:
    with (
        pytest.raises(ErasureError, match="needs the model, and only images were given"),
        Case(images).model(),
    ):
        pass


def test_an_extra_that_json_cannot_hold_is_refused(images: ImageSet) -> None:
    for value in (math.nan, {1j}, "\ud800"):
        with pytest.raises(ErasureError, match="the extra 'x' is not for JSON"):
            Case(images).add_extra("x", value)
