"""List what can be named on a command line.

Methods, evaluators, attacks, protocols, concepts, prompt sets, recipes,
families of checkpoints and scopes; what other packages bring is marked.

the names of all; of some also what they are, with the papers:
  erase-list
  erase-list methods recipes
how many weights each scope has in a checkpoint:
  erase-list scopes --model canvas
for programs:
  erase-list --json
"""

from __future__ import annotations

import json
import shutil
import sys

from erase.prompts.errors import ErasureError, unknown
from erase.scripts.cli import Parser, note, parse, parser, run
from erase.scripts.cli.catalogue import SECTIONS, as_names, as_text, scopes

NARROWEST = 60  # columns


def make_parser() -> Parser:
    """All options."""
    from erase.models.config import LoadConfig

    command = parser("erase-list", __doc__, "[WHAT ...]")
    command.add_argument(
        "what",
        type=str,
        nargs="*",
        help=f"{', '.join(SECTIONS)}; if none is named, the names in all of them",
    )
    command.add_argument(
        "--model",
        type=str | None,
        default=None,
        help="of scopes: the checkpoint whose weights are counted",
    )
    command.add_argument(
        "--load", type=LoadConfig, default=LoadConfig(), help="how the checkpoint is read"
    )
    command.add_argument("--json", action="store_true", help="as JSON: list -> its entries")
    command.set_defaults(what=[])  # not in add_argument, which the oldest jsonargparse refuses
    return command


def main(argv: list[str] | None = None) -> None:
    """Parse, list."""
    options = parse(make_parser(), argv)
    names = options.what or (["scopes"] if options.model else list(SECTIONS))
    for name in names:
        if name not in SECTIONS:
            raise unknown("list", name, SECTIONS)
    if options.model and "scopes" not in names:
        raise ErasureError("--model is for the list of scopes; add scopes, or leave it out")

    lists = {name: SECTIONS[name]() for name in dict.fromkeys(names)}
    if options.model:
        from erase.models import load_model

        lists["scopes"] = scopes(load_model(options.model, options=options.load).parameters())
    if options.json:
        plain = {}
        for name, entries in lists.items():
            plain[name] = [entry.plain() for entry in entries]
        print(json.dumps(plain, indent=1, ensure_ascii=False))
        return
    width = max(shutil.get_terminal_size().columns, NARROWEST)
    if options.what or options.model:
        print(as_text(lists, width))
    else:
        print(as_names(lists, width))
        note("what they are: erase-list LIST, such as erase-list methods")


def cli() -> None:
    """The installed command."""
    counts = any(word.split("=")[0] in ("--model", "--config") for word in sys.argv)
    sys.exit(run(main, libraries=counts))


if __name__ == "__main__":
    cli()
