"""ImageSet: a folder of generated images, and the manifest that says how each was made and proves
that it still is that image.

On disk: `settings.json` (how all were made), `manifest.jsonl` (one ImageRow a line, by case),
`00000.png`, `00001.png`, … The manifest is written last, so a folder that has one was finished.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from erase.files import atomic_write, file_sha256
from erase.latents.image_files import as_seen, decoders
from erase.prompts.errors import ErasureError, reason
from erase.prompts.prompt_rows import PromptRow
from erase.prompts.reading import as_path, why

SETTINGS, MANIFEST = "settings.json", "manifest.jsonl"
MOST_SIDE, MOST_LENGTHS = 8192, 20
"""longest side of an image in pixels, and in its short sides: judges pad an image to a square, or
scale it by its short side"""
PNG_END = (
    b"IEND\xaeB`\x82"  # Pillow reads a file whose end was cut off, as long as all pixels are there
)


@dataclass(frozen=True)
class ImageRow:
    """One image and what it was made from."""

    file: str
    """name within the folder"""
    case: int
    prompt: str
    seed: int
    guidance: float
    """classifier-free guidance scale, as diffusers counts it: 1 is none"""
    labels: Mapping[str, str]
    """what the prompt asks for, e.g. {"object": "heart"}"""
    sha256: str
    """of the file's bytes"""


@dataclass(frozen=True)
class ImageSet:
    """A complete, verified folder of images."""

    folder: Path
    rows: list[ImageRow]
    """sorted by case"""
    settings: dict[str, Any]
    """model fingerprint, delta, prompt set, scheduler, steps, guidance, resolution, …; `images` is
    how many there are"""

    @classmethod
    def open(cls, folder: str | Path) -> ImageSet:
        """Read a folder that `erase.eval.generate` has finished, and verify each image against the
        manifest.

        Raises:
            ErasureError: the folder is not an image set, is unfinished, or an image is missing, cut
                short or changed.
        """
        folder = Path(folder)
        settings = read_settings(folder)
        if settings is None:
            raise ErasureError(
                f"{folder} is no image set: it has no {SETTINGS}; generate images into it first"
            )
        rows = _read_manifest(folder, settings)
        if len(rows) != settings["images"]:
            raise ErasureError(
                f"{folder / MANIFEST} lists {len(rows)} of {settings['images']} images; "
                f"{_remedy(folder, settings)}"
            )
        with ThreadPoolExecutor() as pool:
            for row, digest in zip(
                rows, pool.map(lambda row: file_sha256(folder / row.file), rows), strict=True
            ):
                if digest != row.sha256:
                    what = "missing" if digest is None else "cut short or changed since it was made"
                    raise ErasureError(
                        f"{folder / row.file} is {what}; {_remedy(folder, settings)}"
                    )
        return cls(folder, rows, settings)

    def path(self, row: ImageRow) -> Path:
        """Where the row's image is."""
        return self.folder / row.file

    def image(self, row: ImageRow) -> Image.Image:
        """The row's image, in RGB (`read`)."""
        return read(self.path(row))

    def tensor(self, rows: Iterable[ImageRow] | None = None) -> Tensor:
        """The images of `rows` (default: all of them), shape (n, 3, H, W), float32 in [0, 1]."""
        pixels = [np.asarray(self.image(row)) for row in (self.rows if rows is None else rows)]
        if len({image.shape for image in pixels}) > 1:
            raise ErasureError(
                f"the images in {self.folder} are of several sizes; make them one size to judge "
                "them together"
            )
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255


def read(file: Path) -> Image.Image:
    """An image file as it is seen (`erase.latents.image_files.as_seen`).

    Raises:
        ErasureError: it is no image, or too large or too long to be judged; its pixels are not
            unpacked then.
    """
    with opened(file, str(file)) as image:
        return as_seen(image)


@contextmanager
def opened(file: Path | BytesIO, name: str) -> Iterator[Image.Image]:
    """An image file, its size checked before its pixels are unpacked; what is wrong with it in the
    block becomes one error.

    Raises:
        ErasureError: it is no image, or larger or longer than `MOST_SIDE` and `MOST_LENGTHS`; it is
            called `name`.
    """
    try:
        with warnings.catch_warnings():
            # the bound below is a narrower one
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=decoders())
        with image:
            long, short = max(image.size), min(image.size)
            if long > min(MOST_SIDE, MOST_LENGTHS * short):
                raise ErasureError(
                    f"{name} is {image.width} x {image.height} pixels; an image may have "
                    f"{MOST_SIDE} a side and be {MOST_LENGTHS} times as long as it is wide: make "
                    "it smaller or leave it out"
                )
            yield image
    except (ErasureError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ErasureError(
            f"{name} has too many pixels ({reason(error)}); make it smaller or leave it out"
        ) from error
    except Exception as error:  # decoders raise what they like
        raise ErasureError(
            f"{name} cannot be read as an image ({reason(error)}); make it again or leave it out"
        ) from error


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The content of `settings.json`, or None if there is none.

    Raises:
        ErasureError: `folder` is a file; it is not JSON, or does not say how many images there are.
    """
    path = as_path(folder) / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise ErasureError(
            f"{folder} is a file, or lies below one; choose a folder for the images"
        ) from error
    except OSError as error:
        raise ErasureError(f"cannot read {path}: {why(error)}") from error
    except (ValueError, RecursionError) as error:
        reason = str(error)[:200]
        raise ErasureError(
            f"{path} cannot be read ({reason}); delete {folder} and generate again"
        ) from error
    if not isinstance(settings, dict) or type(settings.get("images")) is not int:
        raise ErasureError(
            f"{path} does not say how many images there are; delete {folder} and generate again"
        )
    return settings


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write `settings.json`; `settings["images"]` is how many images there will be."""
    with atomic_write(folder / SETTINGS) as aside:
        aside.write_text(
            json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def write_manifest(folder: Path, rows: Iterable[ImageRow]) -> None:
    """Declare the folder finished."""
    lines = [
        vars(row) | {"labels": dict(row.labels)} for row in sorted(rows, key=lambda row: row.case)
    ]
    with atomic_write(folder / MANIFEST) as aside:
        aside.write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
        )


def save_image(path: Path, pixels: np.ndarray, made_from: dict[str, Any]) -> None:
    """Write a PNG that also says what it was made from, and the sha256 of its pixels.

    Args:
        pixels: shape (H, W, 3), uint8.
        made_from: plain values: prompt, seed, …
    """
    info = PngInfo()
    for key, text in _marks(pixels, made_from).items():
        info.add_text(key, text)
    with atomic_write(path) as aside:
        Image.fromarray(pixels).save(aside, format="PNG", pnginfo=info)


def holds_image(path: Path, made_from: dict[str, Any]) -> bool:
    """Whether `save_image` wrote this file, with the same `made_from`, and its pixels are
    unchanged."""
    try:
        data = path.read_bytes()
        with opened(BytesIO(data), str(path)) as image:
            pixels, info = np.asarray(image), image.info
    except (OSError, ErasureError):  # absent, or no PNG
        return False
    return data.endswith(PNG_END) and all(
        info.get(key) == text for key, text in _marks(pixels, made_from).items()
    )


def _marks(pixels: np.ndarray, made_from: dict[str, Any]) -> dict[str, str]:
    return {
        "made_from": json.dumps(made_from),
        "pixels": hashlib.sha256(pixels.tobytes()).hexdigest(),
    }


def _read_manifest(folder: Path, settings: dict[str, Any]) -> list[ImageRow]:
    path = folder / MANIFEST
    try:
        # a prompt may hold other line breaks
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise ErasureError(
            f"{folder} is not finished: it has no {MANIFEST}; {_remedy(folder, settings)}"
        ) from None
    except OSError as error:
        raise ErasureError(f"cannot read {path}: {why(error)}") from error
    except UnicodeDecodeError as error:
        raise ErasureError(
            f"{path} cannot be read ({error}); {_remedy(folder, settings)}"
        ) from error
    rows = []
    for number, line in enumerate(lines if lines != [""] else [], 1):
        try:
            rows.append(_row(json.loads(line)))
        except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ErasureError(
                f"{path}, line {number}, is damaged; {_remedy(folder, settings)}"
            ) from error
    return rows


def _row(values: dict[str, Any]) -> ImageRow:
    """A line of the manifest as a row, or a TypeError or ValueError."""
    row = ImageRow(**values)
    for text in (row.file, row.sha256, *row.labels.keys(), *row.labels.values()):
        text.encode()
    if not (type(row.case) is type(row.seed) is int) or type(row.guidance) not in (int, float):
        raise TypeError("numbers")
    PromptRow(row.case, row.prompt, row.seed, row.guidance)  # refuses what nothing was drawn from
    if Path(row.file).name != row.file or "\0" in row.file:
        raise ValueError("an image outside the folder")
    return row


def _remedy(folder: Path, settings: dict[str, Any]) -> str:
    command = settings.get("command")
    again = f"run `{command}`" if command else f"generate into {folder} with the same settings"
    return f"{again} again: it makes what is missing and keeps the rest"
