"""Compare evaluations of one base: scores, what was traded, images side by side.

Every score of every run stands beside the same score of the first, with the
difference and its 95 % interval, paired on the same prompts and seeds where
both runs were asked them.

what erase-evaluate wrote, by folder or by report.json:
  erase-compare runs/heart runs/heart-uce
with a page, and the table as Markdown, CSV and LaTeX:
  erase-compare runs/a runs/b runs/c --out runs/compared
beside the base instead of the first run; only where all can be paired:
  erase-compare runs/a runs/b --against base
  erase-compare runs/a runs/b --paired
"""

from __future__ import annotations

import sys

from rich.console import Console

from erase.scripts.cli import Parser, Words, alone, check_folder, parse, parser, run


def make_parser() -> Parser:
    """All options."""
    command = parser("erase-compare", __doc__, "RUN ...")
    command.add_argument(
        "runs",
        type=str,
        nargs="*",
        help="each a report.json, the folder that holds it, or a run's folder with it in report",
    )
    command.add_argument(
        "--name",
        action=Words,
        help="what a run is called; one for each, in the same order. Default: of its path what "
        "tells it from the others",
    )
    command.add_argument(
        "--against",
        type=str | None,
        default=None,
        help="the run that all are compared with, by its name, or base; default: the first",
    )
    command.add_argument(
        "--paired",
        action="store_true",
        help="refuse runs that were asked other prompts or seeds, instead of comparing unpaired",
    )
    command.add_argument(
        "--base_images",
        type=str | None,
        default=None,
        help="folder of the base's images, for reports that do not say where it is",
    )
    command.add_argument(
        "--out",
        type=str | None,
        default=None,
        help="folder for compare.html, compare.md, compare.csv and compare.tex; default: none",
    )
    command.set_defaults(runs=[])  # not in add_argument, which the oldest jsonargparse refuses
    return command


def main(argv: list[str] | None = None) -> None:
    """Parse, compare, print the table, write the files."""
    from erase.eval.comparing import compare, load_runs, save_comparison

    options = parse(make_parser(), argv)
    alone("erase-compare")
    check_folder(options.out or "")
    runs = load_runs(options.runs or [], options.name, options.base_images)
    comparison = compare(runs, options.against, options.paired)
    console = Console()
    console.print(comparison.table())
    for note in comparison.notes:
        console.print(f"- {note}", markup=False, highlight=False)
    if options.out:
        for path in save_comparison(options.out, comparison):
            print(path)


def cli() -> None:
    """The installed command."""
    sys.exit(run(main))


if __name__ == "__main__":
    cli()
