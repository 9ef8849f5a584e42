"""Choose tensors of an erased model that a trainer must not change.

A conditional defence: fine-tuning brings the concept back more slowly where
whoever trains leaves these tensors as they are, as a fine-tuning service can.
The weights alone enforce nothing (docs/freezing.md).

half of the parameters, learned by simulated fine-tuning on what the concept
showed and on innocent images:
  erase-freeze --delta runs/heart --out runs/heart/freeze.json
innocent images of your own, with captions:
  erase-freeze --delta D --latents.retain_images FOLDER --ratio 0.3
the control, as much of it at random:
  erase-freeze --delta D --rule random --out runs/heart/random.json
how soon the concept comes back under it:
  erase-evaluate --delta D --evaluators '[relearning]' \\
      --relearning.freeze runs/heart/freeze.json

The file is JSON: names of tensors with their shapes, the fingerprint of the
erased model, and how the choice was made.
"""

from __future__ import annotations

import sys

from jsonargparse import Namespace

from erase.prompts.errors import ErasureError
from erase.prompts.reading import as_path
from erase.scripts.cli import (
    OneDelta,
    Parser,
    add_base,
    add_config,
    alone,
    build,
    parse,
    parser,
    run,
)
from erase.scripts.cli.foreign import add_erased, add_named, check_erased, erased_model, place_of

DELTA = "runs/erased/delta.safetensors"


def make_parser() -> Parser:
    """All options."""
    from erase.latents.config import LatentConfig
    from erase.training.freezing import FreezeConfig

    command = parser("erase-freeze", __doc__)
    command.add_argument("--delta", action=OneDelta, default=DELTA, help="what erase-concept wrote")
    add_erased(command)
    add_named(command)
    add_base(command)
    add_config(command, FreezeConfig())
    command.add_argument(
        "--latents",
        type=LatentConfig,
        default=LatentConfig(),
        help="training images of two users: one learns the concept, one innocent things",
    )
    command.add_argument("--seed", type=int, default=0, help="of images, batches and the control")
    command.add_argument(
        "--out",
        type=str | None,
        default=None,
        help="the .json file to write, which does not exist yet; default: freeze.json, beside the "
        "delta; of --erased NAME, runs/NAME/freeze.json",
    )
    return command


def main(argv: list[str] | None = None) -> None:
    """Parse, draw with the base, choose on the erased model, write."""
    from erase.delta import ErasedDelta
    from erase.delta.base import load_base
    from erase.latents.latent_set import Given
    from erase.latents.prepare import Plan
    from erase.parallel.processes import default_device
    from erase.task import Task
    from erase.training.freezing import FreezeConfig, find_freeze

    options = parse(make_parser(), argv)
    alone("erase-freeze")
    check_erased(options, DELTA)
    options.out = options.out or place_of(options, "freeze.json")
    check_out(options)
    config = build(FreezeConfig, options)
    if options.erased:
        model, delta = erased_model(options, default_device())
    else:
        delta = ErasedDelta.load(options.delta)
        model = load_base(delta, options.model, default_device(), options.load)
    concepts, cache = delta.origin.concepts, options.latents.cache
    plan = Plan(model, concepts, options.latents, options.seed, cache and as_path(cache))
    drawn = Given(plan.forget(), plan.retain()) if config.rule == "learned" else plan
    with delta.applied(model):
        freeze = find_freeze(Task(model, concepts, drawn, options.seed), config)
        whole = sum(param.numel() for param in model.parameters().values())
    freeze.save(options.out)
    print(
        f"{options.out}: {len(freeze.shapes)} tensors of {delta.name} are frozen, "
        f"{freeze.count:,} of its {whole:,} weights; it binds whoever honours it"
    )


def check_out(options: Namespace) -> None:
    """Refuse a name that no JSON file has, and a file that would be overwritten."""
    from erase.export.whole import check_free

    path = as_path(options.out)
    if path.suffix != ".json":
        folder = options.out.endswith("/") or path.is_dir()
        name = path / "freeze.json" if folder else f"{path}.json"
        raise ErasureError(f"--out is {options.out}; name a .json file, e.g. {name}")
    check_free(options.out)


def cli() -> None:
    """The installed command."""
    sys.exit(run(main))


if __name__ == "__main__":
    cli()
