"""Measure the size of exact forms of a delta: what is shipped, what is smaller, and what that would
cost.

  python scripts/bench/delta.py
      erases from canvas at several densities, 30 steps each, then measures
  python scripts/bench/delta.py --delta runs/heart/delta.safetensors --json sizes.json

Every form is exact: the base and the form give the erased weights to the bit. `float16` rounds
first: it is exact for a float16 model. The compressed forms hold the exclusive or with the base's
values, split into byte planes: new values share sign, exponent and leading digits with the old
ones; what is left of the mantissa is noise, which is why no coder gets far.
"""

from __future__ import annotations

import json
import lzma
import math
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from erase.delta import ErasedDelta
from erase.latents.config import LatentConfig
from erase.methods.salun import SalUnHalfConfig
from erase.models import DiffusionModel, load_model
from erase.prompts.canvas import canvas_concept
from erase.run import EraseConfig, erase_concept
from erase.scripts.bench.plain import plain_parser
from erase.tensors import to_gaps
from erase.training.config import MaskConfig, TrainConfig

RUNS = {
    "density 0.5": (0.5, "full"),
    "density 0.1": (0.1, "full"),
    "density 0.01": (0.01, "full"),
    "xattn 0.5": (0.5, "xattn"),
}


def sizes(delta: ErasedDelta, model: DiffusionModel) -> dict[str, float]:
    """Bytes of each form, without headers and metadata, but for the two files, which are as
    written."""
    bits = torch.cat(list(delta.bits.values())).numpy().tobytes()
    gaps = [to_gaps(bits) for bits in delta.bits.values()]
    values, narrow = 4 * delta.count, delta.rounded(torch.float16)
    smaller = sum(min(b.numel(), g.numel()) for b, g in zip(delta.bits.values(), gaps, strict=True))
    return {
        "changed weights": delta.count,
        "values": values,
        "places: bits": len(bits),
        "places: gaps": sum(gap.numel() for gap in gaps),
        "places: entropy": places_entropy(delta, model),
        "values + bits": values + len(bits),
        "values + smaller places (shipped)": values + smaller,
        "as shipped, the file": file_size(delta),
        "xor + zlib": compressed(delta, model, lambda data: zlib.compress(data, 9))
        + len(zlib.compress(bits, 9)),
        "xor + lzma": compressed(delta, model, lzma.compress) + len(lzma.compress(bits)),
        "float16, the file": file_size(narrow),
        "float16, xor + lzma": compressed(narrow, model, lzma.compress) + len(lzma.compress(bits)),
    }


def compressed(
    delta: ErasedDelta, model: DiffusionModel, compress: Callable[[bytes], bytes]
) -> int:
    """Bytes of the values, as the exclusive or with the base's, plane by plane."""
    params, width = model.parameters(), next(iter(delta.values.values())).element_size()
    kind = {2: torch.int16, 4: torch.int32}[width]
    mixed = []
    for name, value in delta.values.items():
        old = params[name].data[delta.where(name, tuple(params[name].shape))].to(value.dtype)
        mixed.append(value.view(kind) ^ old.view(kind))
    planes = torch.cat(mixed).numpy().view(np.uint8).reshape(-1, width).T
    return sum(len(compress(np.ascontiguousarray(plane).tobytes())) for plane in planes)


def places_entropy(delta: ErasedDelta, model: DiffusionModel) -> int:
    """Bytes that no coder of independent places gets below: n h(density) / 8 over the tensors."""
    params, total = model.parameters(), 0.0
    for name, value in delta.values.items():
        n, d = params[name].numel(), value.numel() / params[name].numel()
        total += 0 if d == 1 else n * -(d * math.log2(d) + (1 - d) * math.log2(1 - d)) / 8
    return round(total)


def file_size(delta: ErasedDelta) -> int:
    """Bytes of the file, header and metadata included."""
    with tempfile.TemporaryDirectory() as folder:
        delta.save(Path(folder) / "d.safetensors")
        return (Path(folder) / "d.safetensors").stat().st_size


def erase(density: float, scope: str) -> ErasedDelta:
    """A short erasure from canvas: enough for every chosen weight to move."""
    config = EraseConfig(latents=LatentConfig(n_forget=16, n_retain=16, steps=4))
    method = SalUnHalfConfig(
        mask=MaskConfig(density=density),
        scope=scope,
        train=TrainConfig(steps=30, lr=2e-4, batch_size=4),
    )
    return erase_concept(canvas_concept("heart"), config, method)


def main() -> None:
    """Measure, print, write."""
    command = plain_parser(__doc__)
    command.add_argument(
        "--delta", action="append", help="a delta to measure; may be given several times"
    )
    command.add_argument("--json", type=Path, help="write the numbers to this file")
    options = command.parse_args()
    deltas = {path: ErasedDelta.load(path) for path in options.delta or ()} or {
        name: erase(*run) for name, run in RUNS.items()
    }
    bases = {delta.metadata["base_id"] for delta in deltas.values()}
    models = {base: load_model(base) for base in bases}
    measured = {
        name: sizes(delta, models[delta.metadata["base_id"]]) for name, delta in deltas.items()
    }
    table = Table(title="bytes of exact forms")
    for heading in ("form", *measured):
        table.add_column(heading, justify="left" if heading == "form" else "right")
    for form in next(iter(measured.values())):
        table.add_row(form, *(f"{numbers[form]:,}" for numbers in measured.values()))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
