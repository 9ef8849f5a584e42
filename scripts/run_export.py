"""Export erased weights for others to load, with a model card.

One delta or several are applied to their base, which stays as it is.

a pipeline folder for stock diffusers:
  erase-export --delta runs/heart/delta.safetensors --out runs/heart/model
only unet/, in half the bytes:
  erase-export --delta D --format components --dtype float16 --out heart-unet
one file for A1111 and ComfyUI:
  erase-export --delta D --format single-file --out heart.safetensors
a LoRA, and how much it misses:
  erase-export --delta D --format lora --rank 32 --out heart-lora
two concepts, the second at half strength:
  erase-export --delta A --delta B --scale 1.0 --scale 0.5 --out both
what another program erased (docs/foreign.md), as one delta:
  erase-export --model M --erased X --concepts nudity --format delta --out D
one delta of two, e.g. for erase-evaluate:
  erase-export --delta A --delta B --format delta --out both.safetensors
merged as TIES does, the largest half of each one's changes:
  erase-export --delta A --delta B --on_conflict ties --keep 0.5 --out merged
an erased checkpoint with the concept put back, which is its base again:
  erase-export --undo --delta D --model ERASED --out restored
the delta that does so, for programs:
  erase-export --undo --delta D --format delta --out back.safetensors
a private repository, scores in its card:
  erase-export --delta D --report REPORT.json --out M --push_to_hub user/name

Weights are written as float32, which holds the erased weights exactly, unless
--dtype says otherwise. Where --out ends in .safetensors, single-file, lora and
delta write that one file; else a folder with a card. Nothing that exists is
overwritten.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace
from rich.console import Console

from erase.prompts.errors import ErasureError
from erase.scripts.cli import Parser, add_base, alone, parse, parser, run
from erase.scripts.cli.exporting import add_deltas, add_lora, check_options, scales_of
from erase.scripts.cli.foreign import add_erased, add_named, check_erased, erased_model

if TYPE_CHECKING:  # --help needs none of it
    from erase.delta import ErasedDelta
    from erase.eval.report.report import EvalReport
    from erase.export.lora import LoRA
    from erase.models import DiffusionModel


def make_parser() -> Parser:
    """All options."""
    from erase.export.formats import FORMATS
    from erase.models.config import DTYPES

    command = parser("erase-export", __doc__)
    add_deltas(command)
    add_erased(command)
    add_named(command)
    add_base(command)
    command.add_argument(
        "--format",
        type=str,
        default="diffusers",
        help="; ".join(f"{k}: {v}" for k, v in FORMATS.items()),
    )
    command.add_argument(
        "--dtype",
        type=str,
        default="float32",
        help=f"of the weights in the files: {', '.join(DTYPES)}",
    )
    add_lora(command)
    command.add_argument(
        "--undo",
        action="store_true",
        help="put the concept back: --model names the erased checkpoint, and what is written is "
        "its base again, bit for bit; with --format delta, the delta that does so, for which "
        "--model names the base as ever",
    )
    command.add_argument(
        "--report",
        type=str | None,
        default=None,
        help="a report.json whose scores go into the model card",
    )
    command.add_argument(
        "--out",
        type=str,
        default="runs/erased/model",
        help="a folder or .safetensors file that does not exist yet",
    )
    command.add_argument(
        "--push_to_hub",
        type=str | None,
        default=None,
        help="user/name: upload the folder to the Hugging Face hub",
    )
    command.add_argument(
        "--private",
        type=bool,
        default=True,
        help="whether a repository that is made there is private",
    )
    return command


def main(argv: list[str] | None = None) -> None:
    """Parse, check what can be checked before long work, compose, export, say where it is."""
    from erase.compose import check_distinct
    from erase.delta import ErasedDelta
    from erase.delta.base import load_base
    from erase.eval.report.card import check_sources
    from erase.eval.report.report import EvalReport
    from erase.export import write_export
    from erase.export.formats import FORMATS
    from erase.export.hub import push_to_hub
    from erase.models.config import DTYPES

    options = parse(make_parser(), argv)
    alone("erase-export")
    check_options(options)
    check_erased(options, [])
    if options.erased:
        model, foreign = erased_model(options, "cpu")
        deltas = [foreign]
    else:
        paths = options.delta or ["runs/erased/delta.safetensors"]
        deltas = [ErasedDelta.load(path) for path in paths]
        check_distinct(deltas)
        model = load_base(deltas[0], options.model, options=options.load)
    delta = back(model, deltas, options) if options.undo else composed(model, deltas, options)
    check_changes(delta)
    report = EvalReport.load(options.report) if options.report else None
    # a LoRA may be measured itself
    check_sources(report, delta.metadata, () if options.format == "lora" else delta.sha256)
    lora = fitted(delta, model, options) if options.format == "lora" else None
    card = describe(delta, model, lora, report, options)
    out = write_export(
        options.format,
        delta,
        model,
        options.out,
        card,
        DTYPES[options.dtype],
        lora=lora,
        layout=options.layout,
        picture=picture_of(options),
        keep=False,
    )
    what = "weights put back: the base again" if options.undo else f"weights changed, {delta.name}"
    print(f"{out}: {FORMATS[options.format].partition(';')[0]}; {delta.count:,} {what}")
    if options.push_to_hub:
        print(push_to_hub(out, options.push_to_hub, options.private))


def check_changes(delta: ErasedDelta) -> None:
    """Refuse deltas that change nothing at their scales: an export of them would be empty, or the
    base."""
    if not delta.count:
        raise ErasureError(
            "the deltas change no weight at these scales, so there is nothing to export; give "
            "other values of --scale"
        )


def back(model: DiffusionModel, deltas: list[ErasedDelta], options: Namespace) -> ErasedDelta:
    """The delta that makes the base of the erased model; the base itself has the values that it
    brings."""
    from erase.delta.base import load_base

    named = deltas[0].metadata["base_fingerprint"]
    try:
        base = (
            model
            if options.format == "delta" and model.fingerprint == named
            else load_base(deltas[0])
        )
    except ErasureError as error:
        raise ErasureError(
            f"--undo takes the old values from the base, and {error}; where it is elsewhere now, "
            "write them down first, with --undo --format delta --model BASE, and give that file "
            "as --delta"
        ) from error
    return composed(base, deltas, options).inverse(base)


def composed(model: DiffusionModel, deltas: list[ErasedDelta], options: Namespace) -> ErasedDelta:
    """The one delta of all, with a table of their overlaps where there are several."""
    from erase.compose import compose, conflict_table, conflicts
    from erase.compose.ties import KEEP
    from erase.files import atomic_write

    scales = scales_of(options.scale) or [1.0] * len(deltas)
    if len(deltas) > 1:
        overlaps = conflicts(model, deltas)
        Console().print(conflict_table(overlaps))
        if options.conflicts:
            with atomic_write(options.conflicts) as aside:
                aside.write_text(
                    json.dumps([overlap.plain() for overlap in overlaps], indent=1),
                    encoding="utf-8",
                )
    if scales == [1.0]:
        deltas[0].check(model)
        return deltas[0]
    parts = list(zip(deltas, scales, strict=True))
    return compose(model, parts, options.on_conflict, options.keep or KEEP)


def fitted(delta: ErasedDelta, model: DiffusionModel, options: Namespace) -> LoRA:
    """The LoRA, and on request base + LoRA as a delta."""
    from erase.export.lora import LAYOUTS, extract_lora
    from erase.export.notes import missed, passed_over

    lora = extract_lora(delta, model, options.rank, options.energy)
    layout = options.layout or lora.layout
    print(
        f"LoRA of {len(lora.layers)} layers, rank {min(lora.ranks.values())} to "
        f"{max(lora.ranks.values())}: {missed(lora)}"
    )
    print(f"{layout} layout: {LAYOUTS[layout]}; {passed_over(lora)}")
    if options.lora_delta:
        lora.as_delta(model).save(options.lora_delta)
    return lora


def describe(
    delta: ErasedDelta,
    model: DiffusionModel,
    lora: LoRA | None,
    report: EvalReport | None,
    options: Namespace,
) -> str:
    """The model card. Its scores are of the exact weights, or, where they were measured, of base +
    LoRA."""
    from erase.eval.report.card import model_card
    from erase.export.formats import usage
    from erase.export.notes import lora_notes, notes_on

    digests, exact = [delta.sha256], lora is None and options.dtype == "float32"
    measured = report.provenance.get("delta_sha256") if report else None
    if lora and measured and measured not in digests:
        digests.append(lora.as_delta(model).sha256)
    of_lora = len(digests) > 1 and measured == digests[1]

    notes = notes_on(delta, options.dtype, restored=options.undo, measured=report is not None)
    if lora:
        notes += lora_notes(lora, options.layout or lora.layout, measured=of_lora)
    return model_card(
        report,
        delta.metadata,
        usage(options.format, model, delta.components),
        notes,
        sha256=digests,
        exact=exact or (of_lora and options.dtype == "float32"),
        picture=picture_of(options) is not None,
    )


def picture_of(options: Namespace) -> Path | None:
    """The picture beside the report, for a folder with a card."""
    from erase.eval.report.card import PICTURE

    picture = Path(options.report or "").parent / PICTURE
    return (
        picture
        if options.report and Path(options.out).suffix != ".safetensors" and picture.is_file()
        else None
    )


def cli() -> None:
    """The installed command."""
    sys.exit(run(main))


if __name__ == "__main__":
    cli()
