"""Where a mask lies: its share of each kind of layer, from a mask or from a saliency cut at any
density.

  python scripts/bench/describe_mask.py runs/heart/mask.safetensors
  python scripts/bench/describe_mask.py runs/heart/saliency.safetensors --densities 0.03 0.1 0.5

`erase-concept --out runs/heart` writes both files. Density is the part of a kind's weights that may
change; share is the part of the mask that lies there.
"""

from __future__ import annotations

import re
from pathlib import Path

from erase.mask import SaliencyMask
from erase.models import load_model
from erase.models.scopes import SCOPES
from erase.scripts.bench.plain import plain_parser
from erase.scripts.cli import run
from erase.training.config import ALLOCATIONS
from erase.training.rules import RULES, scores
from erase.training.statistics import Statistics

KINDS = {
    "first and last convolution": r"\.conv_(in|out)\.",
    "cross-attention": SCOPES["xattn"],
    "self-attention": SCOPES["selfattn"],
    "residual blocks' convolutions": r"\.resnets\..*\.conv",
    "residual blocks' time projections": r"\.time_emb_proj\.",
    "attention of text and image as one": r"\bsingle_transformer_blocks\..*\battn\.",
    "feed-forward": SCOPES["ff"],
    "up- and downsampling": r"samplers\.",
    "time embedding": r"\.(time|add)_embedding\.|time_text_embed",
    "projections around attention": r"\.proj_(in|out)\.|^transformer\.proj_out|"
    r"context_embedder|x_embedder|pos_embed",
    "norms": r"norm",
}
"""kind of layer -> pattern over parameter names; the first that fits counts"""


def kind_of(name: str) -> str:
    """The kind of layer that a parameter belongs to."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "others")


def shares(mask: SaliencyMask) -> dict[str, tuple[int, int]]:
    """Kind of layer -> number of its weights, and how many of them may change."""
    counts: dict[str, tuple[int, int]] = {}
    for name, size in mask.sizes().items():
        weights, ones = counts.get(kind_of(name), (0, 0))
        counts[kind_of(name)] = weights + size, ones + int(mask[name].sum())
    return counts


def describe(mask: SaliencyMask) -> str:
    """A table of the mask's shares, largest first."""
    total = mask.count()
    lines = [f"{'':36}{'of all weights':>15}{'density':>9}{'share':>8}"]
    for kind, (weights, ones) in sorted(shares(mask).items(), key=lambda item: -item[1][1]):
        lines.append(
            f"{kind:36}{weights / mask.size:>15.1%}{ones / weights:>9.1%}{ones / total:>8.1%}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """A table per density."""
    parser = plain_parser(__doc__)
    parser.add_argument("file", type=Path, help="mask.safetensors or saliency.safetensors")
    parser.add_argument(
        "--densities", type=float, nargs="+", help="the file is a saliency, to be cut here"
    )
    parser.add_argument(
        "--rule",
        default="forget",
        choices=list(RULES),
        help="the rule that the saliency is ranked by",
    )
    parser.add_argument("--allocation", default="global", choices=ALLOCATIONS)
    parser.add_argument("--model", help="the base, for rules that look at its weights")
    args = parser.parse_args(argv)
    if args.densities:
        statistics = Statistics.load(args.file)
        weights = load_model(args.model).parameters() if args.model else None
        masks = [
            scores(statistics, args.rule, weights).cut(density, args.allocation)
            for density in args.densities
        ]
    else:
        masks = [SaliencyMask.load(args.file)]
    for mask in masks:
        print(
            f"{mask.count():,} of {mask.size:,} weights may change "
            f"({mask.count() / mask.size:.3%})\n{describe(mask)}\n"
        )


if __name__ == "__main__":
    raise SystemExit(run(main))
