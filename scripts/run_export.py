"""Export erased weights as a diffusers folder that stock `StableDiffusionPipeline.from_pretrained` loads, with a model card.

erase-export --delta runs/heart/delta.safetensors --out runs/heart/model
erase-export --delta runs/heart/delta.safetensors --report runs/heart/report/report.json --out runs/heart/model
"""

from __future__ import annotations

import sys

from erase.delta import ErasedDelta
from erase.export import export_diffusers
from eval.report import EvalReport
from eval.report_card import model_card
from scripts.front import parse, parser, run


def main(argv: list[str] | None = None) -> None:
    """Parse, export, say where it is."""
    made = parser("erase-export", __doc__)
    made.add_argument("--delta", type=str, default="runs/erased/delta.safetensors", help="what erase-concept wrote")
    made.add_argument("--model", type=str | None, default=None, help="the base; by default the one that the delta names")
    made.add_argument("--report", type=str | None, default=None, help="a report.json whose scores go into the model card")
    made.add_argument("--out", type=str, default="runs/erased/model", help="a folder that does not exist yet")
    options = parse(made, argv)
    delta = ErasedDelta.load(options.delta)
    report = EvalReport.load(options.report) if options.report else None
    out = export_diffusers(delta, options.model or delta.metadata["base_id"], options.out, model_card(report, delta.metadata))
    print(f'{out}: load it with StableDiffusionPipeline.from_pretrained("{out}")')


def cli() -> None:
    """The installed command."""
    sys.exit(run(main))


if __name__ == "__main__":
    cli()
