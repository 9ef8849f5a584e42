"""One image file of a user's: which formats are read, what is refused before it is decoded, and the
pixels as a model sees them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from erase.prompts.errors import ErasureError, reason

if TYPE_CHECKING:
    from PIL import Image

# Only these decoders see the bytes, whatever a file is called: others start programs (EPS) or read
# what is no photograph.
FORMATS = (
    "PNG",
    "JPEG",
    "MPO",
    "WEBP",
    "BMP",
    "DIB",
    "TIFF",
    "GIF",
    "AVIF",
    "HEIF",
    "JPEG2000",
    "PPM",
    "TGA",
    "QOI",
)
# not MPO: the second picture of a telephone's is a depth map
ANIMATED = (
    "PNG",
    "GIF",
    "WEBP",
    "AVIF",
    "TIFF",
)
MOST_PIXELS = 89_478_485  # Pillow's own bound for what may be a bomb
MOST_LENGTHS = (
    20  # long side by short side: the rest of a longer image's pixels would be thrown away
)


def suffixes() -> set[str]:
    """Suffixes of the formats that the Pillow which is installed reads."""
    from PIL import Image

    known = decoders()
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in known}


def decoders() -> list[str]:
    """The formats that the Pillow which is installed reads, for its `Image.open`."""
    from PIL import Image

    Image.init()
    return [kind for kind in FORMATS if kind in Image.OPEN]


def read_image(path: Path, size: int) -> Tensor:
    """An image as the VAE takes it: upright, short side to `size` (bicubic), centre crop, shape (3,
    size, size), [-1, 1].

    Raises:
        ErasureError: it cannot be read, and why.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

    with opened(path) as file:
        image = as_seen(file)
    image = center_crop(resize(image, [size], InterpolationMode.BICUBIC), [size])
    return pil_to_tensor(image).float() / 127.5 - 1


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image file whose head was read, and is within bounds; whatever goes wrong with it in the
    block names it."""
    from PIL import Image

    try:
        if not path.stat().st_size:
            raise ErasureError(f"cannot read the image {path}: it is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=decoders()) as file:
                _check_size(path, *file.size)
                yield file
    except (ErasureError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(path, "too many") from error
    except Image.UnidentifiedImageError as error:
        raise ErasureError(
            f"cannot read the image {path}: it is none, or damaged; take it out of the folder"
        ) from error
    except Exception as error:  # decoders raise what they like
        raise ErasureError(
            f"cannot read the image {path}: {reason(error)}; mend it or take it out of the folder"
        ) from error


def as_seen(file: Image.Image) -> Image.Image:
    """Upright, in eight bits of red, green and blue; what is transparent is white.

    Raises:
        ValueError: grey values outside of 16 bits, or of 0 to 1 where they are floats.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert("RGB")


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise _too_large(path, f"{width} x {height}")
    if max(width, height) > MOST_LENGTHS * min(width, height):
        raise ErasureError(
            f"cannot take the image {path}: of {width} x {height} pixels, only a square in the "
            f"middle would be seen; crop it, to at most {MOST_LENGTHS} times as long as wide"
        )


def _too_large(path: Path, pixels: str) -> ErasureError:
    return ErasureError(
        f"cannot take the image {path}: it has {pixels} pixels; make it smaller, at most "
        f"{MOST_PIXELS:,}"
    )


def _eight_bits(image: Image.Image) -> np.ndarray[Any, Any]:
    """Grey values of 16 bits, or from 0 to 1, scaled to 0 to 255, which `convert` would cut off
    there."""
    grey, top = np.asarray(image), 1.0 if image.mode == "F" else 65535.0
    if not ((grey >= 0) & (grey <= top)).all():
        raise ValueError(f"it has grey values outside of 0 to {top:g}")
    scaled = (grey * np.float32(255.0 / top)).round().astype(np.uint8)
    return np.where(grey == image.info.get("transparency", -1), np.uint8(255), scaled)
