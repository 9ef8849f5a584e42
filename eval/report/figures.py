"""The report's images: inlined for the page, and the before/after strip."""

from __future__ import annotations

import base64
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from erase.eval.images import ImageRow, ImageSet
from erase.prompts.errors import ErasureError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

LOSSLESS = 128  # px; smaller images are kept exactly, larger ones are shrunk and compressed
INLINE = 256  # px; the side of a large image on the page


def data_uri(image: Image, side: int = INLINE) -> str:
    """The image as a `data:` URI (WebP): exact up to 128 px a side, else at most `side` px."""
    content, image = BytesIO(), image.convert("RGB")
    lossless = max(image.size) <= LOSSLESS
    image.thumbnail((side, side))
    image.save(content, "WEBP", lossless=lossless, quality=82, method=6)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()


def matched(
    before: ImageSet, after: ImageSet, rows: Sequence[ImageRow]
) -> list[tuple[ImageRow, ImageRow]]:
    """Rows of `before`, each with the row of `after` made from the same prompt and seed.

    Raises:
        ErasureError: `after` has no such row, so that the two sets cannot be set side by side.
    """
    others = {(row.case, row.prompt, row.seed): row for row in after.rows}
    for row in rows:
        if (row.case, row.prompt, row.seed) not in others:
            raise ErasureError(
                f"{after.folder} has no image of case {row.case} ({row.prompt!r}, seed {row.seed}) "
                f"to set beside that in {before.folder}; generate both from one prompt set"
            )
    return [(row, others[row.case, row.prompt, row.seed]) for row in rows]


# ---- the strip, drawn at twice its width in a README so that it is crisp on dense screens --------

# px: an image, between images, between groups, row labels, margin
TILE = 192
GAP = 12
BREAK = 44
LEFT = 150
EDGE = 28
BLUR = 24
INK, MUTED, PAPER = "#1b1c1e", "#5f636a", "#ffffff"


def before_after(
    before: ImageSet,
    after: ImageSet,
    rows: Mapping[str, Sequence[ImageRow]] | Sequence[ImageRow],
    title: str = "",
    covered: bool = False,
) -> Image:
    """Two rows of images, the base's over the erased one's, each column captioned with its prompt.
    Args: before: the base's images. after: the erased model's, from the same prompts and seeds.
    rows: rows of `before`, or a heading -> rows mapping for groups of columns. Four and four come
    to about 900 px at half size. title: a line above it all. covered: blurred, since this picture
    travels: an export lays it beside its model card.
    """
    from PIL import Image, ImageDraw, ImageFilter

    groups = {
        h: matched(before, after, r)
        for h, r in (rows.items() if isinstance(rows, Mapping) else [("", rows)])
        if r
    }
    if not groups:
        raise ErasureError(
            "a before/after picture needs at least one image; choose rows that both sets have"
        )
    heights = [64 * bool(title), 40 * any(groups), 96]
    columns = sum(map(len, groups.values()))
    width = max(
        LEFT + columns * (TILE + GAP) - GAP + (len(groups) - 1) * (BREAK - GAP),
        int(_font(32, bold=True).getlength(title)),
    )
    top = EDGE + sum(heights)
    sheet = Image.new("RGB", (width + 2 * EDGE, top + 2 * TILE + GAP + EDGE), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((EDGE, EDGE), title, INK, _font(32, bold=True))
    for label, y in (("Before", top), ("After", top + TILE + GAP)):
        draw.text((EDGE, y + TILE / 2), label, INK, _font(28, bold=True), anchor="lm")
    x = EDGE + LEFT
    for heading, pairs in groups.items():
        draw.text((x, EDGE + heights[0]), heading, MUTED, _font(24))
        for first, second in pairs:
            _caption(draw, first.prompt, (x, top - 10))
            for image, y in ((before.image(first), top), (after.image(second), top + TILE + GAP)):
                tile = image.convert("RGB").resize((TILE, TILE), Image.Resampling.BICUBIC)
                sheet.paste(
                    tile.filter(ImageFilter.GaussianBlur(BLUR)) if covered else tile, (x, y)
                )
            x += TILE + GAP
        x += BREAK - GAP
    return sheet


def _caption(draw: ImageDraw, text: str, at: tuple[int, int]) -> None:
    lines = textwrap.wrap(text, 17, max_lines=3, placeholder=" …")
    draw.multiline_text(at, "\n".join(lines), INK, _font(20), anchor="ld", spacing=5)


@cache
def _font(size: int, bold: bool = False) -> FreeTypeFont:
    """DejaVu Sans: it has the arrows and the scripts that Pillow's own font lacks."""
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(__file__).parent / "fonts" / name), size)
