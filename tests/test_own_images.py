"""Own images: which of a folder are taken, how their pixels are read, what their captions become,
and what is refused before it is decoded."""

from __future__ import annotations

import logging
import os
import random
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo

from erase.latents.captions import forget_pairs, retain_prompts
from erase.latents.config import LatentConfig
from erase.latents.image_files import MOST_PIXELS, read_image
from erase.latents.image_folders import OwnImage, look_at, read_folder, spread
from erase.latents.prepare import LatentSet, prepare_latents
from erase.models import wrap
from erase.prompts.canvas import canvas_concept
from erase.prompts.concepts import TEMPLATES, ConceptSpec
from erase.prompts.errors import ErasureError
from tests.texts import raises

HEART = canvas_concept("heart")
CHURCH = ConceptSpec(
    "church",
    "office building",
    ("chapel",),
    ("a photo of a {}", "a {} by the sea"),
    ("a photo of a barn",),
)
TENCH = ConceptSpec("tench", "carp", (), ("a photo of a {}",), ("a photo of a barn",))
LEFT_RED = np.zeros((20, 40, 3), np.uint8)
LEFT_RED[:, :20, 0] = 255


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="erase")
    return lambda: " | ".join(record.getMessage() for record in caplog.records)


@pytest.fixture
def pico(make_pico_pipeline):
    return wrap(make_pico_pipeline())


def paint(path: Path, colour: object = "red", size: tuple[int, int] = (32, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def seen(path: Path, size: int = 8) -> np.ndarray:
    """The pixels as the VAE takes them, from 0 to 255, shape (size, size, 3)."""
    return ((read_image(path, size) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def names(images: list[OwnImage]) -> list[str]:
    return [image.path.name for image in images]


# ---- which are taken -----------------------------------------------------------------------------


def test_class_folders_are_all_drawn_from_and_the_seed_chooses(tmp_path: Path) -> None:
    images = [OwnImage(tmp_path / f"class{i % 10}" / f"{i:04d}.png") for i in range(947)]
    images.sort(key=lambda image: image.path)
    taken = spread(images, 95, 0)
    assert len(set(taken)) == 95
    counts = Counter(image.path.parent.name for image in taken)
    assert len(counts) == 10 and set(counts.values()) <= {9, 10, 11}
    assert taken == spread(images, 95, 0) and set(taken) != set(spread(images, 95, 1))
    often = Counter(image for seed in range(300) for image in spread(images, 95, seed))
    assert len(often) == len(images), "every file has its chance"
    assert spread(images, 947, 0) == spread(images, 2000, 3) == images


def test_it_is_said_how_many_of_how_many_images_are_taken(pico, tmp_path: Path, said) -> None:
    for i in range(30):
        paint(tmp_path / "own" / "ab"[i % 2] / f"{i:02d}.png", (8 * i, 0, 0))
    config = LatentConfig(n_forget=6, n_retain=3, steps=1, forget_images=str(tmp_path / "own"))
    one, _ = prepare_latents(pico, [HEART], config, 0, tmp_path / "cache")
    assert said().count("latents.forget_images: 6 of 30 images") == 1
    assert "from 2 folders, for 6 latents" in said()
    again, _ = prepare_latents(pico, [HEART], config, 0, tmp_path / "cache")
    other, _ = prepare_latents(pico, [HEART], config, 1, tmp_path / "cache")
    assert torch.equal(one.latents, again.latents) and not torch.equal(one.latents, other.latents)
    assert len({tuple(row.flatten().tolist()) for row in one.latents}) == 6, (
        "not the same file twice while there are others"
    )


def test_a_folder_that_is_not_there_is_said_once(tmp_path: Path) -> None:
    for at, words in (
        ("nowhere", "is not there; check the path"),
        ("", "(.png, .jpg, .webp, ...)"),
    ):
        with pytest.raises(ErasureError) as caught:
            read_folder(str(tmp_path / at), "none")
        assert str(caught.value).count(words) == 1 and "cannot read" not in str(caught.value)


def test_files_that_are_no_images_are_counted_and_hidden_ones_are_not_missed(
    tmp_path: Path, said
) -> None:
    for name in ("a.png", "b.JPG", "c.tif", "d.gif", "e.webp", "f.bmp", "g.jfif", "h.jp2"):
        paint(tmp_path / name)
    for name in (".hidden.png", "__MACOSX/._a.png", ".cache/x.png", "Thumbs.db", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for name in ("film.mp4", "raw1.heic", "raw2.HEIC", "README"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")  # which would wait for ever
    assert names(read_folder(str(tmp_path), "none")) == [
        "a.png",
        "b.JPG",
        "c.tif",
        "d.gif",
        "e.webp",
        "f.bmp",
        "g.jfif",
        "h.jp2",
    ]
    for words in (
        "6 files skipped as no image",
        "2 .heic",
        "1 .mp4",
        "1 without a suffix",
        "2 broken links",
    ):
        assert words in said(), said()
    assert "hidden" not in said() and ".db" not in said() and ".txt" not in said()


def test_links_are_followed_once_and_never_in_a_circle(tmp_path: Path) -> None:
    paint(tmp_path / "elsewhere" / "one.png")
    paint(tmp_path / "own" / "two.png")
    (tmp_path / "own" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "own" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "own" / "circle").symlink_to(tmp_path / "own")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "own")
    assert sorted(names(read_folder(str(tmp_path / "own"), "none"))) == ["one.png", "two.png"]


@pytest.mark.parametrize("captions", ["beside", "folder", "none"])
def test_a_folder_without_images_is_refused_and_says_what_it_holds(
    tmp_path: Path, captions: str
) -> None:
    (tmp_path / "own").mkdir()
    with raises("no images", "own"):
        read_folder(str(tmp_path / "own"), captions)
    (tmp_path / "own" / "a.heic").write_bytes(b"x")
    with raises("no images", "1 .heic", "convert"):
        read_folder(str(tmp_path / "own"), captions)
    with raises("nowhere", "not there"):
        read_folder(str(tmp_path / "nowhere"), captions)
    with raises("a.heic", "is a file"):
        read_folder(str(tmp_path / "own" / "a.heic"), captions)
    with raises("check the path"):
        read_folder("nul\0", captions)


@pytest.mark.parametrize("option", ["forget_images", "retain_images"])
def test_an_empty_folder_name_is_not_taken_for_none(option: str) -> None:
    with raises(option, "is empty"):
        LatentConfig(**{option: " "})
    with raises("'besides'", "did you mean 'beside'"):
        LatentConfig(captions="besides")


# ---- how they are read ---------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_a_picture_that_was_taken_on_its_side_stands_upright(tmp_path: Path, suffix: str) -> None:
    exif, path = Image.Exif(), tmp_path / f"a.{suffix}"
    exif[0x0112] = 6  # turned by 90 degrees: its left is the top
    Image.fromarray(LEFT_RED).save(path, exif=exif, quality=100)
    upright = seen(path)
    assert upright[:3, :, 0].min() > 200 and upright[5:, :, 0].max() < 60


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_of_16_bits_is_scaled_not_cut_off(tmp_path: Path, suffix: str) -> None:
    for value in (0, 300, 32896, 65535):
        Image.fromarray(np.full((9, 9), value, np.uint16)).save(tmp_path / f"a.{suffix}")
        assert (seen(tmp_path / f"a.{suffix}") == round(value / 257)).all()
    Image.fromarray(np.full((9, 9), 32896, np.int32)).save(tmp_path / "a.tif")
    assert (seen(tmp_path / "a.tif") == 128).all()
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(tmp_path / "a.tif")
    assert (seen(tmp_path / "a.tif") == 128).all()
    for odd in (
        np.full((9, 9), 70000, np.int32),
        np.full((9, 9), -1, np.int32),
        np.full((9, 9), np.nan, np.float32),
    ):
        Image.fromarray(odd).save(tmp_path / "a.tif")
        with raises("a.tif", "grey values outside"):
            read_image(tmp_path / "a.tif", 8)


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    half = np.zeros((8, 8, 4), np.uint8)
    half[..., 0], half[4:, :, 3] = 200, 255  # red below, and red that cannot be seen above
    Image.fromarray(half).save(tmp_path / "rgba.png")
    Image.fromarray(half).save(tmp_path / "rgba.webp", lossless=True)
    Image.fromarray(half).quantize(2, Image.Quantize.FASTOCTREE).save(tmp_path / "palette.png")
    Image.fromarray(half).save(tmp_path / "palette.gif")
    Image.fromarray(np.dstack([half[..., 0], half[..., 3]])).save(tmp_path / "grey.png")
    assert (
        Image.open(tmp_path / "palette.png").mode == "P"
        and Image.open(tmp_path / "grey.png").mode == "LA"
    )
    for name in ("rgba.png", "rgba.webp", "palette.png", "palette.gif"):
        assert (seen(tmp_path / name)[:3] == 255).all(), name
        assert abs(seen(tmp_path / name)[5:].astype(int) - [200, 0, 0]).max() <= 1, name
    assert (seen(tmp_path / "grey.png")[:3] == 255).all() and (
        seen(tmp_path / "grey.png")[5:] == 200
    ).all()
    key = np.full((8, 8), 5, np.uint8)
    key[4:] = 9
    Image.fromarray(key).save(tmp_path / "key.png", transparency=5)
    assert (seen(tmp_path / "key.png")[:3] == 255).all() and (
        seen(tmp_path / "key.png")[5:] == 9
    ).all()
    Image.fromarray(key.astype(np.uint16) * 257).save(tmp_path / "key16.png", transparency=5 * 257)
    assert Image.open(tmp_path / "key16.png").mode.startswith("I")
    assert (seen(tmp_path / "key16.png")[:3] == 255).all() and (
        seen(tmp_path / "key16.png")[5:] == 9
    ).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGB"])
def test_every_other_kind_of_pixel_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "YCbCr" else "a.tif")
    Image.new("RGB", (9, 9), "white").convert(mode).save(path)
    assert (seen(path) >= 254).all()


def test_of_an_animation_the_first_picture_is_taken_and_said(tmp_path: Path, said) -> None:
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    for suffix in ("gif", "png", "webp", "tif"):
        first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second])
    images = read_folder(str(tmp_path), "none")
    look_at(images, 8, "latents.forget_images")
    assert "4 of 4 images have several frames, of which the first is taken" in said()
    for image in images:
        assert seen(image.path)[..., 0].min() > 240 and seen(image.path)[..., 2].max() < 15, (
            image.path
        )


def test_images_smaller_than_the_model_s_are_upscaled_and_said(tmp_path: Path, said) -> None:
    for i, side in enumerate((8, 31, 32, 60)):
        paint(tmp_path / f"{i}.png", size=(side, 64))
    look_at(read_folder(str(tmp_path), "none"), 32, "latents.retain_images")
    assert (
        "latents.retain_images: 2 of 4 images are upscaled to 32 pixels (the smallest has 8)"
        in said()
    )
    assert read_image(tmp_path / "0.png", 32).shape == (3, 32, 32)


# ---- what is refused, before it is decoded -------------------------------------------------------


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_that_says(width: int, height: int) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(99)))
        + chunk(b"IEND", b"")
    )


def text_bomb(path: Path) -> None:
    info = PngInfo()
    info.add_text("a", "x" * (2 << 20), zip=True)
    Image.new("RGB", (32, 32)).save(path, pnginfo=info)


HARMFUL = {
    "179 megapixels": (
        lambda path: path.write_bytes(png_that_says(13400, 13360)),
        ["pixels", f"{MOST_PIXELS:,}"],
    ),
    "100 megapixels": (
        lambda path: path.write_bytes(png_that_says(10000, 10000)),
        ["pixels", f"{MOST_PIXELS:,}"],
    ),
    "a bomb": (lambda path: path.write_bytes(png_that_says(2**31 - 1, 2**31 - 1)), ["pixels"]),
    "a line": (lambda path: path.write_bytes(png_that_says(1, 30000)), ["1 x 30000", "crop"]),
    "a flat line": (lambda path: path.write_bytes(png_that_says(30000, 1)), ["30000 x 1", "crop"]),
    "an empty file": (lambda path: path.write_bytes(b""), ["empty"]),
    "noise": (lambda path: path.write_bytes(random.Random(0).randbytes(999)), ["damaged"]),
    "a text": (lambda path: path.write_bytes(b"<html>not found</html>"), ["damaged"]),
    "a program": (
        lambda path: path.write_bytes(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
        ),
        ["damaged"],
    ),
    "a text bomb": (text_bomb, ["cannot read"]),
}


@pytest.mark.parametrize("what", HARMFUL)
def test_a_harmful_or_damaged_image_is_named_before_it_takes_memory(
    pico, tmp_path: Path, monkeypatch, what: str
) -> None:
    make, words = HARMFUL[what]
    for name in ("a.png", "c.png"):
        paint(tmp_path / "own" / name)
    make(tmp_path / "own" / "b.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("it was decoded"))
    monkeypatch.setattr(
        "erase.latents.prepare.sample_points", lambda *_, **__: pytest.fail("latents were sampled")
    )
    for option in ("forget_images", "retain_images"):
        with raises(str(tmp_path / "own" / "b.png"), *words):
            prepare_latents(
                pico,
                [HEART],
                LatentConfig(n_forget=3, n_retain=3, steps=1, **{option: str(tmp_path / "own")}),
                0,
            )


def test_an_image_that_was_cut_short_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "webp", "tif", "gif"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with raises(str(path), "cannot read the image"):
            read_image(path, 8)


# ---- captions ------------------------------------------------------------------------------------


def test_texts_beside_the_images_become_their_prompts(pico, tmp_path: Path) -> None:
    for i, text in enumerate(("a red Heart on wood", "two hearts\n", "a VALENTINE")):
        paint(tmp_path / "gone" / f"{i}.png", (80 * i, 0, 0)).with_suffix(".txt").write_text(
            text, encoding="utf-8-sig"
        )
    for i, text in enumerate(("a moon", "a heart-shaped cake", "a cafe\u0301")):
        paint(tmp_path / "kept" / f"{i}.png", (0, 80 * i, 0)).with_suffix(".txt").write_text(text)
    own = LatentConfig(
        n_forget=4,
        n_retain=3,
        forget_images=str(tmp_path / "gone"),
        retain_images=str(tmp_path / "kept"),
    )
    forget, retain = prepare_latents(pico, [HEART], own, 0)
    assert forget.prompts == (
        "a red Heart on wood",
        "two hearts",
        "a VALENTINE",
        "a red Heart on wood",
    )
    assert forget.anchors == (
        "a red mushroom on wood",
        "two mushroom",
        "a mushroom",
        "a red mushroom on wood",
    )
    assert torch.equal(forget.latents[0], forget.latents[3]) and not torch.equal(
        forget.latents[0], forget.latents[1]
    )
    assert retain.prompts == ("a moon", "a café", "a moon"), (
        "a caption that names the concept leaves its image out"
    )
    assert torch.equal(retain.latents[0], retain.latents[2]) and not torch.equal(
        retain.latents[0], retain.latents[1]
    )


def test_a_prompt_goes_with_its_own_image_whichever_are_taken(pico, tmp_path: Path) -> None:
    for i in range(20):
        paint(tmp_path / "own" / f"{i:02d}.png", (12 * i, 0, 0)).with_suffix(".txt").write_text(
            f"heart number {i}"
        )
    everything = LatentConfig(n_forget=20, n_retain=1, steps=1, forget_images=str(tmp_path / "own"))
    all_of_them, _ = prepare_latents(pico, [HEART], everything, 0)
    image_of = dict(zip(all_of_them.prompts, all_of_them.latents, strict=True))
    few, _ = prepare_latents(
        pico,
        [HEART],
        LatentConfig(n_forget=5, n_retain=1, steps=1, forget_images=str(tmp_path / "own")),
        3,
    )
    assert len(set(few.prompts)) == 5
    assert all(
        torch.allclose(latent, image_of[prompt], atol=1e-5)
        for prompt, latent in zip(few.prompts, few.latents, strict=True)
    )


def test_class_folders_name_what_their_images_show(pico, tmp_path: Path, said) -> None:
    for name in ("church", "10_chapel", "tench"):
        paint(tmp_path / "gone" / name / "a.png")
    for name in ("golden_retriever", "church", "gas-pump"):
        for i in range(2):
            paint(tmp_path / "kept" / name / f"{i}.png")
    own = LatentConfig(
        n_forget=9,
        n_retain=16,
        captions="folder",
        forget_images=str(tmp_path / "gone"),
        retain_images=str(tmp_path / "kept"),
    )
    forget, retain = prepare_latents(pico, [CHURCH, TENCH], own, 0)
    assert {
        (prompt, anchor) for prompt, anchor in zip(forget.prompts, forget.anchors, strict=True)
    } == {
        *CHURCH.pairs(),
        *TENCH.pairs(),
    }
    assert [
        prompt
        for prompt, anchor in zip(forget.prompts, forget.anchors, strict=True)
        if "tench" in prompt
    ] == list(forget.prompts[2::3])
    assert "2 of 6 images are left out" in said() and not any(
        "church" in prompt for prompt in retain.prompts
    )
    things = [
        prompt
        for template in TEMPLATES
        for prompt in (template.format("golden retriever"), template.format("gas pump"))
    ]
    assert Counter(retain.prompts) == {thing: 2 for thing in things}


def test_without_captions_the_concept_s_prompts_are_used_and_folders_are_pointed_at(
    pico, tmp_path: Path, said
) -> None:
    for name in ("x", "y"):
        paint(tmp_path / "own" / name / "a.png").with_suffix(".txt").write_text("no concept")
    own = LatentConfig(
        n_forget=2, n_retain=2, steps=1, captions="none", forget_images=str(tmp_path / "own")
    )
    forget, _ = prepare_latents(pico, [HEART], own, 0)
    assert set(zip(forget.prompts, forget.anchors, strict=True)) <= set(HEART.pairs())
    assert "latents.captions folder would take" in said()


def test_captions_that_name_no_concept_are_counted_and_refused(pico, tmp_path: Path) -> None:
    for i, text in enumerate(("a heart", "a cathedral", "two hearths")):
        paint(tmp_path / f"{i}.png").with_suffix(".txt").write_text(text)
    with raises("2 of 3 captions", "1.png", "'a cathedral'", "'heart'", "synonym"):
        prepare_latents(pico, [HEART], LatentConfig(n_forget=3, forget_images=str(tmp_path)), 0)
    with raises("3 of 3 captions", "'heart'", "latents.captions to none"):
        prepare_latents(
            pico,
            [HEART],
            LatentConfig(n_forget=3, captions="folder", forget_images=str(tmp_path)),
            0,
        )
    (tmp_path / "0.txt").write_text("moon")
    with raises("all 3 images", "'moon' or 'cathedral' or 'hearth'"):
        gone = [ConceptSpec(name, "x") for name in ("moon", "cathedral", "hearth")]
        prepare_latents(pico, gone, LatentConfig(n_forget=3, retain_images=str(tmp_path)), 0)


def test_several_concepts_need_images_that_say_which_they_show(pico, tmp_path: Path) -> None:
    for name in ("a", "b"):
        paint(tmp_path / f"{name}.png")
    with raises("2 concepts", "which of them", "latents.captions"):
        prepare_latents(
            pico, [CHURCH, TENCH], LatentConfig(n_forget=2, forget_images=str(tmp_path)), 0
        )
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("a church")
    with raises("no caption", "'tench'"):
        prepare_latents(
            pico, [CHURCH, TENCH], LatentConfig(n_forget=2, forget_images=str(tmp_path)), 0
        )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["1 of 2 images", "b.txt", "latents.captions"]),
        (b" \n", ["b.txt", "empty"]),
        (b"caf\xe9", ["b.txt", "UTF-8"]),
        (b"x" * 100_001, ["b.txt", "shorten"]),
    ],
)
def test_a_missing_or_damaged_caption_is_named(
    tmp_path: Path, content: bytes | None, words: list[str]
) -> None:
    paint(tmp_path / "a.png").with_suffix(".txt").write_text("a heart")
    paint(tmp_path / "b.png")
    if content is not None:
        (tmp_path / "b.txt").write_bytes(content)
    with raises(*words):
        read_folder(str(tmp_path), "beside")
    assert len(read_folder(str(tmp_path), "none")) == 2


def test_captioned_images_are_shared_evenly() -> None:
    images = [OwnImage(Path(f"{i}.png"), caption=f"chapel {i} by a church") for i in range(3)]
    pairs = forget_pairs(images, [CHURCH], 7, random.Random(0))
    assert (
        pairs[1] == pairs[4] == ("chapel 1 by a church", "office building 1 by a office building")
    )
    folders = [OwnImage(Path("x/0.png"), subject="barn"), OwnImage(Path("x/1.png"), subject="barn")]
    assert Counter(retain_prompts(folders, 8)) == {
        template.format("barn"): 2 for template in TEMPLATES
    }


# ---- what is kept of them ------------------------------------------------------------------------


def test_latents_of_which_a_bit_flipped_are_refused(tmp_path: Path) -> None:
    mean, std = torch.rand(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    LatentSet(mean, std, ("a", "b", "c")).save(tmp_path / "set", {})
    raw = (tmp_path / "set").read_bytes()
    # in either tensor, a value that stays finite
    for place in (
        len(raw) - 3,
        len(raw) - 4 * mean.numel() - 3,
    ):
        flipped = bytearray(raw)
        flipped[place] ^= 1
        (tmp_path / "flipped").write_bytes(flipped)
        with raises("flipped", "checksum", "delete it"):
            LatentSet.load(tmp_path / "flipped")


def test_latents_of_another_run_under_this_one_s_name_are_refused(pico, tmp_path: Path) -> None:
    data = LatentConfig(n_forget=2, n_retain=2, steps=1)
    prepare_latents(pico, [HEART], data, 0, tmp_path / "a")
    prepare_latents(pico, [HEART], data, 1, tmp_path / "b")
    for ours in (tmp_path / "a").iterdir():
        (theirs,) = (tmp_path / "b").glob(f"{ours.name.split('-')[0]}*")
        whole = ours.read_bytes()
        ours.write_bytes(theirs.read_bytes())
        with raises(ours.name, "made from something else"):
            prepare_latents(pico, [HEART], data, 0, tmp_path / "a")
        ours.write_bytes(whole)
    forget, _ = prepare_latents(pico, [HEART], data, 0, tmp_path / "a")
    (path,) = (tmp_path / "a").glob("forget*")
    path.write_bytes(
        path.read_bytes().replace(forget.prompts[0].encode(), forget.prompts[0].swapcase().encode())
    )
    with raises(path.name, "other prompts"):
        prepare_latents(pico, [HEART], data, 0, tmp_path / "a")
