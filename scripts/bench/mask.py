"""Time and memory of choosing the most salient weights, against what the public code does and
against the machine's own limits.

  python scripts/bench/mask.py
      1, 10 and 50 million weights: half a minute
  python scripts/bench/mask.py --sizes 860e6
      Stable Diffusion 1.x; only the methods that fit into memory
  python scripts/bench/mask.py --device cuda --json mask.json

Methods: `argsort` twice, which ranks every weight (the reference's generate_mask.py); `kthvalue`
over one flat copy; `histogram`, ours, over the parameters as they are. All choose the same weights
where no two values are equal. The floor is one read of the values at the copy bandwidth measured in
the same run. Each method runs in a process of its own; memory is its peak beyond the values
themselves.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from erase.scripts.bench.measuring import begin, in_own_process, peak, wait, write_rows
from erase.scripts.bench.plain import plain_parser
from erase.tensors import pack, top_k

TENSORS = 50  # the values are spread over this many parameters
DENSITY = 0.5


def argsort(values: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The reference: rank all values by sorting twice, keep ranks below the count, as an int64
    mask."""
    flat = torch.cat([-value.flatten() for value in values.values()])
    ranks = torch.argsort(torch.argsort(flat))
    masks, start = {}, 0
    for name, value in values.items():
        mask = torch.zeros_like(ranks[start : start + value.numel()])
        mask[ranks[start : start + value.numel()] < count] = 1
        masks[name] = mask.view(value.shape)
        start += value.numel()
    return masks


def kthvalue(values: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """A threshold by quickselect over one flat copy."""
    flat = torch.cat([value.flatten() for value in values.values()])
    threshold = flat.kthvalue(len(flat) - count + 1).values
    return {name: value >= threshold for name, value in values.items()}


def histogram(values: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Ours: two passes of counting on bit patterns, packed to one bit per weight as it goes."""
    return {name: pack(mask) for name, mask in top_k(values, count)}


METHODS = {"argsort": argsort, "kthvalue": kthvalue, "histogram": histogram}


def make_values(size: int, device: str) -> dict[str, Tensor]:
    """Values as a saliency has them: non-negative, over many orders of magnitude."""
    generator = torch.Generator(device).manual_seed(0)
    parts = [size // TENSORS] * (TENSORS - 1) + [size - size // TENSORS * (TENSORS - 1)]
    return {
        str(i): torch.randn(n, generator=generator, device=device).abs_().pow_(3)
        for i, n in enumerate(parts)
    }


def measure(name: str, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and extra memory of one method; `copy` gives the seconds of one read and write of the
    values."""
    size, device = int(name), args.device
    values = make_values(size, device)
    wait(device)
    before = peak(device)
    started = time.perf_counter()
    if method == "copy":
        for value in values.values():
            value.clone()
        masks = None
    else:
        masks = METHODS[method](values, int(size * DENSITY))
    wait(device)
    row = {
        "method": method,
        "size": size,
        "seconds": time.perf_counter() - started,
        "extra_gb": (peak(device) - before) / 1e9,
    }
    return row | (
        {}
        if masks is None
        else {"mask_gb": sum(m.numel() * m.element_size() for m in masks.values()) / 1e9}
    )


def main() -> None:
    """Each method and size in its own process; a table, and JSON where asked for."""
    parser = plain_parser(__doc__)
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=lambda text: int(float(text)),
        default=[1_000_000, 10_000_000, 50_000_000],
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = begin(parser, measure)
    rows = []
    print(
        f"{'weights':>13}  {'method':10}{'seconds':>9}{'extra GB':>10}{'mask GB':>9}{'x copy':>8}"
        f"{'x faster than argsort':>23}"
    )
    for size in args.sizes:
        own: dict[str, dict[str, Any]] = {}
        for method in ("copy", *args.methods):
            row = in_own_process(__file__, str(size), method, args)
            if not row:
                continue
            own[method] = row
            rows.append(row)
            copies = row["seconds"] / own["copy"]["seconds"] if "copy" in own else float("nan")
            gain = (
                f"{own['argsort']['seconds'] / row['seconds']:>23.1f}" if "argsort" in own else ""
            )
            print(
                f"{size:>13,}  {method:10}{row['seconds']:>9.3f}{row['extra_gb']:>10.2f}"
                f"{row.get('mask_gb', 0):>9.3f}{copies:>8.1f}{gain}",
                flush=True,
            )
    write_rows(rows, args)


if __name__ == "__main__":
    main()
