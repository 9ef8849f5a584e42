"""The options `--protocol` and `--suite`: a protocol's settings become the defaults, so that any
option given beside it wins."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import PromptSet
from erase.scripts.cli.plugins import names_given
from erase.scripts.cli.recipes import config_files

if TYPE_CHECKING:
    from erase.eval.protocols import Protocol


def add_protocol(command: Any, argv: list[str] | None) -> Protocol | None:
    """Add `--protocol`, and set the defaults of the one that is named.

    Raises:
        ErasureError: an unknown protocol, or several.
    """
    from erase.eval.protocols import load_protocol, protocol_names

    command.add_argument(
        "--protocol",
        type=str | None,
        default=None,
        help=f"how the field measures: {', '.join(protocol_names())}. It sets the prompts, how "
        "images are made and the evaluators; options beside it win (docs/protocols.md)",
    )
    command.add_argument(
        "--suite",
        type=str | None,
        default=None,
        help="quick or full: scores, other wordings, attacks, probes and relearning on a stated "
        "budget; short for --protocol suite/quick and suite/full",
    )
    names = names_given(argv, "protocol", config_files(argv))
    names += [f"suite/{name}" for name in names_given(argv, "suite", config_files(argv))]
    if len(set(names)) > 1:
        raise ErasureError(
            f"--protocol is given as {' and as '.join(dict.fromkeys(names))}; name one"
        )
    if not names:
        return None
    protocol = load_protocol(names[0])
    prompts = names_given(argv, "prompts", config_files(argv))
    command.set_defaults(protocol.options(bool(prompts) and "canvas" not in prompts))
    return protocol


def prompts_of(
    protocol: Protocol | None, options: Any, concepts: Sequence[ConceptSpec]
) -> PromptSet | None:
    """The protocol's own prompts; None where there is no protocol, or where --prompts are given.

    Raises:
        ErasureError: something that the protocol needs is not given.
    """
    if protocol is None:
        return None
    protocol.check_needs(lambda option: reduce(getattr, option.split("."), options))
    return None if options.prompts else protocol.prompt_set(concepts)
