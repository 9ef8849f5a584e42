"""A page in the browser: type a prompt, see the base and the erased model.

Both draw from the same prompt and seed; a slider scales the change. The page is
served to this machine alone unless --host says otherwise. Needs the extra
`live`: pip install 'concept-erasure-toolkit[live]'

the shipped model; the heart is erased in closed form, in seconds:
  erase-live
  erase-live --concept Neon
what erase-concept wrote, one or several, or a folder of runs:
  erase-live --delta runs/heart --delta runs/neon
  erase-live --delta runs
the CLIP score under each picture:
  erase-live --delta runs/nudity --judge clip
"""

from __future__ import annotations

import logging
import sys
import threading
import webbrowser
from importlib.util import find_spec
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from erase.prompts.canvas import EMBEDDED
from erase.prompts.errors import ErasureError
from erase.scripts.cli import (
    Parser,
    Words,
    add_base,
    add_group,
    alone,
    parse,
    parser,
    read_concepts,
    run,
)

if TYPE_CHECKING:  # --help needs none of it
    from erase.scripts.live.stage import Stage

CANVAS = "heart"  # what is erased where nothing is named
LOOPBACK = ("127.0.0.1", "localhost", "::1")
log = logging.getLogger("erase")


def make_parser() -> Parser:
    """All options."""
    from erase.eval.evaluators.clip import Config
    from erase.eval.generate_config import GenerateConfig
    from erase.scripts.live.judging import JUDGES

    command = parser("erase-live", __doc__)
    command.add_argument(
        "--delta",
        action=Words,
        help="what erase-concept wrote: a file, its folder, or a folder of such; may be given "
        "several times",
    )
    command.add_argument(
        "--concept",
        action=Words,
        help="a concept to erase now, by uce in closed form, beside the deltas; may be given "
        f"several times; {CANVAS}, if there is neither",
    )
    add_base(command)
    command.add_argument(
        "--prompt", type=str | None, default=None, help="what stands in the prompt's field at first"
    )
    command.add_argument(
        "--judge",
        type=str,
        default="auto",
        help="whose word stands under each picture: "
        + "; ".join(f"{name}: {what}" for name, what in JUDGES.items()),
    )
    command.add_argument(
        "--host",
        type=str,
        default=LOOPBACK[0],
        help="the address to serve at; 0.0.0.0 is every network that this machine is in",
    )
    command.add_argument(
        "--port", type=int | None, default=None, help="default: the first free one from 7860 on"
    )
    command.add_argument("--open", action="store_true", help="open the page in a browser")
    add_group(command, "generate", GenerateConfig())
    add_group(command, "clip", Config())
    return command


def main(argv: list[str] | None = None) -> None:
    """Parse, load, erase what is to be erased now, serve until stopped."""
    from erase.scripts.live.page import gradio, make_page, serve

    options = parse(make_parser(), argv)
    gradio()  # what is missing is said before anything is loaded
    alone("erase-live")
    if options.port is not None and not 1 <= options.port <= 65535:
        raise ErasureError(f"--port is {options.port}; it must be between 1 and 65535")
    stage = make_stage(options)
    page = make_page(stage, options.prompt or first_prompt(stage), options.generate)
    address = serve(page, options.host, options.port)
    if options.host not in LOOPBACK:
        log.warning("whoever reaches %s can draw with this model; it asks for no password", address)
    print(f"{address}  shows {'; '.join(stage.erasures)}. Ctrl-C ends it.", flush=True)
    if options.open:
        webbrowser.open(address)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.close(verbose=False)


def make_stage(options: Namespace) -> Stage:
    """The base, its erasures, and the judge."""
    from erase.delta.base import load_base
    from erase.models import load_model
    from erase.parallel.processes import default_device
    from erase.scripts.live.finding import find_deltas, made_now, named, of_base
    from erase.scripts.live.judging import check_judge, find_judge
    from erase.scripts.live.stage import Stage

    check_judge(options.judge)
    found = [find_deltas(path) for path in options.delta]
    device = default_device()
    if found:
        model = load_base(found[0][0], options.model, device, options.load)
    else:
        model = load_model(options.model or "canvas", device, options.load)
    wanted = options.concept
    if not found and not wanted:
        if model.name not in EMBEDDED:
            raise ErasureError(
                "nothing is named to be shown; give what erase-concept wrote with --delta, or a "
                "--concept to erase now"
            )
        wanted = [CANVAS]
    concepts = read_concepts(wanted, [], None, model.name, []) if wanted else []
    deltas = [delta for deltas in found for delta in of_base(deltas, model)]
    erasures = named([*deltas, *made_now(model, concepts)])
    judge = find_judge(options.judge, model, options.clip)
    return Stage(model, erasures, options.generate, judge)


def first_prompt(stage: Stage) -> str:
    """A prompt that names what the first erasure took away; of other models than the embedded one,
    none."""
    from erase.prompts.canvas import KINDS, vocabulary

    first = next(iter(stage.erasures.values())).delta.title
    words = vocabulary()
    kind = words.kind_of(first)
    if stage.model.name not in EMBEDDED or kind is None:
        return ""
    cell = {**dict(zip(KINDS, ("heart", "Flat", "red"), strict=True)), kind: first}
    return words.grid.format(**cell)


def cli() -> None:
    """The installed command."""
    # without gradio nothing is served, so nothing needs to be loaded
    sys.exit(run(main, libraries=find_spec("gradio") is not None))


if __name__ == "__main__":
    cli()
