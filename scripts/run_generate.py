"""Generate the images of a prompt set, or of single prompts.

Each image has a seed of its own; a stopped run goes on; several processes share
the work.

the shipped model, its whole answer set:
  erase-generate --prompts canvas --out runs/base
  erase-generate --delta runs/heart/delta.safetensors --out runs/heart/images
one picture:
  erase-generate --prompt "A heart in Neon style." --seed 5 --out runs/one
several sets, the case numbers of the second counted on from the first's:
  erase-generate --model PATH --prompts i2p.csv --prompts coco.csv --out runs/2
several processes:
  accelerate launch --num_processes 4 scripts/run_generate.py --out runs/images
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from erase.prompts.canvas import EMBEDDED, strange_words
from erase.prompts.errors import ErasureError, counted
from erase.prompts.prompt_sets import PromptSet, joined, of_prompts
from erase.scripts.cli import (
    OneDelta,
    Parser,
    Words,
    add_base,
    add_config,
    add_prompts,
    build,
    check_folder,
    note,
    parse,
    parser,
    run,
)
from erase.scripts.cli.foreign import add_erased, check_erased, erased_base

if TYPE_CHECKING:  # --help needs none of it
    from erase.delta import ErasedDelta
    from erase.models import DiffusionModel


def make_parser() -> Parser:
    """All options."""
    from erase.eval.generate import GenerateConfig

    command = parser("erase-generate", __doc__)
    command.add_argument("--delta", action=OneDelta, help="an erasure to apply to the model first")
    add_erased(command)
    add_base(command, ", or else canvas")
    add_prompts(command, "canvas, its answer set of 2,400 images, if no prompt is given")
    command.add_argument(
        "--prompt", action=Words, help="a prompt of one image; may be given several times"
    )
    command.add_argument(
        "--seed",
        type=int | None,
        default=None,
        help="the seed of each --prompt (0 if none is given); sets have theirs",
    )
    command.add_argument(
        "--out", type=str, default="runs/images", help="folder of the images and their manifest"
    )
    add_config(command, GenerateConfig())
    return command


def main(argv: list[str] | None = None) -> None:
    """Parse, generate, say where the images are."""
    from erase.eval.generate import GenerateConfig, generate

    options = parse(make_parser(), argv)
    check_folder(options.out)
    check_erased(options, None)
    prompts = chosen(options)
    model, delta = drawing(options)
    tell_strange(model.name, prompts)
    provenance = {"model": model.name, "delta": "none"}
    if delta:
        delta.apply(model)
        provenance["delta"] = delta.origin.method
    provenance["fingerprint"] = model.fingerprint
    images = generate(
        model.pipeline(), prompts, options.out, build(GenerateConfig, options), provenance
    )
    print(f"{options.out}: {counted(len(images.rows), 'image')}")


def drawing(options: Namespace) -> tuple[DiffusionModel, ErasedDelta | None]:
    """The base, loaded, and what is to be applied to it."""
    from erase.delta import ErasedDelta
    from erase.delta.base import load_base
    from erase.foreign import read_erased
    from erase.models import load_model
    from erase.parallel.processes import default_device

    device = default_device()
    if options.erased:
        model = erased_base(options, device)
        return model, read_erased(model, options.erased, options=options.load)
    if options.delta:
        delta = ErasedDelta.load(options.delta)
        return load_base(delta, options.model, device, options.load), delta
    return load_model(options.model or "canvas", device, options.load), None


def chosen(options: Namespace) -> PromptSet:
    """The prompts of the command line, sets before single ones."""
    if options.seed is not None and not options.prompt:
        raise ErasureError(
            "--seed is for --prompt; a prompt set brings the seed of each of its images"
        )
    single = [of_prompts(options.prompt, options.seed or 0)] if options.prompt else []
    names = options.prompts or ([] if single else ["canvas"])
    return joined([*map(PromptSet.load, names), *single])


def tell_strange(model: str, prompts: PromptSet) -> None:
    """Say which prompts have words that an embedded model has never seen."""
    if model not in EMBEDDED:
        return
    found = [(row.prompt, strange_words(row.prompt)) for row in prompts.rows]
    strange = [(prompt, words) for prompt, words in found if words]
    if strange:
        prompt, words = strange[0]
        note(
            f"{model} has never seen words of {counted(len(strange), 'prompt')} (the first is "
            f"{prompt!r}: {', '.join(words)}); it draws objects in a style and a colour, as in "
            "'A red heart image in Neon style.'"
        )


def cli() -> None:
    """The installed command."""
    sys.exit(run(main, resumes=True))


if __name__ == "__main__":
    cli()
