"""ImageSet: a folder opens only if it is complete and every image is the one that was made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from erase.files import file_sha256
from eval.images import (
    MANIFEST,
    SETTINGS,
    ImageRow,
    ImageSet,
    holds_image,
    save_image,
    write_manifest,
    write_settings,
)
from prompts.errors import ErasureError

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = []
    for case, pixels in enumerate(PIXELS):
        file = f"{case:05d}.png"
        save_image(tmp_path / file, pixels, {"case": case})
        labels = {"object": "caf\u00e9 \U0001f600"}
        rows.append(ImageRow(file, case, f"a {case}", case, 7.5, labels, file_sha256(tmp_path / file) or ""))
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
    assert torch.equal(images.tensor([images.rows[2]])[0], torch.from_numpy(PIXELS[2]).permute(2, 0, 1) / 255)


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
    with pytest.raises(ErasureError, match=f"{says}.*; generate into .* with the same settings again"):
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
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    path, marks = folder / "00001.png", PngInfo()
    with Image.open(path) as image:
        for key, text in image.info.items():
            marks.add_text(key, text)
        painted = np.asarray(image).copy()
    painted[0, 0, 0] ^= 1
    Image.fromarray(painted).save(path, pnginfo=marks)
    assert not holds_image(path, {"case": 1})
