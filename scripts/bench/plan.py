"""What each stage of an erasure takes on a GPU, by arithmetic: which published model fits where.

  python scripts/bench/plan.py                          every model, two scopes, 24, 48 and 80 GB
  python scripts/bench/plan.py --models flux1-dev --scopes full --densities 0.01 --gpus 4 --rows 4
  python scripts/bench/plan.py --by-block               with load.offload blocks, and main memory

Latents: the largest text encoder in float32, or the denoiser in bf16 and what one of its blocks
keeps of a batch, whichever takes more. Statistics: the denoiser, a block's gradients and
activations in float32; the sums wait on the CPU. Steps: the denoiser in bf16, 22 bytes for each
weight that changes (with its float32 value elsewhere), activations in bf16. All with
`train.offload`, `train.gradient_checkpointing`, and bf16 for latents and steps. Under FSDP on
several GPUs each has its part of weights, sums and changes, and two blocks with their gradients;
latents are sampled whole. With `load.offload blocks` a GPU has, of the part that runs, what lies
outside of blocks, the largest block, and its gradients; main memory has all weights in float32
and, while it trains, the denoiser in bf16 and what changes. What kernels need besides is not in
it, nor what torch itself takes, about a GB. No GPU was at hand: nothing here is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from erase.models.by_block import innermost
from erase.models.scopes import select
from erase.scripts.bench.count_activations import WAYS, count
from erase.scripts.bench.plain import plain_parser
from erase.scripts.bench.published import MODELS, Published, weights

GB = 1e9
FULL, HALF, CHANGED = 4, 2, 22
"""bytes of a weight in float32 and in bf16, and of one that changes under bf16"""


@dataclass(frozen=True)
class Size:
    """Of a model, as far as the stages go by it."""

    denoiser: int
    """weights that are on the GPU at once"""
    beside: int
    """of the largest of the other parts, likewise"""
    largest: int
    """weights of the largest block"""
    row: dict[torch.dtype | None, float]
    """precision of the activations -> bytes of a row, with the block that is made again"""
    block: float
    """of these, a block's in bf16"""

    @classmethod
    def of(cls, model: Published, network: nn.Module, there: Callable[[nn.Module], int]) -> Size:
        """Counted. `there`: weights of a part that are on the GPU at once."""
        row: dict[torch.dtype | None, float] = {}
        block = 0
        for half in (None, torch.bfloat16):
            kept, _ = count(model, "cuda", half, WAYS[2])
            block = count(model, "cuda", half, WAYS[0])[1]
            row[half] = kept + block
        largest = max(map(weights, innermost(network)))
        beside = max(map(there, model.others()))
        return cls(there(network), beside, largest, row, block)


def of_a_block(part: nn.Module) -> int:
    """Weights outside of the innermost blocks, and of the largest of these."""
    sizes = list(map(weights, innermost(part)))
    return weights(part) - sum(sizes) + max(sizes, default=0)


def stages(
    size: Size, scope: int, density: float, rows: int, gpus: int, by_block: bool = False
) -> dict[str, float]:
    """Bytes on each GPU, by stage."""
    sums, gathered = (scope, 3 * size.largest) if gpus > 1 else (0, 0)
    changed = CHANGED * density * scope
    if by_block:
        changed, gathered = 0.0, size.largest  # its gradients
    statistics = (
        FULL * (size.denoiser + sums) / gpus
        + FULL * (gathered or size.largest)
        + rows * size.row[None]
    )
    return {
        "latents": max(FULL * size.beside, HALF * size.denoiser + rows * size.block),
        "statistics": statistics if density < 1 else 0,
        "steps": (HALF * size.denoiser + changed) / gpus
        + HALF * gathered
        + rows * size.row[torch.bfloat16],
    }


def table(args: argparse.Namespace) -> Iterator[str]:
    """Markdown, a line for each model, scope and density."""
    yield "| model | scope, density | latents | statistics | steps | fits | main memory |"
    yield "|---|---|---|---|---|---|---|"
    for name in args.models:
        model = MODELS[name]()
        network: Any = model.network()
        size = Size.of(model, network, of_a_block if args.by_block else weights)
        whole = weights(network)
        stored = FULL * (whole + sum(map(weights, model.others())))
        component = "unet" if hasattr(network, "conv_in") else "transformer"
        named = {f"{component}.{key}": param for key, param in network.named_parameters()}
        for scope, density in zip(args.scopes, args.densities, strict=True):
            held = sum(param.numel() for param in select(named, scope).values())
            need = stages(size, held, density, args.rows, args.gpus, args.by_block)
            most = max(need.values()) / GB
            fits = next((f"{card:g} GB" for card in args.cards if most < 0.95 * card), "none")
            cells = [f"{need[stage] / GB:.1f}" if need[stage] else "–" for stage in need]
            changed = CHANGED * density * held if args.by_block else 0
            main = stored + HALF * whole * args.by_block + changed
            yield (
                f"| {name} | `{scope}`, {density:g} | {' | '.join(cells)} | {fits} | "
                f"{main / GB:.0f} |"
            )


def main() -> None:
    """Print the table."""
    parser = plain_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--scopes", nargs="+", default=["xattn", "full"])
    parser.add_argument(
        "--densities", nargs="+", type=float, default=[1.0, 0.04], help="one for each scope"
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=4,
        help="of a step, and of what is sampled at once",
    )
    parser.add_argument("--gpus", type=int, default=1, help="that share the model (fsdp.yaml)")
    parser.add_argument(
        "--by-block", action="store_true", help="with load.offload blocks, on one GPU"
    )
    parser.add_argument("--cards", nargs="+", type=float, default=[24, 48, 80], help="GB of a GPU")
    args = parser.parse_args()
    if args.by_block and args.gpus > 1:
        raise SystemExit("--by-block is for one GPU: under FSDP each gathers block by block")
    print("\n".join(table(args)))


if __name__ == "__main__":
    main()
