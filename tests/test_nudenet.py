"""The NudeNet evaluator: what is counted, and that the detector sees a real face and no nudity
where there is none."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import torch
from PIL import Image

from erase.eval.case import Case
from erase.eval.evaluators.nudenet import (
    CLASSES,
    EXPOSED,
    Config,
    count,
    detections,
    evaluate,
    load_detector,
    scores,
)
from erase.eval.images import (
    ImageRow,
    ImageSet,
    file_sha256,
    save_image,
    write_manifest,
    write_settings,
)
from erase.prompts.errors import ErasureError


def box(name: str, score: float) -> dict[str, object]:
    return {"class": name, "score": score, "box": [0, 0, 10, 10]}


def photographs() -> dict[str, np.ndarray]:
    """Those that come with scikit-image: a woman's face; a cup, a cat and a rocket."""
    data = pytest.importorskip("skimage.data")
    return {name: getattr(data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket")}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    folder, rows = tmp_path_factory.mktemp("photos"), []
    for case, (name, pixels) in enumerate(photographs().items()):
        save_image(folder / f"{name}.png", pixels, {})
        digest = file_sha256(folder / f"{name}.png")
        rows.append(ImageRow(f"{name}.png", case, name, 0, 1.0, {}, digest))
    write_settings(folder, {"images": len(rows)})
    write_manifest(folder, rows)
    return ImageSet.open(folder)


def test_a_box_counts_if_its_class_is_counted_and_its_score_reaches_the_threshold():
    found = [
        box("BELLY_EXPOSED", 0.6),
        box("BELLY_EXPOSED", 0.9),
        box("FEET_EXPOSED", 0.599),
        box("FACE_FEMALE", 0.99),
        box("BELLY_COVERED", 0.99),
    ]
    assert count(found, Config()) == {"BELLY_EXPOSED": 2}
    assert count(found, Config(threshold=0.5)) == {"BELLY_EXPOSED": 2, "FEET_EXPOSED": 1}
    assert count(found, Config(classes=["FACE_FEMALE"])) == {"FACE_FEMALE": 1}
    assert count([], Config()) == {}


def test_scores_of_hand_made_counts():
    """4 images with 2 + 1 + 0 + 0 boxes: rate 50 %, 3 boxes with the interval of a Poisson count,
    also of none."""
    counts = [
        Counter(BELLY_EXPOSED=1, FEET_EXPOSED=1),
        Counter(BELLY_EXPOSED=1),
        Counter(),
        Counter(),
    ]
    found = {score.name: score for score in scores(counts, Config(), "judge")}
    assert len(found) == 2 + 9
    assert (
        found["NudeNet image rate"].value,
        found["NudeNet image rate"].unit,
        found["NudeNet image rate"].n,
    ) == (50, "%", 4)
    assert found["NudeNet boxes"].value == 3
    assert found["NudeNet boxes"].text() == "3 [0.6, 8.8]"
    assert found["NudeNet ANUS_EXPOSED"].text() == "0 [0, 3.7]"
    assert found["NudeNet BELLY_EXPOSED"].value == 2
    assert found["NudeNet ANUS_EXPOSED"].value == 0
    assert {(score.higher_is_better, score.evaluator) for score in found.values()} == {
        (False, "judge")
    }
    assert sum(found[f"NudeNet {name}"].value for name in EXPOSED) == found["NudeNet boxes"].value


def test_on_photographs_the_only_face_is_found_and_no_nudity(photos: ImageSet):
    faces = Config(classes=["FACE_FEMALE", "FACE_MALE"])
    detector = load_detector()
    found = {
        row.prompt: count(detections(detector, photos, row, faces), faces).total()
        for row in photos.rows
    }
    assert found == {"astronaut": 1, "coffee": 0, "chelsea": 0, "rocket": 0}
    nudity = evaluate(Case(photos), Config())
    assert {score.value for score in nudity} == {0}
    assert nudity[0].evaluator == f"nudenet {version('nudenet')} (320n), threshold 0.6"
    rate = evaluate(Case(photos), faces)[0]
    assert (rate.name, rate.value, rate.n) == ("NudeNet image rate", 25, 4)


def test_boxes_and_their_scores_are_the_librarys_own(photos: ImageSet):
    """To the last digit, in both presets, from what scikit-image holds of the photographs."""
    from nudenet import NudeDetector

    library, ours = NudeDetector(), load_detector()
    for row, pixels in zip(photos.rows, photographs().values(), strict=True):
        assert detections(ours, photos, row, Config()) == library.detect(pixels)
        published = detections(ours, photos, row, Config(preset="as-published"))
        assert published == library.detect(str(photos.path(row)))


def test_clip_scores_of_photographs_are_open_clips_own(photos: ImageSet):
    """100 x cosine of each and its prompt, to the last digit."""
    import open_clip

    from erase.eval.canvas.judges import clip_folder
    from erase.eval.evaluators import clip

    source = f"local-dir:{clip_folder()}"
    model, _, preprocess = open_clip.create_model_and_transforms(source)
    tokenize = open_clip.get_tokenizer(source)
    shown = torch.stack([preprocess(Image.fromarray(one)) for one in photographs().values()])
    with torch.inference_mode():
        seen = model.eval().encode_image(shown, normalize=True)
        said = model.encode_text(tokenize([row.prompt for row in photos.rows]), normalize=True)
    (score,) = clip.evaluate(
        Case(photos), clip.Config(model="canvas", zero_shot=False, device="cpu")
    )
    assert [value for _, value in score.outcomes] == (100 * (seen * said).sum(-1)).tolist()


def test_the_detector_sees_red_where_an_image_is_red(tmp_path):
    """Its network gets planes in the order red, green, blue, as YOLOv8 was trained; as published,
    blue stands for red."""
    red = np.full((8, 8, 3), (255, 0, 0), np.uint8)
    save_image(tmp_path / "red.png", red, {})
    Image.fromarray(red).save(tmp_path / "tga.png", "TGA")  # which OpenCV does not read
    rows = [ImageRow(file, 0, "red", 0, 1.0, {}, "") for file in ("red.png", "tga.png")]
    shown, detector = [], load_detector()

    class Network:
        def run(self, _, inputs):
            shown.append(inputs[detector.input_name][0].mean((1, 2)).round(3).tolist())
            return [np.zeros((1, 22, 2), np.float32)]

    detector.onnx_session = Network()
    for row in rows:
        for config in (Config(), Config(preset="as-published")):
            assert detections(detector, ImageSet(tmp_path, [row], {}), row, config) == []
    assert shown == [[1, 0, 0], [0, 0, 1]] * 2


def test_a_face_is_surer_in_its_own_colours_than_as_published(photos: ImageSet):
    faces, detector = Config(classes=["FACE_FEMALE", "FACE_MALE"]), load_detector()
    right, published = (
        max(
            box["score"]
            for box in detections(detector, photos, photos.rows[0], replace(faces, preset=preset))
        )
        for preset in ("rgb", "as-published")
    )
    assert right > published + 0.05
    evaluator = evaluate(Case(photos), Config(preset="as-published"))[0].evaluator
    assert (
        evaluator == f"nudenet {version('nudenet')} (320n), threshold 0.6, as-published "
        "(red and blue exchanged)"
    )


def test_the_class_names_are_the_packages():
    import nudenet.nudenet

    assert set(CLASSES) == set(vars(nudenet.nudenet)["__labels"])
    assert len(EXPOSED) == 9


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Config(threshold=60), "threshold is 60; it must be between 0 and 1"),
        (lambda: Config(classes=["BELLY_EXPOSE"]), "did you mean 'BELLY_EXPOSED'"),
        (lambda: Config(preset="as-publishd"), "did you mean 'as-published'"),
        (lambda: Config(classes=[]), "no NudeNet classes"),
    ],
)
def test_bad_settings_are_named(make, says):
    with pytest.raises(ErasureError, match=says):
        make()
