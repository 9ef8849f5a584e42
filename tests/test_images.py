"""ImageSet: a folder opens only if it is complete and every image is the one that was made."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from erase.eval.case import Case
from erase.eval.evaluators import classifier, clip, nudenet
from erase.eval.evaluators.retained import pixels as stacked
from erase.eval.evaluators.retained import reference_features
from erase.eval.images import (
    MANIFEST,
    SETTINGS,
    ImageRow,
    ImageSet,
    holds_image,
    save_image,
    write_manifest,
    write_settings,
)
from erase.files import file_sha256
from erase.latents.image_files import read_image
from erase.prompts.errors import ErasureError

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = []
    for case, pixels in enumerate(PIXELS):
        file = f"{case:05d}.png"
        save_image(tmp_path / file, pixels, {"case": case})
        labels = {"object": "caf\u00e9 \U0001f600"}
        rows.append(
            ImageRow(file, case, f"a {case}", case, 7.5, labels, file_sha256(tmp_path / file) or "")
        )
    write_settings(tmp_path, {"images": 3, "scheduler": "ddim"})
    write_manifest(tmp_path, reversed(rows))
    return tmp_path


def test_what_was_written_is_read(folder: Path):
    images = ImageSet.open(folder)
    assert [row.case for row in images.rows] == [0, 1, 2]
    assert images.settings["scheduler"] == "ddim"
    assert images.rows[1].labels == {"object": "caf\u00e9 \U0001f600"}
    assert (np.asarray(images.image(images.rows[1])) == PIXELS[1]).all()
    assert images.tensor().shape == (3, 3, 8, 8)
    assert images.tensor().dtype == torch.float32
    assert torch.equal(
        images.tensor([images.rows[2]])[0], torch.from_numpy(PIXELS[2]).permute(2, 0, 1) / 255
    )


def delete_image(folder: Path) -> None:
    (folder / "00001.png").unlink()


def cut_image(folder: Path) -> None:
    path = folder / "00001.png"
    path.write_bytes(path.read_bytes()[:-20])


def swap_image(folder: Path) -> None:
    shutil.copy(folder / "00002.png", folder / "00001.png")


def empty_image(folder: Path) -> None:
    (folder / "00001.png").write_bytes(b"")


def shorten_manifest(folder: Path) -> None:
    lines = (folder / MANIFEST).read_text().splitlines(keepends=True)
    (folder / MANIFEST).write_text("".join(lines[:2]))


def cut_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-20])


def delete_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


DAMAGE = [
    (delete_image, "00001.png is missing"),
    (cut_image, "00001.png is cut short or changed"),
    (swap_image, "00001.png is cut short or changed"),
    (empty_image, "00001.png is cut short or changed"),
    (shorten_manifest, "lists 2 of 3 images"),
    (cut_manifest, "line 3, is damaged"),
    (delete_manifest, "is not finished"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGE)
def test_a_damaged_folder_is_refused_with_the_file_and_the_way_out(folder: Path, damage, says):
    damage(folder)
    with pytest.raises(
        ErasureError, match=f"{says}.*; generate into .* with the same settings again"
    ):
        ImageSet.open(folder)


def test_the_way_out_is_the_command_if_the_settings_know_it(folder: Path):
    write_settings(folder, {"images": 3, "command": "make pictures"})
    delete_image(folder)
    with pytest.raises(ErasureError, match="missing; run `make pictures` again"):
        ImageSet.open(folder)


def test_nobody_is_told_to_delete_a_file_that_stands_where_a_folder_should(tmp_path: Path):
    (tmp_path / "prompts.csv").write_text("mine")
    for folder in (tmp_path / "prompts.csv", tmp_path / "prompts.csv" / "base"):
        with pytest.raises(ErasureError, match="is a file, or lies below one; choose a folder"):
            ImageSet.open(folder)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (None, "is no image set"),
        ("{", "cannot be read"),
        ("[]", "how many images"),
        (json.dumps({"images": "3"}), "how many images"),
    ],
)
def test_a_folder_without_proper_settings_is_refused(folder: Path, settings, says):
    (folder / SETTINGS).unlink() if settings is None else (folder / SETTINGS).write_text(settings)
    with pytest.raises(ErasureError, match=says):
        ImageSet.open(folder)


def test_a_png_knows_what_it_was_made_from(folder: Path):
    path = folder / "00001.png"
    assert holds_image(path, {"case": 1})
    assert not holds_image(path, {"case": 2})
    assert not holds_image(folder / "00009.png", {"case": 9})


@pytest.mark.parametrize("damage", [delete_image, cut_image, swap_image, empty_image])
def test_a_damaged_png_is_not_the_image(folder: Path, damage):
    damage(folder)
    assert not holds_image(folder / "00001.png", {"case": 1})


def test_a_repainted_png_is_not_the_image(folder: Path):
    path, marks = folder / "00001.png", PngInfo()
    with Image.open(path) as image:
        for key, text in image.info.items():
            marks.add_text(key, text)
        painted = np.asarray(image).copy()
    painted[0, 0, 0] ^= 1
    Image.fromarray(painted).save(path, pnginfo=marks)
    assert not holds_image(path, {"case": 1})


# ---- images that would fill the memory ----


def png(width: int, height: int) -> bytes:
    """A PNG of zeros that unpacks to width x height pixels; of a high one the rest is not
    written."""
    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    row, packer = bytes(width + 1), zlib.compressobj(1)
    body = b"".join(packer.compress(row) for _ in range(min(height, 300))) + packer.flush()
    chunks = ((b"IHDR", size), (b"IDAT", body), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def image_set(folder: Path, *files: bytes) -> ImageSet:
    """A folder whose manifest vouches for the files, as one that was downloaded may."""
    rows = []
    for case, content in enumerate(files):
        (folder / f"{case}.png").write_bytes(content)
        labels = {"object": "heart", "style": "Flat", "colour": "red"}
        # 178 megapixels: of these Pillow only warns
        rows.append(
            ImageRow(
                f"{case}.png",
                case,
                "a heart",
                0,
                1.0,
                labels,
                file_sha256(folder / f"{case}.png") or "",
            )
        )
    write_settings(folder, {"images": len(rows)})
    write_manifest(folder, rows)
    return ImageSet.open(folder)


@pytest.fixture
def unpacked(monkeypatch) -> list[tuple[int, int]]:
    """Sizes of the images whose pixels Pillow was asked for."""
    sizes, load = [], PngImageFile.load_prepare

    def told(image) -> None:
        sizes.append(image.size)
        load(image)

    monkeypatch.setattr(PngImageFile, "load_prepare", told)
    return sizes


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (
            (13_350, 13_350),
            "0.png is 13350 x 13350 pixels",
        ),
        ((20_000, 20_000), "0.png has too many pixels"),
        ((30_000, 1), "0.png is 30000 x 1 pixels"),
        ((1, 30_000), "0.png is 1 x 30000 pixels"),
        ((8193, 8193), "0.png is 8193 x 8193 pixels"),
    ],
)
def test_a_huge_image_in_a_set_is_refused_before_it_is_unpacked(
    size: tuple[int, int], says: str, unpacked, tmp_path: Path
):
    images = image_set(tmp_path, png(*size))
    judges = {
        "classifier": lambda: classifier.evaluate(Case(images), classifier.Config()),
        "clip": lambda: clip.evaluate(Case(images), clip.Config(device="cpu")),
        "nudenet": lambda: nudenet.evaluate(Case(images), nudenet.Config()),
        "nudenet by path": lambda: nudenet.evaluate(
            Case(images), nudenet.Config(preset="as-published")
        ),
        "page": lambda: images.image(images.rows[0]),
    }
    for judge in judges.values():
        with pytest.raises(ErasureError, match=f"{says}.*make it smaller"):
            judge()
    assert not holds_image(tmp_path / "0.png", {})
    assert unpacked == []


def test_a_large_image_is_taken(unpacked, tmp_path: Path):
    images = image_set(tmp_path, png(4096, 300))
    assert [images.image(images.rows[0]).size] == [(4096, 300)] == unpacked


@pytest.mark.parametrize(
    "content", [b"", b"GIF", png(8, 8)[:40], png(8, 8).replace(b"IHDR", b"IHDX")]
)
def test_a_file_that_is_no_image_is_named(content: bytes, tmp_path: Path):
    images = image_set(tmp_path, content)
    with pytest.raises(ErasureError, match=r"0\.png cannot be read as an image"):
        images.image(images.rows[0])


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"


def test_no_image_starts_a_program(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("it started"))
    images = image_set(tmp_path, EPS)
    with pytest.raises(ErasureError, match=r"0\.png cannot be read as an image"):
        images.image(images.rows[0])
    assert not holds_image(tmp_path / "0.png", {})


def test_whatever_a_decoder_raises_names_the_image(tmp_path: Path, monkeypatch):
    def upset(_) -> None:
        raise RuntimeError("Failed to decode image")  # as AVIF's does

    monkeypatch.setattr(PngImageFile, "load_prepare", upset)
    images = image_set(tmp_path, png(8, 8))
    with pytest.raises(ErasureError, match=r"0\.png cannot be read .*Failed to decode image"):
        images.image(images.rows[0])
    assert not holds_image(tmp_path / "0.png", {})


ODD = {
    "grey of 16 bits": (np.full((8, 8), 32896, np.uint16), {}, 128),
    "transparent": (np.zeros((8, 8, 4), np.uint8), {}, 255),
    "transparent grey": (np.zeros((8, 8, 2), np.uint8), {}, 255),
    "a transparent colour": (np.full((8, 8), 5, np.uint8), {"transparency": 5}, 255),
}


@pytest.mark.parametrize("pixels, options, value", ODD.values(), ids=ODD)
def test_images_are_judged_as_own_images_are_read(pixels, options, value, tmp_path: Path):
    Image.fromarray(pixels).save(tmp_path / "a.png", **options)
    images = image_set(tmp_path, (tmp_path / "a.png").read_bytes())
    seen = np.asarray(images.image(images.rows[0]))
    own = (read_image(tmp_path / "a.png", 8) + 1) * 127.5
    assert (seen == value).all() and (own.round() == value).all()


def test_reference_images_are_read_as_judged_ones(tmp_path: Path):
    for case in range(3):
        Image.new("LA", (8, 8)).save(tmp_path / f"{case}.png")
    found = reference_features(str(tmp_path), lambda seen: stacked(seen).flatten(1), 3)
    assert (found == 255).all()


def test_images_of_several_sizes_are_not_stacked(tmp_path: Path):
    with pytest.raises(ErasureError, match="are of several sizes; make them one size"):
        image_set(tmp_path, png(8, 8), png(8, 9)).tensor()
