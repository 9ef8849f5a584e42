"""A user's own images: which files of a folder are taken, and what their captions say."""

from __future__ import annotations

import logging
import os
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from erase.latents.image_files import ANIMATED, opened, suffixes
from erase.prompts.errors import ErasureError, counted
from erase.prompts.reading import read_text

log = logging.getLogger("erase")

NO_IMAGES = {".txt", "thumbs.db", "desktop.ini"}  # which lie beside images and are not missed
LONGEST_CAPTION = 100_000  # bytes


@dataclass(frozen=True)
class OwnImage:
    """One image of the user's."""

    path: Path
    caption: str | None = None
    """what it shows, in the user's words"""
    subject: str | None = None
    """the name of the folder that it lies in, as words"""

    @property
    def words(self) -> str | None:
        """What says what it shows."""
        return self.subject if self.caption is None else self.caption


def read_folder(folder: str, captions: str) -> list[OwnImage]:
    """The images of a folder and of those in it, folder by folder, by name; what is passed over is
    said.

    Hidden files and links that lead back are not followed.

    Args:
        folder: of the images.
        captions: `beside` takes the text files of the same name, where there are any; `folder` the
            folders' names; `none` neither.

    Raises:
        ErasureError: no folder, one that cannot be read or has no images, or images without a
            caption among others with one.
    """
    files, skipped = [], Counter[str]()
    known = suffixes()
    for path in _walk(folder):
        suffix = path.suffix.lower()
        if suffix in known and path.is_file():
            files.append(path)
        elif not {suffix, path.name.lower()} & NO_IMAGES:
            skipped[suffix if path.is_file() else "broken links and devices"] += 1
    passed = ", ".join(
        f"{count} {suffix or 'without a suffix'}" for suffix, count in skipped.most_common(8)
    )
    if not files:
        also = (
            f"; of what is there, none can be read ({passed}): convert it to PNG or JPEG"
            if passed
            else ""
        )
        raise ErasureError(
            f"no images (.png, .jpg, .webp, ...) in {folder}{also}; give another folder or leave "
            "it out to sample them"
        )
    if passed:
        log.info(
            "%s: %s skipped as no image (%s)", folder, counted(skipped.total(), "file"), passed
        )
    if captions == "folder":
        return [OwnImage(path, subject=_subject(path.parent)) for path in files]
    return [OwnImage(path) for path in files] if captions == "none" else _with_texts(files, folder)


def take(
    folder: str, images: Sequence[OwnImage], count: int, seed: int, what: str
) -> list[OwnImage]:
    """At most `count` of the images of a folder, spread over all of them; how many of how many is
    said."""
    taken = spread(images, count, seed)
    folders = len({image.path.parent for image in images})
    much = (
        f"{len(taken):,} of {len(images):,}" if len(taken) < len(images) else f"all {len(images):,}"
    )
    log.info(
        "%s: %s images of %s are taken, from %s, for %s",
        what,
        much,
        folder,
        counted(folders, "folder"),
        counted(count, "latent"),
    )
    if folders > 1 and images[0].words is None:
        log.info(
            "%s: latents.captions folder would take the folders' names as what their images show",
            what,
        )
    return taken


def spread(images: Sequence[OwnImage], count: int, seed: int) -> list[OwnImage]:
    """At most `count` of the images, each folder's share chosen at random: a function of the seed
    alone."""
    rng = random.Random(seed)
    if len(images) <= count:
        return list(images)
    folders: dict[Path, list[OwnImage]] = {}
    for image in images:
        folders.setdefault(image.path.parent, []).append(image)
    mixed = [image for one in folders.values() for image in rng.sample(one, len(one))]
    start = rng.random()
    return [mixed[int((i + start) * len(mixed) / count)] for i in range(count)]


def look_at(images: Sequence[OwnImage], size: int, what: str) -> None:
    """Read the images' heads, before anything is made: refuse what cannot be taken, and say what
    will be done to the others.

    Args:
        images: to encode.
        size: side of the model's images, pixels.
        what: names the option.

    Raises:
        ErasureError: a file that is no image, or too large or too long a one.
    """
    small, animated = [], 0
    for image in images:
        with opened(image.path) as file:
            small += [min(file.size)] if min(file.size) < size else []
            animated += file.format in ANIMATED and getattr(file, "is_animated", False)
    if small:
        log.info(
            "%s: %d of %d images are upscaled to %d pixels (the smallest has %d)",
            what,
            len(small),
            len(images),
            size,
            min(small),
        )
    if animated:
        log.info(
            "%s: %d of %d images have several frames, of which the first is taken",
            what,
            animated,
            len(images),
        )


def _walk(folder: str) -> Iterator[Path]:
    """Every file that is not hidden; folders behind links too, each once."""

    def refuse(error: OSError) -> None:
        raise ErasureError(
            f"cannot read the folder {error.filename}: {error.strerror}; check the path"
        ) from error

    try:
        if not os.path.isdir(folder):
            what = (
                "is a file; give the folder that it lies in"
                if os.path.exists(folder)
                else "is not there; check the path"
            )
            raise ErasureError(f"no images: the folder {folder} {what}")
        seen = {os.path.realpath(folder)}
        for at, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
            real = {
                os.path.realpath(os.path.join(at, name)): name
                for name in sorted(folders, reverse=True)
                if _shown(name)
            }
            folders[:] = sorted(name for place, name in real.items() if place not in seen)
            seen |= real.keys()
            yield from (Path(at, name) for name in sorted(names) if _shown(name))
    except ErasureError:
        raise
    except ValueError as error:  # a path with a NUL in it
        raise ErasureError(f"cannot read the folder {folder!r}: {error}; check the path") from error


def _shown(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _subject(folder: Path) -> str:
    """A folder's name as words; a number before it, of times to repeat, is the form of other
    trainers."""
    name = re.sub(r"^\d+_(?=\D)", "", folder.resolve().name)
    return " ".join(re.sub(r"[_\-]", " ", name).split()) or name


def _with_texts(files: list[Path], folder: str) -> list[OwnImage]:
    """Each image with the text file of the same name beside it, where there are any."""
    texts = [path.with_suffix(".txt") for path in files]
    bare = [path for path, text in zip(files, texts, strict=True) if not text.is_file()]
    if len(bare) == len(files):
        return [OwnImage(path) for path in files]
    if bare:
        raise ErasureError(
            f"{len(bare)} of {len(files)} images in {folder} have no caption beside them, "
            f"{bare[0].with_suffix('.txt')} for one; write them, or set latents.captions to none"
        )
    return [OwnImage(path, caption=_caption(text)) for path, text in zip(files, texts, strict=True)]


def _caption(path: Path) -> str:
    if path.stat().st_size > LONGEST_CAPTION:
        raise ErasureError(
            f"{path} has {path.stat().st_size:,} bytes, which is no caption; shorten it"
        )
    if text := " ".join(unicodedata.normalize("NFC", read_text(path)).split()):
        return text
    raise ErasureError(
        f"the caption {path} is empty; write what the image shows, or set latents.captions to none"
    )
