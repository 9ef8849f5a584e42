"""Erase a concept from a Stable Diffusion checkpoint.

Finds the weights that matter to the concept (SalUn's saliency mask),
fine-tunes only those so that the concept's prompts draw the anchor instead, and
writes what changed: OUT/delta.safetensors. The base is not touched. Stopped at
any time, the same command goes on.

on the shipped model, a minute; by keys and values alone, which keeps most;
twice, against who would bring it back:
  erase-concept --concept heart --anchor mushroom --out runs/heart
  erase-concept --concept cyan --method salun-text --out runs/cyan
  erase-concept --concept Neon --method salun-twofold --out runs/neon
on a diffusers folder, a single file or a hub id:
  erase-concept --model PATH --concepts nudity --out runs/nudity
  erase-concept --model PATH --concepts nudity --concept "Van Gogh" --out runs/2
what a name alone would mean, as YAML for --concepts:
  erase-concept --model PATH --concept "Van Gogh" --propose
a later request, on top of an earlier erasure; one delta that holds both:
  erase-concept --after runs/heart --concept Neon --out runs/heart-neon
a recipe by its name, or a YAML file; options after it win:
  erase-concept --config canvas
all settings of a preset:
  erase-concept --method salun-paper --print_config
options of another package's method, or of one in this folder:
  erase-concept --method package.module:NAME --help
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from erase.prompts.canvas import EMBEDDED
from erase.prompts.concepts import shipped, to_yaml
from erase.prompts.proposals import kinds
from erase.scripts.cli import (
    OneDelta,
    Parser,
    Words,
    add_config,
    build,
    check_folder,
    config_files,
    note,
    parse,
    parser,
    read_concepts,
    run,
)
from erase.scripts.cli.idle import check_alone
from erase.scripts.cli.plugins import names_given
from erase.scripts.cli.recipes import recipes

if TYPE_CHECKING:
    from erase.run import EraseConfig
    from erase.training.config import TunedConfig


def chosen_method(argv: list[str] | None) -> str:
    """The method of the command line or its config file: it decides which further options there
    are."""
    from erase.run import EraseConfig

    return (names_given(argv, "method", config_files(argv)) or [EraseConfig.method])[-1]


def make_parser(method: str) -> Parser:
    """Options of the erasure and of this method."""
    from erase.methods import METHODS, get_method
    from erase.run import EraseConfig
    from erase.training.config import TunedConfig

    command = parser("erase-concept", __doc__)
    command.add_argument(
        "--concept", action=Words, help="what to forget; may be given several times"
    )
    command.add_argument(
        "--anchor", action=Words, help="what to put in its place, one for each concept"
    )
    command.add_argument(
        "--retain", action=Words, help="a prompt whose images must stay; may be given several times"
    )
    command.add_argument(
        "--concepts",
        action=Words,
        help=f"a YAML file of concepts, or the name of a shipped one ({', '.join(shipped())}); may "
        "be given several times. A --concept that it has picks that one alone, any other "
        "--concept is one more",
    )
    command.add_argument(
        "--kind",
        type=str | None,
        default=None,
        help=f"what the concepts are, for what is proposed by name: {', '.join(kinds())}",
    )
    command.add_argument(
        "--propose", action="store_true", help="print the concepts as YAML, to edit, and stop"
    )
    command.add_argument(
        "--after",
        action=OneDelta,
        help="the delta of an earlier erasure of the same base, or its folder, to go on from. What "
        "it made of the base draws the images and is the teacher; latents.earlier keeps its "
        "concepts gone. The new delta holds both, and the log of all requests (docs/sequences.md)",
    )
    command.add_argument(
        "--out",
        type=str,
        default="runs/erased",
        help="folder for delta.safetensors, the mask, and what a stopped run needs",
    )
    command.add_argument(
        "--method", type=str, default=method, help=f"{METHODS.listed()}, or package.module:NAME"
    )
    config = get_method(method).config
    add_config(command, EraseConfig(method=method), skip={"method"})
    add_config(command, config)
    command.variant = f"--method {method}"
    of_training = {field.name for field in fields(TunedConfig)} - set(vars(config))
    command.absent = dict.fromkeys(of_training, f"{method} takes no gradient steps")
    return command


def hints(config: EraseConfig, settings: Any, concepts: int) -> Iterator[str]:
    """What a run without a recipe should know of its settings."""
    from erase.methods import get_method
    from erase.training.config import TunedConfig

    method, usual = config.method, get_method(config.method).config
    if config.model not in EMBEDDED:
        yield (
            f"the settings of {method} were measured on the embedded model, not on {config.model}; "
            "a recipe has settings for Stable Diffusion: erase-list recipes"
        )
    elif f"{config.model}-{method}" in recipes() and settings == usual:
        yield (
            f"the defaults of {method} are its paper's, for Stable Diffusion; what was measured on "
            f"the embedded model: --config {config.model}-{method}"
        )
    if concepts > 1 and isinstance(settings, TunedConfig) and settings.train == usual.train:
        yield from _more(config, settings, concepts)


def _more(config: EraseConfig, settings: TunedConfig, concepts: int) -> Iterator[str]:
    """What several concepts want more of than one."""
    from erase.training.config import TunedConfig

    masked = settings.mask.density != 1
    draws = TunedConfig.draws if masked else settings.draws
    counts = {} if settings.one_by_one else {"train.steps": settings.train.steps}
    counts |= {f"latents.{name}": getattr(config.latents, name) for name in draws}
    if masked:
        counts["mask.batches"] = settings.mask.batches
    more = [f"--{name} {concepts * count}" for name, count in counts.items()]
    if settings.mask.rule == "benefit":  # their gradients' sums would cancel out
        more.append("--mask.rule fisher-ratio")
    if more:
        yield f"the defaults are for one concept; for {concepts} concepts use {' '.join(more)}"


def needs(config: EraseConfig, settings: Any, after: str | None) -> dict[str, tuple[object, str]]:
    """Options that another decides about: whether it has them looked at, and what it is."""
    from erase.training.config import TunedConfig
    from erase.training.saliency import ranking_of

    images = config.latents.forget_images or config.latents.retain_images
    found: dict[str, tuple[object, str]] = {
        "latents.captions": (images, "--latents.forget_images or --latents.retain_images"),
        "latents.earlier": (after, "--after"),
    }
    if not isinstance(settings, TunedConfig):
        return found
    by_forget = ranking_of(settings.mask) == "forget"
    return found | {
        "barrier": (settings.combine == "barrier", "--combine barrier"),
        "smoothing_draws": (settings.smoothing, "--smoothing"),
        "mask.batch_size": (by_forget, "--mask.rule forget"),
        "mask.guidance": (by_forget, "--mask.rule forget"),
        "mask.batches": (not by_forget, "another --mask.rule than forget"),
    }


def main(argv: list[str] | None = None) -> None:
    """Parse, erase, say what was made."""
    from erase.delta import ErasedDelta
    from erase.methods import get_method
    from erase.models.loading import check_model
    from erase.run import EraseConfig, erase_concept

    method = chosen_method(argv)
    options = parse(make_parser(method), argv)
    config = build(EraseConfig, options)
    check_folder(options.out)
    check_model(config.model)
    concepts = read_concepts(
        options.concept,
        options.anchor,
        options.concepts,
        config.model,
        options.retain,
        options.kind,
    )
    if options.propose:
        print(to_yaml(concepts), end="")
        return
    settings = build(type(get_method(method).config), options)
    check_alone(sys.argv[1:] if argv is None else argv, needs(config, settings, options.after))
    after = ErasedDelta.load(options.after) if options.after else None
    if not config_files(argv):
        for hint in hints(config, settings, len(concepts)):
            note(hint)
    delta = erase_concept(concepts, config, settings, out=options.out, after=after)
    before = f"; after {after.title}" if after else ""
    print(
        f"{options.out}/delta.safetensors: {delta.count:,} weights changed; "
        f"{', '.join(c.target + ' -> ' + c.anchor for c in concepts)}{before}"
    )


def cli() -> None:
    """The installed command."""
    sys.exit(run(main, resumes=True))


if __name__ == "__main__":
    cli()
