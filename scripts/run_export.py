"""Export erased weights: apply one delta or several to their base, and write what others load, with a model card.

  erase-export --delta runs/heart/delta.safetensors --out runs/heart/model            a pipeline folder for stock diffusers
  erase-export --delta D --format components --dtype float16 --out heart-unet         only unet/, in half the bytes
  erase-export --delta D --format single-file --out heart.safetensors                 one file for A1111 and ComfyUI
  erase-export --delta D --format lora --rank 32 --out heart-lora                     a LoRA, and how much it misses
  erase-export --delta A --delta B --scale 1.0 --scale 0.5 --out both                 two concepts, the second at half strength
  erase-export --delta A --delta B --format delta --out both.safetensors              one delta of two, e.g. for erase-evaluate
  erase-export --delta D --report REPORT.json --out model --push_to_hub user/name     a private repository, scores in its card

Weights are written as float32, which holds the erased weights exactly, unless --dtype says otherwise. Where --out ends in
.safetensors, single-file, lora and delta write that one file; else a folder with a card. Nothing that exists is overwritten.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from jsonargparse import Namespace
from rich.console import Console

from erase.compose import ON_CONFLICT, compose, conflict_table, conflicts
from erase.delta import ErasedDelta
from erase.export import check_free, export_components, export_delta, export_diffusers, export_lora, export_single_file
from erase.files import written_whole
from erase.hub import hub_login, push_to_hub
from erase.lora import LAYOUTS, LoRA, extract_lora
from erase.models import DiffusionModel, LoadConfig
from erase.models.config import DTYPES
from erase.run import load_base
from erase.usage import FORMATS, usage
from eval.report import EvalReport
from eval.report_card import check_sources, model_card
from prompts.errors import ErasureError, check_names
from scripts.front import Parser, alone, parse, parser, run


def make_parser() -> Parser:
    """All options."""
    made = parser("erase-export", __doc__)
    made.add_argument(
        "--delta",  # a type would turn a config file's list into one string (jsonargparse 4.53)
        default=[],
        action="append",
        help="what erase-concept wrote (runs/erased/delta.safetensors if none is given); may be given several times",
    )
    made.add_argument(
        "--scale",
        default=[],
        action="append",
        help="of each delta, in order; 0 leaves it out, below 0 adds its concept",
    )
    made.add_argument(
        "--on_conflict", type=str, default="sum", help=f"weights that several deltas change: {', '.join(ON_CONFLICT)}"
    )
    made.add_argument("--conflicts", type=str | None, default=None, help="write the table of overlaps to this JSON file")
    made.add_argument("--model", type=str | None, default=None, help="the base; by default the one that the delta names")
    made.add_argument(
        "--load", type=LoadConfig, default=LoadConfig(), help="how the base is read; by default as it was for the delta"
    )
    made.add_argument("--format", type=str, default="diffusers", help="; ".join(f"{k}: {v}" for k, v in FORMATS.items()))
    made.add_argument("--dtype", type=str, default="float32", help=f"of the weights in the files: {', '.join(DTYPES)}")
    made.add_argument("--rank", type=int | None, default=None, help="lora: rank of every layer (16 without --energy), or its cap")
    made.add_argument("--energy", type=float | None, default=None, help="lora: fraction of each layer's squared change to keep")
    made.add_argument("--layout", type=str, default="diffusers", help=f"lora: key names, {' or '.join(LAYOUTS)} (A1111, ComfyUI)")
    made.add_argument(
        "--lora_delta", type=str | None, default=None, help="lora: also write base + LoRA as a delta, to evaluate it"
    )
    made.add_argument("--report", type=str | None, default=None, help="a report.json whose scores go into the model card")
    made.add_argument(
        "--out", type=str, default="runs/erased/model", help="a folder or .safetensors file that does not exist yet"
    )
    made.add_argument("--push_to_hub", type=str | None, default=None, help="user/name: upload the folder to the Hugging Face hub")
    made.add_argument("--private", type=bool, default=True, help="whether a repository that is made there is private")
    return made


def main(argv: list[str] | None = None) -> None:
    """Parse, check what can be checked before long work, compose, export, say where it is."""
    options = parse(make_parser(), argv)
    alone("erase-export")
    check_options(options)
    deltas = [ErasedDelta.load(path) for path in options.delta or ["runs/erased/delta.safetensors"]]
    model = load_base(deltas[0], options.model, options=options.load)
    delta = composed(model, deltas, options)
    report = EvalReport.load(options.report) if options.report else None
    check_sources(report, delta.metadata)
    lora = fitted(delta, model, options) if options.format == "lora" else None
    card = describe(delta, model, lora, report, options)
    out = write(delta, model, lora, card, options)
    print(f"{out}: {FORMATS[options.format]}; {delta.count:,} weights changed, without {delta.title}")
    if options.push_to_hub:
        print(push_to_hub(out, options.push_to_hub, options.private))


def check_options(options: Namespace) -> None:
    """Refuse what would only fail later."""
    check_names(options, {"format": FORMATS, "dtype": DTYPES, "layout": LAYOUTS, "on_conflict": ON_CONFLICT})
    if options.scale and len(options.scale) != max(len(options.delta), 1):
        raise ErasureError(
            f"{len(options.scale)} scales for {max(len(options.delta), 1)} deltas; give one --scale for each --delta, in the same order"
        )
    scales_of(options.scale)
    if options.conflicts and len(options.delta) < 2:
        raise ErasureError("--conflicts compares several deltas; give more than one --delta, or leave it out")
    lora_only = [name for name in ("rank", "energy", "lora_delta") if options[name] is not None]
    if lora_only and options.format != "lora":
        raise ErasureError(f"--{lora_only[0]} is for --format lora, not for {options.format}")
    check_free(options.out)
    one_file = Path(options.out).suffix == ".safetensors"
    if one_file and options.format in ("diffusers", "components"):
        raise ErasureError(f"--format {options.format} writes a folder; leave .safetensors off {options.out}")
    if options.push_to_hub:
        if one_file:
            raise ErasureError(f"only a folder with its card can be pushed; leave .safetensors off {options.out}")
        hub_login(options.push_to_hub)


def composed(model: DiffusionModel, deltas: list[ErasedDelta], options: Namespace) -> ErasedDelta:
    """The one delta of all, with a table of their overlaps where there are several."""
    scales = scales_of(options.scale) or [1.0] * len(deltas)
    if len(deltas) > 1:
        overlaps = conflicts(model, deltas)
        Console().print(conflict_table(overlaps))
        if options.conflicts:
            with written_whole(options.conflicts) as aside:
                aside.write_text(json.dumps([overlap.plain() for overlap in overlaps], indent=1))
    if scales == [1.0]:
        deltas[0].check(model)
        return deltas[0]
    return compose(model, list(zip(deltas, scales, strict=True)), options.on_conflict)


def scales_of(given: list[str | float]) -> list[float]:
    """The scales as numbers."""
    try:
        return [float(scale) for scale in given]
    except (ValueError, TypeError) as error:
        raise ErasureError(f"--scale is a number such as 1.0 or -0.5 ({error})") from error


def fitted(delta: ErasedDelta, model: DiffusionModel, options: Namespace) -> LoRA:
    """The LoRA, and on request base + LoRA as a delta."""
    lora = extract_lora(delta, model, options.rank, options.energy)
    print(f"LoRA of {len(lora.layers)} layers, rank {min(lora.ranks.values())} to {max(lora.ranks.values())}: {missed(lora)}")
    if options.lora_delta:
        lora.as_delta(model).save(options.lora_delta)
    return lora


def missed(lora: LoRA) -> str:
    """What a LoRA loses, in words."""
    return (
        f"it misses {lora.error:.1%} of the change (relative Frobenius norm); {lora.left_out_share:.1%} of the squared change lies in "
        f"{len(lora.left_out)} parameters that no LoRA holds (biases, norms)"
    )


def describe(delta: ErasedDelta, model: DiffusionModel, lora: LoRA | None, report: EvalReport | None, options: Namespace) -> str:
    """The model card."""
    notes = []
    if options.dtype != "float32":
        notes.append(f"The weights are rounded to {options.dtype}; scores are those of the float32 weights.")
    if lora:
        notes.append(
            f"The LoRA is an approximation: {missed(lora)}. Scores are those of the exact weights unless they say otherwise."
        )
    return model_card(report, delta.metadata, usage(options.format, model, delta.components), notes)


def write(delta: ErasedDelta, model: DiffusionModel, lora: LoRA | None, card: str, options: Namespace) -> Path:
    """Write the chosen format."""
    dtype = DTYPES[options.dtype]
    if lora:
        return export_lora(lora, options.out, card, dtype, options.layout)
    if options.format == "delta":
        return export_delta(delta, options.out, card, dtype)
    writers = {"diffusers": export_diffusers, "components": export_components, "single-file": export_single_file}
    return writers[options.format](delta, model, options.out, card, dtype)


def cli() -> None:
    """The installed command."""
    sys.exit(run(main))


if __name__ == "__main__":
    cli()
