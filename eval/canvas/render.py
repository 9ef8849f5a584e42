"""The renderer of the embedded world: an object in a style and a colour, drawn from signed
distances.

Everything is batched tensor arithmetic. An object is a signed distance field (negative inside),
sampled under a random rotation, scale and shift; a style turns distances, pixel coordinates and a
colour into an anti-aliased RGB image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from erase.prompts.canvas import vocabulary

SIZE = 64
FIELD = 192  # samples per side of a stored distance field
EXTENT = 2.0  # a field covers [-EXTENT, EXTENT]^2 in object units; objects fill about [-1, 1]^2

COLOURS = {
    "red": (0.88, 0.12, 0.14),
    "yellow": (0.95, 0.82, 0.10),
    "green": (0.12, 0.66, 0.22),
    "cyan": (0.10, 0.78, 0.82),
    "blue": (0.14, 0.28, 0.88),
    "pink": (0.92, 0.25, 0.74),
}


# ---- objects -------------------------------------------------------------------------------------


def _polygon(points: list[tuple[float, float]]) -> Callable[[Tensor, Tensor], Tensor]:
    """Exact signed distance to a simple polygon: least distance to an edge, signed by the crossing
    number."""

    def distance(x: Tensor, y: Tensor) -> Tensor:
        best = torch.full_like(x, math.inf)
        inside = torch.zeros_like(x, dtype=torch.bool)
        for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
            ex, ey = bx - ax, by - ay
            along = (((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
            best = torch.minimum(best, (x - ax - along * ex) ** 2 + (y - ay - along * ey) ** 2)
            crosses = (ay > y) != (by > y)
            if ey:
                inside ^= crosses & (x < ax + (y - ay) / ey * ex)
        return torch.where(inside, -best.sqrt(), best.sqrt())

    return distance


def _polar(radius: Callable[[float], float], n: int = 72) -> Callable[[Tensor, Tensor], Tensor]:
    angles = [2 * math.pi * i / n for i in range(n)]
    return _polygon([(radius(a) * math.sin(a), -radius(a) * math.cos(a)) for a in angles])


def _disc(x: Tensor, y: Tensor, cx: float, cy: float, r: float) -> Tensor:
    return ((x - cx) ** 2 + (y - cy) ** 2).sqrt() - r


def _box(x: Tensor, y: Tensor, cx: float, cy: float, w: float, h: float) -> Tensor:
    dx, dy = (x - cx).abs() - w, (y - cy).abs() - h
    return (dx.clamp(min=0) ** 2 + dy.clamp(min=0) ** 2).sqrt() + torch.maximum(dx, dy).clamp(max=0)


def _union(*fields: Tensor) -> Tensor:
    return torch.stack(fields).amin(0)


def _minus(field: Tensor, hole: Tensor) -> Tensor:
    return torch.maximum(field, -hole)


def _heart() -> Callable[[Tensor, Tensor], Tensor]:
    turn = [2 * math.pi * i / 60 for i in range(60)]
    return _polygon(
        [
            (
                16 * math.sin(t) ** 3 / 16,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
                / 15,
            )
            for t in turn
        ]
    )


def _object_fields() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    star = [
        (r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5))
        for i in range(10)
        for r in [1.1 if i % 2 == 0 else 0.45]
    ]
    roof = _polygon([(-1.1, -0.1), (0, -1.05), (1.1, -0.1)])
    tree = _polygon(
        [
            (0, -1.15),
            (0.55, -0.35),
            (0.3, -0.35),
            (0.85, 0.5),
            (-0.85, 0.5),
            (-0.3, -0.35),
            (-0.55, -0.35),
        ]
    )
    tail = _polygon([(0.45, 0.0), (1.15, -0.6), (1.15, 0.6)])
    arrow = _polygon(
        [(-1.1, -0.28), (0.1, -0.28), (0.1, -0.8), (1.1, 0), (0.1, 0.8), (0.1, 0.28), (-1.1, 0.28)]
    )
    petals = _polar(lambda a: 0.78 + 0.32 * math.cos(6 * a), 120)
    return {
        "heart": _heart(),
        "star": _polygon(star),
        "moon": lambda x, y: _minus(_disc(x, y, 0, 0, 1.05), _disc(x, y, 0.5, -0.15, 0.85)),
        "house": lambda x, y: _minus(
            _union(roof(x, y), _box(x, y, 0, 0.4, 0.8, 0.55)), _box(x, y, 0, 0.6, 0.22, 0.36)
        ),
        "tree": lambda x, y: _union(tree(x, y), _box(x, y, 0, 0.78, 0.2, 0.32)),
        "fish": lambda x, y: _minus(
            _union(((x + 0.3) ** 2 / 0.8**2 + y**2 / 0.55**2).sqrt() * 0.55 - 0.55, tail(x, y)),
            _disc(x, y, -0.65, -0.12, 0.15),
        ),
        "flower": lambda x, y: _minus(petals(x, y), _disc(x, y, 0, 0, 0.28)),
        "mushroom": lambda x, y: _union(
            torch.maximum(((x / 1.1) ** 2 + ((y - 0.1) / 0.95) ** 2).sqrt() - 1, y - 0.1),
            _box(x, y, 0, 0.5, 0.28, 0.5),
        ),
        "arrow": arrow,
        "ring": lambda x, y: (_disc(x, y, 0, 0, 0.78)).abs() - 0.24,
    }


@cache
def _fields() -> Tensor:
    """Distance fields of all objects, shape (objects, 1, FIELD, FIELD), in object units."""
    line = (torch.arange(FIELD) + 0.5) / FIELD * 2 * EXTENT - EXTENT
    y, x = torch.meshgrid(line, line, indexing="ij")
    shapes = _object_fields()
    return torch.stack([shapes[name](x, y) for name in vocabulary().names("object")])[:, None]


# ---- styles: (distance in px, pixel x, pixel y, colour, random) -> RGB in [0, 1] -----------------


def _cover(d: Tensor) -> Tensor:
    """Coverage of a pixel by the shape: 1 inside, 0 outside, linear across the edge
    (anti-aliasing)."""
    return (0.5 - d).clamp(0, 1)


def _mix(back: Tensor, front: Tensor, alpha: Tensor) -> Tensor:
    return back + (front - back) * alpha


def _pale(rand: Callable[..., Tensor], low: float = 0.86) -> Tensor:
    return low + (1 - low) * rand(3, 1, 1)


def _flat(d: Tensor, x: Tensor, y: Tensor, colour: Tensor, rand: Callable[..., Tensor]) -> Tensor:
    return _mix(_pale(rand), colour, _cover(d))


def _sketch(d: Tensor, x: Tensor, y: Tensor, colour: Tensor, rand: Callable[..., Tensor]) -> Tensor:
    paper = torch.tensor([0.97, 0.94, 0.85])[:, None, None] - 0.04 * rand(1, 1, 1)
    ruled = _cover((y % 8 - 4).abs() - 0.6)
    return _mix(
        _mix(paper, torch.tensor([0.72, 0.78, 0.86])[:, None, None], ruled),
        colour * 0.9,
        _cover(d.abs() - 1.7),
    )


def _striped(
    d: Tensor, x: Tensor, y: Tensor, colour: Tensor, rand: Callable[..., Tensor]
) -> Tensor:
    stripe = _cover(((x + y) / math.sqrt(2) % 8 - 4).abs() - 2.1)
    fill = _mix(torch.ones(3, 1, 1), colour, stripe)
    return _mix(0.55 + 0.12 * rand(1, 1, 1) + torch.zeros(3, 1, 1), fill, _cover(d))


def _dotted(d: Tensor, x: Tensor, y: Tensor, colour: Tensor, rand: Callable[..., Tensor]) -> Tensor:
    dot = _cover(((x % 8 - 4) ** 2 + (y % 8 - 4) ** 2).sqrt() - 3.1)
    ink = _mix(torch.full((3, 1, 1), 0.78) - 0.06 * rand(1, 1, 1), colour, _cover(d))
    return _mix(_mix(torch.ones(3, 1, 1), 0.45 + 0.55 * colour, _cover(d)), ink, dot)


def _neon(d: Tensor, x: Tensor, y: Tensor, colour: Tensor, rand: Callable[..., Tensor]) -> Tensor:
    night = 0.02 + 0.06 * rand(3, 1, 1)
    glow = torch.exp(-(d.abs() / 3.5))
    return (night + colour * glow * 1.1 + 0.5 * _cover(d.abs() - 0.9)).clamp(0, 1)


def _mosaic(d: Tensor, x: Tensor, y: Tensor, colour: Tensor, rand: Callable[..., Tensor]) -> Tensor:
    tile = F.avg_pool2d(_cover(d), 4)
    jitter = 0.97 - 0.06 * rand(1, SIZE // 4, SIZE // 4)
    stone = (
        (_mix(_pale(rand, 0.8) * 0.85, colour, tile) * jitter)
        .clamp(0, 1)
        .repeat_interleave(4, -1)
        .repeat_interleave(4, -2)
    )
    grout = torch.maximum((x % 4 < 1).float(), (y % 4 < 1).float())
    return _mix(stone, torch.tensor(0.25), grout * 0.8)


def _watercolor(
    d: Tensor, x: Tensor, y: Tensor, colour: Tensor, rand: Callable[..., Tensor]
) -> Tensor:
    cloud = F.interpolate(rand(1, 1, 6, 6), size=(SIZE, SIZE), mode="bicubic", align_corners=False)[
        0
    ]
    wash = _mix(torch.ones(3, 1, 1), colour, 0.12 + 0.18 * cloud)
    pigment = _mix(torch.ones(3, 1, 1), colour, 0.65 + 0.35 * cloud)
    return _mix(wash, pigment, torch.sigmoid(-(d + 4 * (cloud - 0.5)) / 1.3)).clamp(0, 1)


def _chalk(d: Tensor, x: Tensor, y: Tensor, colour: Tensor, rand: Callable[..., Tensor]) -> Tensor:
    board = torch.tensor([0.13, 0.24, 0.19])[:, None, None] + 0.06 * rand(1, 1, 1)
    return _mix(_mix(board, colour, _cover(d)), torch.full((3, 1, 1), 0.97), _cover(d.abs() - 1.4))


STYLES = {
    "Flat": _flat,
    "Sketch": _sketch,
    "Striped": _striped,
    "Dotted": _dotted,
    "Neon": _neon,
    "Mosaic": _mosaic,
    "Watercolor": _watercolor,
    "Chalk": _chalk,
}


def render(cells: list[dict[str, str]], seed: int) -> Tensor:
    """Draw one image per cell.

    Args:
        cells: dicts with `object`, `style` and `colour`, as `erase.prompts.canvas.Vocabulary.cells`
            gives them.
        seed: fixes place, size, rotation, shade and background of the whole batch.

    Returns:
        Images, shape (len(cells), 3, 64, 64), float32 in [0, 1].
    """
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    n = len(cells)
    names = vocabulary().names("object")
    angle, radius = (rand(n) - 0.5) * math.radians(44), 17 + 5 * rand(n)
    shift = (rand(n, 2) - 0.5) * 13
    line = torch.arange(SIZE) + 0.5
    y, x = torch.meshgrid(line, line, indexing="ij")
    px, py = x - SIZE / 2 - shift[:, :1, None], y - SIZE / 2 - shift[:, 1:, None]
    cos, sin = (f(angle)[:, None, None] / radius[:, None, None] for f in (torch.cos, torch.sin))
    where = torch.stack([px * cos + py * sin, py * cos - px * sin], -1) / EXTENT
    fields = _fields()[[names.index(cell["object"]) for cell in cells]]
    distance = (
        F.grid_sample(fields, where, padding_mode="border", align_corners=False)
        * radius[:, None, None, None]
    )
    shade = 1 + (rand(n, 3) - 0.5) * 0.16
    out = []
    for cell, d, tint in zip(cells, distance, shade, strict=True):
        colour = (torch.tensor(COLOURS[cell["colour"]]) * tint).clamp(0, 1)[:, None, None]
        out.append(STYLES[cell["style"]](d, x, y, colour, rand))
    return torch.stack(out)
