"""Scopes: the parameters that may change, by pattern."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from erase.prompts.errors import ErasureError, unknown

# A UNet's attn2 looks at the text. In a transformer with joint attention, text and image look at
# each other through one attention (`attn`), in which each has projections of its own: the text's
# are called add_*; `attn2`, where there is one, is the image's alone. Blocks of one stream project
# text and image by the same weights, which are neither the text's nor the image's: only `full`,
# `noxattn` and, of their feed-forward half, `ff` hold them. FLUX's single_transformer_blocks are
# such, whose last matrix ends both halves (FLUX.1's proj_out, FLUX.2's attn.to_out; the latter's
# first matrix begins both, and is left to the wider scopes), and Z-Image's layers, before which the
# text passes through blocks of its own (context_refiner) and so does the image (noise_refiner).
_TEXT = (
    r"^unet\..*\battn2\b|^transformer\..*\battn\.(add_|to_add_out|norm_added_)"
    r"|^transformer\.context_refiner\.\d+\.attention\."
)
_KV = (
    r"^unet\..*\battn2\.to_[kv]\b|^transformer\..*\battn\.add_[kv]_proj\b"
    r"|^transformer\.context_refiner\.\d+\.attention\.to_[kv]\b"
)
_BLOCK = r"^transformer\.transformer_blocks\..*"
_IMAGE = (
    rf"^unet\..*\battn1\b|{_BLOCK}\b(attn\.(to_[qkv]|to_out|norm_[qk])|attn2)\b"
    r"|^transformer\.noise_refiner\.\d+\.attention\."
)
_READS = r"^unet\..*\battn2\.to_[kv]\.weight$"
_ENTRY = (
    r"^transformer\.(context_embedder|txt_in|cap_embedder\.1"
    r"|time_text_embed\.text_embedder\.linear_1)\.weight$"
)
_SINGLE = r"^transformer\.single_transformer_blocks\.\d+\.(proj_(mlp|out)|attn\.to_out\.weight)\b"
_FORWARD = (
    rf"^unet\..*\bff\b|{_BLOCK}\b(ff(_context)?|(img|txt)_mlp)\b|{_SINGLE}"
    r"|^transformer\..*\bfeed_forward\."
)
SCOPES = {
    "full": r"^(unet|transformer)\.",
    "xattn": _TEXT,
    "xattn_kv": _KV,
    "text_in": rf"{_READS}|{_ENTRY}",
    "selfattn": _IMAGE,
    "ff": _FORWARD,
    "noxattn": rf"^(?!{_TEXT})(unet|transformer)\.",
    "text_encoder": r"^text_encoder(_\d)?\.",
}
"""Named scopes, as patterns over `component.parameter` names: `full` is the whole denoiser,
`noxattn` all of it outside cross-attention (ESD-u); of a joint attention, `xattn` is the text's
side and `selfattn` the image's."""


ABOUT = {
    "full": "the whole denoiser",
    "xattn": "cross-attention; of a joint attention, the text's side (ESD-x)",
    "xattn_kv": "keys and values of the text in there",
    "text_in": "what is given the text states themselves: keys and values of a UNet's "
    "cross-attention, the matrices by which they enter a transformer (closed forms)",
    "selfattn": "self-attention; of a joint attention, the image's side",
    "ff": "the feed-forward layers, of a joint attention's blocks both sides'",
    "noxattn": "the denoiser outside cross-attention (ESD-u)",
    "text_encoder": "the text encoders, all there are",
}
"""each scope in words"""


def select(params: Mapping[str, nn.Parameter], scope: str) -> dict[str, nn.Parameter]:
    """The parameters of a scope, in their given order.

    Args:
        params: `component.parameter` name -> parameter.
        scope: a name of `SCOPES`, or a regular expression searched in the names (it must hold a
            character that no scope name has).

    Raises:
        ErasureError: an unknown name, a malformed pattern, or a scope that matches nothing.
    """
    if scope not in SCOPES and re.fullmatch(r"\w+", scope):
        raise unknown("scope", scope, SCOPES)
    try:
        pattern = re.compile(SCOPES.get(scope, scope))
    except re.error as error:
        raise ErasureError(f"scope {scope!r} is not a regular expression: {error}") from error
    selected = {name: param for name, param in params.items() if pattern.search(name)}
    if not selected:
        raise ErasureError(
            f"scope {scope!r} matches none of the {len(params)} parameters, e.g. "
            f"{next(iter(params), 'none')!r}"
        )
    return selected


NORMS = {"txt_in": "txt_norm", "cap_embedder.1": "cap_embedder.0"}
"""matrix of a transformer's entry -> the norm before it"""


@dataclass(frozen=True)
class TextInput:
    """What of the text a matrix is applied to."""

    pooled: bool = False
    """the state of the whole prompt, and not that of each token"""
    norm: str | None = None
    """`component.module` that they pass through before"""


def text_input(name: str) -> TextInput | None:
    """What a parameter reads of the text, if it is a matrix that is applied to text states
    themselves, or to their norm."""
    if reads_text(name):
        return TextInput()
    if not re.search(_ENTRY, name):
        return None
    module = name.removeprefix("transformer.").removesuffix(".weight")
    if module.startswith("time_text_embed"):
        return TextInput(pooled=True)
    norm = NORMS.get(module)
    return TextInput(norm=norm and f"transformer.{norm}")


def reads_text(name: str) -> bool:
    """Whether a parameter is a key or value matrix of a UNet, applied to text states themselves."""
    return bool(re.search(_READS, name))
