"""The evaluation, tested by what it must say of models whose behaviour is known: oracles made of
renders, and hand-made examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from erase.eval.attempts import own_rows
from erase.eval.canvas.judges import clip_folder
from erase.eval.canvas.render import render
from erase.eval.case import Case
from erase.eval.detectors import detector
from erase.eval.evaluators import EVALUATORS, classifier, clip, get_evaluator
from erase.eval.evaluators.labelled import label_scores, labels_of, of_canvas
from erase.eval.images import ImageRow, ImageSet, save_image, write_manifest, write_settings
from erase.eval.metrics.labels import Tally, accuracies, confusion, forgetting
from erase.eval.scores import Score
from erase.files import file_sha256
from erase.prompts.canvas import KINDS, canvas_concept, vocabulary
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import canvas_grid

PROMPTS = canvas_grid(seeds=(0,)).rows  # 480: every cell once
SEED = 60_000_000
JUDGES = {"classifier": (classifier, ""), "clip": (clip, "CLIP ")}


def image_set(folder: Path, pixels: torch.Tensor) -> ImageSet:
    """What a model that answers the grid's prompts with `pixels` leaves on disk."""
    rows = []
    for row, image in zip(
        PROMPTS, (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy(), strict=True
    ):
        file = folder / f"{row.case:05d}.png"
        save_image(file, image, {})
        rows.append(
            ImageRow(file.name, row.case, row.prompt, row.seed, 5.0, row.labels, file_sha256(file))
        )
    write_settings(folder, {"images": len(rows)})
    write_manifest(folder, rows)
    return ImageSet.open(folder)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory) -> Callable[..., ImageSet]:
    """`oracle()` draws what each prompt says; `oracle(heart="star")` draws a star where a heart is
    asked for."""
    made: dict[tuple, ImageSet] = {}

    def build(**swaps: str) -> ImageSet:
        key = tuple(swaps.items())
        if key not in made:
            cells = [
                {kind: swaps.get(name, name) for kind, name in row.labels.items()}
                for row in PROMPTS
            ]
            made[key] = image_set(tmp_path_factory.mktemp("oracle"), render(cells, seed=SEED))
        return made[key]

    return build


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> ImageSet:
    """Blotches of random colour, size and grain that have nothing to do with the prompt."""
    torch.manual_seed(0)
    base, grain = torch.rand(len(PROMPTS), 3, 1, 1), torch.rand(len(PROMPTS), 1, 1, 1)
    grids = [torch.rand(60, 3, side, side) for side in (2, 3, 5, 8, 12, 20, 32, 64)]
    blotches = torch.cat(
        [F.interpolate(grid, (64, 64), mode="bicubic").clamp(0, 1) for grid in grids]
    )
    blotches = blotches[torch.randperm(len(PROMPTS))]
    return image_set(tmp_path_factory.mktemp("noise"), base + (blotches - base) * grain)


@cache
def _evaluate(judge: str, folder: Path, targets: tuple[str, ...]) -> dict[str, Score]:
    images = ImageSet.open(folder)
    module, prefix = JUDGES[judge]
    case = Case(images, [canvas_concept(target) for target in targets])
    scores = module.evaluate(case, module.Config())
    return {score.name.removeprefix(prefix): score for score in scores}


def evaluate(judge: str, images: ImageSet, *targets: str) -> dict[str, Score]:
    """Name -> score, the judge's prefix dropped; measured once for each set of images."""
    return _evaluate(judge, images.folder, targets)


# ---- the oracle controls -------------------------------------------------------------------------


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("target", ["heart", "Sketch", "pink"])
def test_identity_forgets_nothing(judge: str, target: str, oracle) -> None:
    scores = evaluate(judge, oracle(), target)
    assert scores["UA"].value <= 3
    assert min(scores["IRA"].value, scores["CRA"].value) >= 97


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("target", ["heart", "Sketch", "pink"])
def test_anchor_swap_forgets_the_target_and_nothing_else(judge: str, target: str, oracle) -> None:
    swapped = evaluate(judge, oracle(**{target: canvas_concept(target).anchor}), target)
    kept = evaluate(judge, oracle(), target)
    assert swapped["UA"].value >= 99
    # the backgrounds of the two sets are drawn from one random stream, which a swapped style shifts
    assert abs(swapped["IRA"].value - kept["IRA"].value) <= 1
    assert abs(swapped["CRA"].value - kept["CRA"].value) <= 1


def predictions(judge: str, images: ImageSet) -> dict[str, list[str]]:
    if judge == "classifier":
        return classifier.predict(classifier.load_judge("canvas"), images)
    model = clip.load_clip(clip.Config())
    classes = {kind: vocabulary().names(kind) for kind in KINDS}
    return clip.zero_shot(model, model.images(images, 64), classes, clip.Config())


@pytest.mark.parametrize("judge", JUDGES)
def test_noise_has_a_high_ua_and_is_caught_by_ira_and_cra(judge: str, noise: ImageSet) -> None:
    """What a model draws regardless of the prompt is right by chance only: UA alone would praise
    it.

    Chance is exact in the mean over the K targets of a kind, whatever the judge sees in noise: UA 1
    - 1/K (90 % for objects, near 100 % where there are many), IRA 1/K. A single target's UA depends
    on what the judge likes to call noise.
    """
    guesses = predictions(judge, noise)
    labels = {kind: [row.labels[kind] for row in noise.rows] for kind in KINDS}
    for kind in KINDS:
        names, others = vocabulary().names(kind), [k for k in KINDS if k != kind]
        tallies = [forgetting(guesses, labels, [(kind, name)]) for name in names]
        shares = {
            score: [100 * tally[score].hits / tally[score].n for tally in tallies]
            for score in ("UA", "IRA", "CRA")
        }
        chance = 100 / len(names)
        cross = float(np.mean([100 / len(vocabulary().names(k)) for k in others]))
        luck = 3 * 100 * np.sqrt(chance / 100 * (1 - chance / 100) / len(noise.rows))
        assert np.mean(shares["UA"]) == pytest.approx(100 - chance, abs=luck)
        assert np.mean(shares["IRA"]) == pytest.approx(chance, abs=luck)
        assert np.mean(shares["CRA"]) == pytest.approx(cross, abs=5)


def test_several_concepts_of_several_kinds(oracle) -> None:
    swapped = evaluate("classifier", oracle(heart="star", Sketch="Striped"), "heart", "Sketch")
    assert swapped["UA"].value >= 99 and swapped["UA"].n == 48 + 60
    assert min(swapped["IRA"].value, swapped["CRA"].value) >= 99
    assert (swapped["IRA"].n, swapped["CRA"].n) == (2 * 9 * 7 * 6, 9 * 7 * 6)


# ---- arithmetic ----------------------------------------------------------------------------------

LABELS = {
    "object": ["heart", "heart", "star", "star", "moon"],
    "style": ["Flat", "Neon", "Flat", "Neon", "Flat"],
}
GUESSES = {
    "object": ["star", "heart", "star", "moon", "moon"],
    "style": ["Flat", "Flat", "Flat", "Flat", "Neon"],
}


@pytest.mark.parametrize(
    ("targets", "cra_with_target", "expected"),
    [
        ([("object", "heart")], False, {"UA": (1, 2), "IRA": (2, 3), "CRA": (1, 3)}),
        ([("object", "heart")], True, {"UA": (1, 2), "IRA": (2, 3), "CRA": (2, 5)}),
        ([("style", "Neon")], False, {"UA": (2, 2), "IRA": (2, 3), "CRA": (2, 3)}),
        # both kinds hold a target: the second image names both and is judged twice; every kind is
        # own and other at once
        (
            [("object", "heart"), ("style", "Neon")],
            False,
            {"UA": (1 + 2, 4), "IRA": (2 + 1, 4), "CRA": (2 + 1, 4)},
        ),
        (
            [("object", "heart"), ("object", "star")],
            False,
            {"UA": (1 + 1, 4), "IRA": (1, 1), "CRA": (0, 1)},
        ),
    ],
)
def test_forgetting_by_hand(
    targets, cra_with_target: bool, expected: dict[str, tuple[int, int]]
) -> None:
    found = forgetting(GUESSES, LABELS, targets, cra_with_target)
    assert found == {name: Tally(*counts) for name, counts in expected.items()}


def test_one_kind_has_no_cra() -> None:
    assert set(
        forgetting(
            {"object": GUESSES["object"]}, {"object": LABELS["object"]}, [("object", "heart")]
        )
    ) == {"UA", "IRA"}


def test_ua_and_accuracy_are_one_measurement() -> None:
    """Each target in turn: the images that are not classified as what they are asked to show add up
    to all that is wrong."""
    misses = sum(
        forgetting(GUESSES, LABELS, [("object", name)])["UA"].hits
        for name in ("heart", "star", "moon")
    )
    assert misses == 5 - accuracies(GUESSES, LABELS)["object"].hits


def test_confusion_by_hand() -> None:
    counts = confusion(GUESSES["object"], LABELS["object"], ["heart", "star", "moon"])
    assert counts.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 1]]


# ---- evaluators ----------------------------------------------------------------------------------


def test_classifier_scores_say_n_and_their_interval(oracle) -> None:
    scores = evaluate("classifier", oracle(heart="star"), "heart")
    assert [score.n for score in scores.values()] == [48, 432, 864]
    assert all(
        score.higher_is_better and 0 < score.high - score.low < 10 and score.unit == "%"
        for score in scores.values()
    )


def test_without_concepts_the_accuracy_of_each_kind(oracle) -> None:
    scores = classifier.evaluate(Case(oracle()), classifier.Config())
    assert [score.name for score in scores] == [f"{kind} accuracy" for kind in KINDS]
    assert min(score.value for score in scores) >= 99


def test_confusions_show_where_the_target_went(oracle) -> None:
    case = Case(oracle(heart="mushroom"))
    seen = classifier.judged(classifier.load_judge("canvas"), case, classifier.Config())
    table = seen.confusions(case)["object"]
    heart, mushroom = table["labels"].index("heart"), table["labels"].index("mushroom")
    assert table["counts"][heart][mushroom] >= 47 and table["counts"][heart][heart] == 0
    assert np.sum(table["counts"], axis=1).tolist() == [48] * 10


def test_a_judge_knows_a_concept_by_any_of_its_names(oracle) -> None:
    def scores(target: str, *synonyms: str) -> list[Score]:
        case = Case(
            oracle(heart="mushroom"), [ConceptSpec(target, "mushroom", synonyms, kind="object")]
        )
        assert of_canvas(case) and detector(case).name == "classifier canvas"
        found = []
        for evaluator in (classifier.CLASSIFIER, clip.CLIP):
            evaluator.check(case, evaluator.config)
            found += evaluator.evaluate(case, evaluator.config)
        assert target in case.extras["confusion"][0]["labels"]
        return found

    assert scores("Valentine", "heart") == scores("heart")


def test_any_judge_will_do(oracle) -> None:
    def stubborn(images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"object": torch.eye(2)[0].expand(len(images), -1)}

    judge = classifier.Judge("stubborn", stubborn, {"object": ["heart", "star"]})
    images = oracle()
    some = replace(
        images, rows=[row for row in images.rows if row.labels["object"] in ("heart", "star")]
    )
    seen = classifier.judged(judge, Case(some), classifier.Config())
    gone, kept = seen.scores([ConceptSpec("star", "heart")], classifier.Config())
    assert [(one.name, one.value) for one in (gone, kept)] == [
        ("accuracy of the forgotten", 0),
        ("accuracy of the others", 100),
    ]


def test_clip_score_falls_where_the_target_was_swapped(oracle) -> None:
    kept = evaluate("clip", oracle(), "heart")
    swapped = evaluate("clip", oracle(heart="star"), "heart")
    score, gone = "score", "score of the forgotten"
    assert swapped[gone].high < kept[gone].low
    assert swapped[score].value == pytest.approx(kept[score].value, abs=1)
    assert (kept[score].n, kept[gone].n, kept[gone].higher_is_better) == (432, 48, False)
    assert -100 <= swapped[gone].value < kept[score].value <= 100


def test_clip_reads_labels_of_any_kind(oracle) -> None:
    """A folder in place of a name, and label columns that are not the embedded world's."""
    images = oracle(heart="star")
    rows = [
        replace(row, labels={"thing": row.labels["object"]})
        for row in images.rows
        if row.labels["object"] in ("heart", "moon")
    ]
    config = clip.Config(model=str(clip_folder()), templates={"thing": ["a picture of a {}"]})
    scores = clip.evaluate(
        Case(replace(images, rows=rows), [ConceptSpec("heart", "star", kind="thing")]), config
    )
    assert [score.name for score in scores] == [
        "CLIP UA",
        "CLIP IRA",
        "CLIP score",
        "CLIP score of the forgotten",
    ]
    assert scores[0].value >= 97 and scores[1].value >= 97


def test_clip_score_alone_needs_no_labels(oracle) -> None:
    images = oracle()
    bare = replace(images, rows=[replace(row, labels={}) for row in images.rows[40:60]])
    scores = clip.evaluate(Case(bare, [canvas_concept("heart")]), clip.Config(zero_shot=False))
    told = {score.name: score.n for score in scores}
    assert told == {"CLIP score": 12, "CLIP score of the forgotten": 8}


def labelled(folder: Path, *names: str) -> ImageSet:
    """Rows of these objects in two styles, and no images."""
    rows = []
    for case, name in enumerate(names):
        labels = {"object": name, "style": "drawn" if case % 2 else "painted"}
        rows.append(ImageRow(f"{case}.png", case, f"a {name}", 0, 7.5, labels, ""))
    return ImageSet(folder, rows, {"images": len(rows)})


def test_a_label_is_the_concepts_by_any_of_its_names(tmp_path: Path) -> None:
    names = ("church", "Church ", "a chapel", "Dog", "dog", "cat", "castle")
    church = ConceptSpec("church", "Castle", ("Chapel",), kind="object")
    case = Case(labelled(tmp_path, *names), [church])
    classes = clip.classes_for(case, clip.Config(model=str(clip_folder())))
    assert classes["object"] == ["church", "Dog", "cat", "castle"]

    labels = labels_of(case, classes)
    told = label_scores(labels, labels, case.concepts, False, "", "")
    assert {score.name: score.n for score in told} == {"UA": 3, "IRA": 4, "CRA": 4}
    assert [row.case for row in own_rows(case)] == [0, 1, 2]
    given = clip.Config(model=str(clip_folder()), classes={"object": ["chapel", "dog"]})
    assert clip.classes_for(case, given) == {"object": ["church", "dog"]}


def test_clip_score_is_of_what_names_no_concept_without_labels_too(tmp_path: Path) -> None:
    concept = ConceptSpec("church", "castle", ("chapel",), kind="object")
    config = clip.Config(zero_shot=False)

    def told(*names: str, harmonic: str | None = None) -> dict[str, int]:
        images = labelled(tmp_path, *names)
        bare = replace(images, rows=[replace(row, labels={}) for row in images.rows])
        values = [float(case) for case in range(len(names))]
        asked = replace(config, harmonic=harmonic)
        return {one.name: one.n for one in clip._mean_scores(values, Case(bare, [concept]), asked)}

    kept, gone = "CLIP score", "CLIP score of the forgotten"
    assert told("church", "dog", "chapel", "two dogs") == {kept: 2, gone: 2}
    assert told("two churches", "chapel") == {gone: 2} and told("dog") == {kept: 1}
    assert told("church", "dog", "cat", harmonic="H_a") == {kept: 2, gone: 1, "H_a": 3}
    with pytest.raises(ErasureError, match="H_a compares .*; use a prompt set with both"):
        told("church", "chapel", harmonic="H_a")
    with pytest.raises(ErasureError, match="H_c is taken of the labels; leave clip.zero_shot on"):
        told("church", "dog", harmonic="H_c")


def test_a_column_that_tells_nothing_apart_is_no_kind(tmp_path: Path, caplog) -> None:
    concept = ConceptSpec("church", "castle", kind="object")
    images = labelled(tmp_path, "church", "dog", "cat", "bus")
    rows = []
    for row in images.rows:
        rows.append(replace(row, labels={**row.labels, "source": "mine", "id": f"10{row.case}"}))
    told, config = replace(images, rows=rows), clip.Config(model=str(clip_folder()))
    assert [*clip.classes_for(Case(told, [concept]), config)] == ["object", "style"]
    clip.check(Case(told, [concept]), config)
    assert "does not judge the labels source, id" in caplog.text

    bare = [replace(row, labels={"object": row.labels["object"], "by": "me"}) for row in rows]
    with pytest.raises(ErasureError, match="CLIP UA says nothing alone: .* lacks CLIP CRA"):
        clip.check(Case(replace(told, rows=bare), [concept]), config)
    with pytest.raises(ErasureError, match="have no labels to judge them by; generate"):
        clip.check(Case(replace(told, rows=[replace(row, labels={}) for row in rows])), config)


def test_other_braces_of_a_template_stay(tmp_path: Path) -> None:
    captions: list[str] = []

    class Reads:
        def texts(self, texts, batch_size):
            captions.extend(texts)
            return torch.eye(len(texts))

    config = clip.Config(templates={"object": ["a {} in {colour}", "{0}: {}"]})
    clip.zero_shot_weights(Reads(), ["heart"], "object", config)
    assert captions == ["a heart in {colour}", "{0}: heart"]


def test_the_embedded_world_is_known_by_its_names(oracle, tmp_path: Path) -> None:
    heart = canvas_concept("heart")
    assert of_canvas(Case(oracle(), [heart]))
    told = {"style": "photograph", "colour": "red"}
    for name, labels in {"church": told, "star": told, "": {}}.items():
        images = labelled(tmp_path, name)
        row = replace(images.rows[0], labels={"object": name} | labels)
        assert not of_canvas(Case(replace(images, rows=[row]), [heart]))


def test_index_is_lazy_and_suggests() -> None:
    assert get_evaluator("clip") is clip.CLIP and {"classifier", "clip", "nudenet"} <= {*EVALUATORS}
    with pytest.raises(ErasureError, match="did you mean 'classifier'"):
        get_evaluator("clasifier")


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (clip.Config(model="ViT-B-23"), "unknown CLIP model 'ViT-B-23'; did you mean 'ViT-B-"),
        (
            clip.Config(model="ViT-B-32"),
            "needs weights; set pretrained to a file or one of: openai",
        ),
        (clip.Config(model="ViT-B-32", pretrained="open-ai"), "did you mean 'openai'"),
        (
            clip.Config(templates={"object": ["a thing"]}),
            "'a thing' for 'object' needs exactly one {}",
        ),
    ],
)
def test_clip_refuses_bad_settings(config: clip.Config, message: str, oracle) -> None:
    case = Case(oracle(), [canvas_concept("heart")])
    for judge in (clip.check, clip.evaluate):
        with pytest.raises(ErasureError) as error:
            judge(case, config)
        assert message in str(error.value)


def test_clip_refuses_a_folder_without_weights(oracle, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(
        (clip_folder() / "open_clip_config.json").read_text()
    )
    with pytest.raises(ErasureError, match="open_clip cannot load"):
        clip.evaluate(Case(oracle()), clip.Config(model=str(tmp_path)))


def test_unknown_judge(oracle) -> None:
    with pytest.raises(ErasureError, match="unknown judge 'canvass'; did you mean 'canvas'"):
        classifier.evaluate(Case(oracle()), classifier.Config(judge="canvass"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([{}, {}], "have no labels to judge them by"),
        ([{"object": "heart"}, {}], "00001.png"),
        ([{"object": "heart"}, {"object": ""}], "00001.png.* has no label 'object', others have"),
        (
            [{"object": "heart"}, {"object": "haert"}],
            "unknown object label 'haert'; did you mean 'heart'",
        ),
        ([{"object": "star"}, {"object": "moon"}], "no image is labelled 'heart' as its object"),
    ],
)
def test_labels_that_cannot_be_judged(labels: list[dict[str, str]], message: str, oracle) -> None:
    images = oracle()
    rows = [replace(row, labels=label) for row, label in zip(images.rows, labels, strict=False)]
    with pytest.raises(ErasureError, match=message):
        classifier.evaluate(
            Case(replace(images, rows=rows), [canvas_concept("heart")]), classifier.Config()
        )
