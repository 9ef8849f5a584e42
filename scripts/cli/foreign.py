"""The options of erased checkpoints that other programs made, and the delta that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from erase.prompts.concepts import shipped
from erase.prompts.errors import ErasureError
from erase.scripts.cli import Parser, Words
from erase.scripts.cli.naming import concepts_named

if TYPE_CHECKING:  # --help needs none of it
    import torch

    from erase.delta import ErasedDelta
    from erase.models import DiffusionModel


def add_erased(command: Parser, further: str = "") -> None:
    """The option of foreign checkpoints, `--erased`; `further` says what else it takes."""
    command.add_argument(
        "--erased",
        action=Words,
        help="in the place of --delta, what any program erased from --model: a diffusers folder, a "
        "single file, a state dict of the UNet or of a text encoder (.safetensors, .pt), a LoRA, a "
        f"delta{further}; may be given several times",
    )


def add_named(command: Parser) -> None:
    """The option of the concepts that a foreign checkpoint forgot, `--concepts`."""
    command.add_argument(
        "--concepts",
        action=Words,
        help="of --erased, which names none: what was forgotten, by name (on canvas, e.g. heart), "
        f"a YAML file or a shipped one ({', '.join(shipped())}); may be given several times",
    )


def check_erased(options: Namespace, delta: str | list[str] | None) -> None:
    """Refuse `--erased` beside `--delta`, whose default is `delta`, and concepts of a delta that
    names its own."""
    if options.erased and options.delta != delta:
        raise ErasureError(
            "give --delta or --erased; --erased takes deltas too, and puts several together"
        )
    if "concepts" in options and options.concepts and not options.erased:
        raise ErasureError(
            "--concepts is for --erased; a delta names its own concepts, so leave it out"
        )


def place_of(options: Namespace, name: str) -> str:
    """Where something made of an erasure goes unless the user says it: beside its delta, so that no
    two share a place; of what other programs erased, under runs/, by its name."""
    if options.erased:
        return str(Path("runs") / Path(options.erased[0]).stem / name)
    from erase.delta.stored import FILE

    path = Path(options.delta)
    if path.name == FILE:
        return str(path.parent / name)
    return str((path if path.is_dir() else path.with_suffix("")) / name)


def erased_model(
    options: Namespace, device: str | torch.device
) -> tuple[DiffusionModel, ErasedDelta]:
    """The base, loaded, and what `--erased` names as a delta of it.

    Raises:
        ErasureError: as `erase.foreign.read_erased`; or no concept is named, by an option or by a
            delta.
    """
    from erase.foreign import read_erased

    model = erased_base(options, device)
    concepts = concepts_named(options.concepts, model.name) if options.concepts else []
    delta = read_erased(model, options.erased, concepts, options.load)
    if not delta.concepts:
        raise ErasureError(
            f"{delta.source} does not say what was forgotten; name it with --concepts"
        )
    return model, delta


def erased_base(options: Namespace, device: str | torch.device) -> DiffusionModel:
    """The base of what `--erased` names: `--model`; else, where all of it are deltas, the one that
    the first of them names; else canvas."""
    from erase.delta import ErasedDelta
    from erase.delta.base import load_base
    from erase.foreign.files import find
    from erase.models import load_model

    sources = [find(path, options.load.variant) for path in options.erased]
    if all(source.kind == "delta" for source in sources):
        first = ErasedDelta.load(sources[0].path)
        return load_base(first, options.model, device, options.load)
    return load_model(options.model or "canvas", device, options.load)
