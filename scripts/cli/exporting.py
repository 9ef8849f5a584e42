"""Options of erase-export, and their checks before anything is loaded."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from erase.prompts.errors import COUNT, FRACTION, ErasureError, check_names, check_ranges
from erase.scripts.cli import FILES, Parser

if TYPE_CHECKING:
    from collections.abc import Collection


def add_deltas(command: Parser) -> None:
    """Options of the deltas and of their composition."""
    from erase.compose import ON_CONFLICT

    command.add_argument(
        "--delta",  # a type would turn a config file's list into one string (jsonargparse 4.53)
        default=[],
        action="append",
        help=(
            "what erase-concept wrote (runs/erased/delta.safetensors if none is given); may be "
            "given several times"
        ),
    )
    command.add_argument(
        "--scale",
        default=[],
        action="append",
        help="of each delta, in order; 0 leaves it out, below 0 adds its concept",
    )
    command.add_argument(
        "--on_conflict",
        type=str,
        default="sum",
        help=f"weights that several deltas change: {', '.join(ON_CONFLICT)}. ties: of the largest "
        "changes of each, the mean of those in the direction of their sum",
    )
    command.add_argument(
        "--keep",
        type=float | None,
        default=None,
        help="of --on_conflict ties: the fraction of each delta's changes, the largest, that count "
        "(0.2 if not given, which is for deltas of all weights; 1: all)",
    )
    command.add_argument(
        "--conflicts",
        type=str | None,
        default=None,
        help="write the table of overlaps to this JSON file, which does not exist yet",
    )


def add_lora(command: Parser) -> None:
    """Options of --format lora."""
    from erase.export.lora import LAYOUTS

    command.add_argument(
        "--rank",
        type=int | None,
        default=None,
        help="lora: rank of every layer (16 without --energy), or its cap",
    )
    command.add_argument(
        "--energy",
        type=float | None,
        default=None,
        help="lora: fraction of each layer's squared change to keep",
    )
    command.add_argument(
        "--layout",
        type=str | None,
        default=None,
        help=(
            "lora: key names (kohya, but diffusers for transformers, of which FLUX.1 has both). "
            f"{'; '.join(f'{k}: {v}' for k, v in LAYOUTS.items())}"
        ),
    )
    command.add_argument(
        "--lora_delta",
        type=str | None,
        default=None,
        help="lora: also write base + LoRA as a delta to this new file, to evaluate it",
    )


def check_options(options: Namespace) -> None:
    """Refuse what would only fail later."""
    from erase.compose import ON_CONFLICT
    from erase.compose.ties import check_keep
    from erase.export.formats import FORMATS
    from erase.export.hub import hub_login
    from erase.export.lora import LAYOUTS
    from erase.export.whole import check_free
    from erase.models.config import DTYPES

    known: dict[str, Collection[str]] = {
        "format": FORMATS,
        "dtype": DTYPES,
        "on_conflict": ON_CONFLICT,
    }
    check_names(options, known | ({"layout": LAYOUTS} if options.layout else {}))
    if options.scale and len(options.scale) != max(len(options.delta), 1):
        raise ErasureError(
            f"{len(options.scale)} scales for {max(len(options.delta), 1)} deltas; give one "
            "--scale for each --delta, in the same order"
        )
    scales_of(options.scale)
    if options.conflicts and len(options.delta) < 2:
        raise ErasureError(
            "--conflicts compares several deltas; give more than one --delta, or leave it out"
        )
    if options.keep is not None:
        check_keep(options.keep)
        if options.on_conflict != "ties" or len(options.delta) < 2:
            raise ErasureError(
                "--keep is for --on_conflict ties of several deltas; name that, or leave it out"
            )
    lora_only = [
        name for name in ("rank", "energy", "layout", "lora_delta") if options[name] is not None
    ]
    if lora_only and options.format != "lora":
        raise ErasureError(f"--{lora_only[0]} is for --format lora, not for {options.format}")
    check_ranges(options, {"rank": COUNT, "energy": FRACTION})
    check_undo(options)
    for name in ("out", "lora_delta"):
        check_ending(name, options)
    for name in ("out", "lora_delta", "conflicts"):
        if options[name] is not None:
            check_free(options[name])
    one_file = Path(options.out).suffix == ".safetensors"
    if options.push_to_hub:
        if one_file:
            raise ErasureError(
                f"only a folder with its card can be pushed; leave .safetensors off {options.out}"
            )
        hub_login(options.push_to_hub)


def check_ending(name: str, options: Namespace) -> None:
    """Refuse an output whose name is that of another kind of file than what will be there."""
    path = options[name]
    if path is None:
        return
    ending = Path(path).suffix
    if name == "out" and options.format in ("diffusers", "components"):
        if ending.lower() in FILES:
            raise ErasureError(
                f"--format {options.format} writes a folder; leave {ending} off {path}"
            )
    elif ending != ".safetensors" and (name != "out" or ending.lower() in FILES):
        instead = f"--{name} {Path(path).with_suffix('.safetensors')}"
        folder = ", or name a folder" if name == "out" else ""
        raise ErasureError(
            f"what is written is a .safetensors file, and {path} is none by its name; give "
            f"{instead}{folder}"
        )


def check_undo(options: Namespace) -> None:
    """Refuse what --undo cannot do, or would undo into nothing new."""
    if not options.undo:
        return
    if options.report or options.format in ("components", "lora"):
        idle = "--report" if options.report else f"--format {options.format}"
        raise ErasureError(
            f"{idle} does not go with --undo, which gives the base back; leave it out"
        )
    if options.format != "delta" and not options.model:
        raise ErasureError(
            "--undo puts a concept back into an erased checkpoint; name that one with --model, or "
            "add --format delta"
        )


def scales_of(given: list[str | float]) -> list[float]:
    """The scales as numbers."""
    try:
        scales = [float(scale) for scale in given]
    except (ValueError, TypeError) as error:
        raise ErasureError(f"--scale is a number such as 1.0 or -0.5 ({error})") from error
    for scale in scales:
        if not isfinite(scale):
            raise ErasureError(
                f"--scale is {scale}; it must be a finite number such as 1.0 or -0.5"
            )
    return scales
