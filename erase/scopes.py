"""Which parameters may change."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from prompts.errors import ErasureError, unknown

SCOPES = {
    "full": r"^unet\.",
    "xattn": r"^unet\..*\battn2\b",
    "xattn_kv": r"^unet\..*\battn2\.to_[kv]\b",
    "selfattn": r"^unet\..*\battn1\b",
    "noxattn": r"^unet\.(?!.*\battn2\b)",
    "text_encoder": r"^text_encoder\.",
}
"""Named scopes, as patterns over `component.parameter` names. `noxattn` is every UNet weight outside cross-attention (ESD-u)."""


def select(params: Mapping[str, nn.Parameter], scope: str) -> dict[str, nn.Parameter]:
    """The parameters of a scope, in their given order.

    Args:
        params: `component.parameter` name -> parameter.
        scope: a name of `SCOPES`, or a regular expression searched in the names (it must hold a character that no scope name has).

    Raises:
        ErasureError: an unknown name, a malformed pattern, or a scope that matches nothing.
    """
    if scope not in SCOPES and re.fullmatch(r"\w+", scope):
        raise unknown("scope", scope, SCOPES)
    try:
        pattern = re.compile(SCOPES.get(scope, scope))
    except re.error as error:
        raise ErasureError(f"scope {scope!r} is not a regular expression: {error}") from error
    chosen = {name: param for name, param in params.items() if pattern.search(name)}
    if not chosen:
        raise ErasureError(f"scope {scope!r} matches none of the {len(params)} parameters, e.g. {next(iter(params), 'none')!r}")
    return chosen
