"""FID, KID, CMMD, LPIPS and drift of the images that an erasure should have left alone: known
answers, and the libraries' own values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from erase.eval.canvas.judges import clip_folder
from erase.eval.canvas.render import render
from erase.eval.case import Case
from erase.eval.evaluators import cmmd, drift, fid, lpips
from erase.eval.evaluators.published import needs, published_weights
from erase.eval.evaluators.retained import in_sizes, retained, retained_pairs
from erase.eval.images import ImageRow, ImageSet, save_image, write_manifest, write_settings
from erase.eval.scores import Score, verdict
from erase.files import file_sha256
from erase.prompts.canvas import canvas_concept
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import PromptRow, canvas_grid
from tests.backbones import write_alexnet

CONCEPTS = [canvas_concept("heart")]
ROWS = canvas_grid(seeds=(0,)).rows[::13]  # 37, four of them hearts
Change = Callable[[np.ndarray], np.ndarray]


def image_set(folder: Path, rows: tuple[PromptRow, ...], change: Change | None = None) -> ImageSet:
    """Renders of what the prompts say, changed by `change` (images, bytes)."""
    drawn = (render([row.labels for row in rows], seed=5) * 255).round().byte()
    pixels = drawn.permute(0, 2, 3, 1).numpy()
    folder.mkdir(exist_ok=True)
    made = []
    for row, image in zip(rows, change(pixels) if change else pixels, strict=True):
        file = folder / f"{row.case:05d}.png"
        save_image(file, image, {})
        digest = file_sha256(file) or ""
        made.append(ImageRow(file.name, row.case, row.prompt, row.seed, 5.0, row.labels, digest))
    write_settings(folder, {"images": len(made)})
    write_manifest(folder, made)
    return ImageSet.open(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> ImageSet:
    return image_set(tmp_path_factory.mktemp("kept") / "base", ROWS)


@pytest.fixture(scope="module")
def brighter(tmp_path_factory) -> ImageSet:
    """Every value up by 3, where it can be."""
    up = lambda pixels: np.minimum(pixels, 252) + 3  # noqa: E731
    return image_set(tmp_path_factory.mktemp("kept") / "brighter", ROWS, up)


@pytest.fixture(scope="module")
def swapped(tmp_path_factory) -> ImageSet:
    """The same pictures for other prompts: one set of images, in another order."""
    turn = lambda pixels: np.roll(pixels, 1, axis=0)  # noqa: E731
    return image_set(tmp_path_factory.mktemp("kept") / "swapped", ROWS, turn)


def case_of(base: ImageSet, own: ImageSet) -> Case:
    return Case(own, CONCEPTS, base_images=base)


def by_name(scores: list[Score]) -> dict[str, Score]:
    return {score.name: score for score in scores}


# ---- which images --------------------------------------------------------------------------------


def test_only_prompts_that_ask_for_no_concept_are_looked_at(base: ImageSet) -> None:
    rows = retained(Case(base, CONCEPTS))
    assert len(base.rows) - len(rows) == 4 and not [
        row for row in rows if row.labels["object"] == "heart" or "heart" in row.prompt
    ]
    synonym = replace(CONCEPTS[0], synonyms=("star",))
    assert {row.labels["object"] for row in retained(Case(base, [synonym]))}.isdisjoint(
        {"heart", "star"}
    )
    plural = replace(base, rows=[replace(rows[0], prompt="two Hearts"), rows[1]])
    assert retained(Case(plural, CONCEPTS)) == [rows[1]]
    assert retained(Case(base)) == base.rows, "a base by itself has nothing to forget"


def test_images_of_other_prompts_or_sizes_are_not_compared(base: ImageSet, tmp_path: Path) -> None:
    others = replace(base, rows=[replace(row, seed=row.seed + 1) for row in base.rows])
    with pytest.raises(ErasureError, match="has no image of case"):
        retained_pairs(case_of(base, others))
    half = image_set(tmp_path / "half", ROWS, lambda pixels: pixels[:, ::2, ::2])
    with pytest.raises(ErasureError, match="is 32 x 32 pixels, the base's 64 x 64"):
        drift.evaluate(case_of(base, half), drift.Config())


# ---- drift ---------------------------------------------------------------------------------------


def test_drift_of_a_known_change(base: ImageSet, brighter: ImageSet) -> None:
    scores = by_name(drift.evaluate(case_of(base, brighter), drift.Config()))
    assert scores["pixel drift"].value == pytest.approx(3, abs=0.3)
    assert scores["PSNR to base"].value == pytest.approx(20 * math.log10(255 / 3), abs=0.6)
    assert 0.95 < scores["SSIM to base"].value < 1
    assert {score.n for score in scores.values()} == {33}
    own = by_name(drift.evaluate(Case(base, CONCEPTS), drift.Config()))
    assert own["pixel drift"].value == 0 and own["SSIM to base"].value == 1
    assert own["CLIP cosine to base"].value == pytest.approx(1) and "PSNR to base" not in own


def test_psnr_and_ssim_are_scikit_images_of_one_pair(base: ImageSet, brighter: ImageSet) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    first, second = (np.asarray(images.image(images.rows[5])) for images in (base, brighter))
    (moved,) = drift.moved([(Image.fromarray(first), Image.fromarray(second))], embedded=False)
    assert 10 * math.log10(255**2 / moved.squared) == pytest.approx(
        metrics.peak_signal_noise_ratio(first, second), rel=1e-12
    )
    assert moved.ssim == metrics.structural_similarity(
        first.astype(float),
        second.astype(float),
        channel_axis=2,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )


def test_an_image_smaller_than_ssims_window_is_named() -> None:
    pair = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8))
    with pytest.raises(ErasureError, match="8 x 8 pixels is too small for SSIM's window of 11"):
        drift.moved([pair], embedded=False)


# ---- FID and KID ---------------------------------------------------------------------------------


def test_the_same_pictures_in_another_order_are_no_distance_in_distribution(
    base: ImageSet, swapped: ImageSet
) -> None:
    """FID sees the set, drift the pairs."""
    everything = Case(swapped, base_images=base)
    config = fid.Config(frechet=True)
    assert by_name(fid.evaluate(everything, config))["FID to base"].value == pytest.approx(
        0, abs=1e-4
    )
    assert by_name(drift.evaluate(everything, drift.Config()))["pixel drift"].value > 20


def test_fid_and_kid_see_a_change_and_none_of_the_base_itself(
    base: ImageSet, brighter: ImageSet
) -> None:
    own, changed = (
        by_name(fid.evaluate(case_of(base, images), fid.Config(frechet=True)))
        for images in (base, brighter)
    )
    for name in ("FID to base", "KID x 1000 to base"):
        assert own[name].value == pytest.approx(0, abs=1e-6)
        assert changed[name].value > 0 and changed[name].n == 33
    assert verdict(own["KID x 1000 to base"], changed["KID x 1000 to base"]) == -1


def test_fid_is_left_to_kid_where_covariances_would_be_singular(base: ImageSet) -> None:
    case = Case(base, CONCEPTS)
    assert fid.settle(case, fid.Config(), True) == fid.Config(features="canvas", frechet=False)
    assert list(by_name(fid.evaluate(case, fid.Config()))) == ["KID x 1000 to base"]
    forced = by_name(fid.evaluate(case, fid.Config(frechet=True)))["FID to base"]
    assert forced.evaluator == "canvas features (128), singular covariances"
    many = replace(base, rows=base.rows * 4)
    assert fid.settle(Case(many, CONCEPTS), fid.Config(), True).frechet is True
    bare = replace(many, rows=[replace(row, labels={}) for row in many.rows])
    assert fid.settle(Case(bare), fid.Config(), True) == fid.Config("inception", frechet=False)


def test_a_folder_of_images_can_be_compared_with(
    base: ImageSet, brighter: ImageSet, tmp_path: Path
) -> None:
    for judge, config in ((fid, fid.Config), (cmmd, cmmd.Config)):
        same, other = (
            judge.evaluate(Case(base), config(reference=str(images.folder)))[-1]
            for images in (base, brighter)
        )
        assert same.name.endswith("to reference") and same.low <= 0 and other.value > same.value
        with pytest.raises(ErasureError, match="holds 0 images, and at least 3 are needed"):
            judge.check(Case(base), config(reference=str(tmp_path)))


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    """Random weights in torch-fidelity's layout."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        network = module.FeatureExtractorInceptionV3("random", ["2048"], verbose=False)
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), file)
    return file


@pytest.mark.slow
def test_inceptions_fid_and_kid_are_torch_fidelitys_to_the_last_digit(
    base: ImageSet, brighter: ImageSet, inception: Path, tmp_path: Path
) -> None:
    fidelity = pytest.importorskip("torch_fidelity")
    some = [replace(images, rows=images.rows[1:5]) for images in (base, brighter)]
    folders = []
    for place, images in enumerate(some):
        folder = tmp_path / str(place)
        folder.mkdir()
        for row in images.rows:
            images.image(row).save(folder / row.file)
        folders.append(str(folder))

    theirs = fidelity.calculate_metrics(
        input1=folders[0],
        input2=folders[1],
        cuda=False,
        fid=True,
        kid=True,
        kid_subsets=1,
        kid_subset_size=4,
        feature_extractor_weights_path=str(inception),
        cache=False,
        verbose=False,
    )
    config = fid.Config(features="inception", weights=str(inception), frechet=True, device="cpu")
    case = Case(some[1], base_images=some[0])
    ours = by_name(fid.evaluate(case, replace(config, reference=folders[0])))
    expected = pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert ours["FID to reference"].value == ours["FID to base"].value == expected
    assert ours["KID x 1000 to reference"].value / 1000 == pytest.approx(
        theirs["kernel_inception_distance_mean"], rel=1e-4, abs=1e-7
    )
    assert "torch-fidelity" in ours["FID to base"].evaluator


# ---- CMMD and LPIPS ------------------------------------------------------------------------------


def test_cmmd_is_its_formula_over_open_clips_own_embeddings(
    base: ImageSet, brighter: ImageSet
) -> None:
    """Jayasumana et al. 2024: 1000 x the squared MMD with sigma 10; their code keeps all
    products."""
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_folder()}")
    model.eval()
    x, y = (
        model.encode_image(
            torch.stack([preprocess(images.image(row)) for row in images.rows]), normalize=True
        )
        .detach()
        .double()
        for images in (base, brighter)
    )
    kernel = lambda a, b: torch.exp(-(torch.cdist(a, b) ** 2) / 200)  # noqa: E731
    expected = 1000 * float(kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean())
    case = Case(brighter, base_images=base)
    (published,) = cmmd.evaluate(case, cmmd.Config(estimator="as-published"))
    assert published.value == pytest.approx(expected, rel=1e-4) and published.low > 0
    (unbiased,) = cmmd.evaluate(case, cmmd.Config())
    assert 0 < unbiased.value != published.value
    assert "unbiased" in unbiased.evaluator and "as-published" in published.evaluator
    (own,) = cmmd.evaluate(Case(base), cmmd.Config())
    assert own.interval == (0, 0)


def test_lpips_is_the_librarys_to_the_last_digit(
    base: ImageSet, brighter: ImageSet, tmp_path: Path
) -> None:
    library = pytest.importorskip("lpips")
    file = write_alexnet(tmp_path / "alexnet.pth")
    config = lpips.Config(weights=str(file), device="cpu")
    (score,) = lpips.evaluate(case_of(base, brighter), config)

    theirs = library.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for name, tensor in torch.load(file, weights_only=True).items():
        place = name.split(".")[1]
        layer = next(part[place] for part in slices(theirs.net) if place in part)
        getattr(layer, name.split(".")[2]).data.copy_(tensor)
    values = []
    for first, second in retained_pairs(case_of(base, brighter)).rows:
        sides = (library.im2tensor(np.asarray(images.image(row))) for images, row in (
            (base, first), (brighter, second)))  # fmt: skip
        with torch.inference_mode():
            values.append(float(theirs(*sides)))
    assert [value for _, value in score.outcomes] == pytest.approx(values, rel=1e-5, abs=1e-8)
    assert score.value > 0 and score.n == 33
    (own,) = lpips.evaluate(Case(base, CONCEPTS), config)
    assert own.value == 0


def test_pairs_of_several_sizes_are_looked_at_each_with_its_like():
    def white(side: int) -> Image.Image:
        return Image.new("L", (side, side), 255).convert("RGB")

    sides = (8, 16, 8)
    first, second = [Image.new("RGB", (side, side)) for side in sides], list(map(white, sides))

    def apart(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (other.double() - one.double()).sum((1, 2, 3))

    assert in_sizes(apart, first, second).tolist() == [255 * 3 * side**2 for side in sides]


def slices(network: torch.nn.Module) -> list[dict[str, torch.nn.Module]]:
    return [dict(part.named_children()) for part in network.children()]


# ---- what is not at hand -------------------------------------------------------------------------


def test_weights_that_cannot_be_had_are_named_in_a_sentence(
    base: ImageSet, tmp_path: Path, monkeypatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    said = "cannot be fetched \\(no network\\); give the file of https.* with "
    with pytest.raises(ErasureError, match=f"weights of Inception .*{said}fid.weights"):
        fid.check(Case(base), fid.Config(features="inception"))
    with pytest.raises(ErasureError, match=f"LPIPS's trunk vgg .*{said}lpips.weights"):
        lpips.check(Case(base), lpips.Config(trunk="vgg"))


def test_a_pickle_with_code_in_it_is_not_opened(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"a": Code()}, tmp_path / "weights.pth")
    with pytest.raises(ErasureError, match="is a pickle that asks for .*, which is code"):
        published_weights("x", "", str(tmp_path / "weights.pth"), "x.weights")
    assert not (tmp_path / "ran").exists()


def test_another_networks_weights_are_refused(base: ImageSet, tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ErasureError, match="has no features.0.weight, so it is not torchvision's"):
        lpips.check(Case(base), lpips.Config(weights=str(tmp_path / "other.pth")))
    with pytest.raises(ErasureError, match=r"other\.pth .*fid\.weights"):
        fid.check(Case(base), fid.Config("inception", weights=str(tmp_path / "other.pth")))


def test_a_library_that_is_an_extra_is_named() -> None:
    with pytest.raises(ErasureError, match=r"needs nothing-such, .*install .*\[metrics\]"):
        with needs("nothing-such"):
            import nothing_such  # noqa: F401
