"""Requests one after another: an erasure that begins where an earlier one ended.

The base of the later erasure is the model as the earlier one left it: that model draws the latents,
is the teacher of anchors and retained prompts, and has the fingerprint that masks and training
states belong to. The original base would know the earlier concepts: held to it, a retained prompt
that touches one of them would teach it again.

What comes out is a delta against the original base, with both changes in it. So it is applied,
evaluated, exported and undone as any other, and it tells of all the requests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from erase.delta import ErasedDelta, difference
from erase.delta.origin import config_of, gone
from erase.models import DiffusionModel
from erase.prompts.errors import ErasureError


def followed(
    base: DiffusionModel, earlier: ErasedDelta, later: ErasedDelta, metadata: Mapping[str, str]
) -> ErasedDelta:
    """One delta of two, the second made where the first ended: the values of the later one where it
    changes a weight, elsewhere those of the earlier one, bit for bit.

    Unlike `erase.compose` nothing is added, so nothing is rounded. A weight that the later one gave
    its base value back is not in the delta.

    Args:
        base: of the earlier one; it is left as it was found.
        earlier: a delta of this base.
        later: a delta of base + `earlier`.
        metadata: of the delta that comes out.

    Raises:
        ErasureError: the earlier is of another base, or the later of something else than that.
    """
    with earlier.applied(base) as erased:
        later.check(erased)

    values, bits = {}, {}
    for name, param in base.parameters().items():
        if name not in earlier.values and name not in later.values:
            continue
        old = param.detach().cpu()
        new = old.flatten().clone()
        for delta in (earlier, later):
            if name in delta.values:
                new.scatter_(0, delta.places(name), delta.values[name].to(new.dtype))
        if change := difference(old, new.view(old.shape)):
            values[name], bits[name] = change
    return ErasedDelta(values, bits, dict(metadata))


def with_earlier(
    base: DiffusionModel,
    earlier: ErasedDelta,
    later: ErasedDelta,
    targets: list[str],
    metadata: Mapping[str, str],
) -> ErasedDelta:
    """The delta of all requests against the original base (`followed`), with their log: what each
    erased, how, from what, and what it left.

    `after` and `sha256` are digests of deltas (`ErasedDelta.sha256`) and `start` is the fingerprint
    of the weights that the request began from, so that whoever holds the deltas can follow the
    chain. There is no date in it: the same requests give the same delta, bit for bit. Dates stand
    in the folders' training.json.

    Args:
        base: of the earlier one.
        earlier: what was there before; its own log is gone on with.
        later: the new request's delta of base + `earlier`.
        targets: what it erased.
        metadata: of the delta that comes out (`erase.run.describe`).
    """
    whole = followed(base, earlier, later, metadata)
    log = earlier.requests
    if not log:
        about = earlier.metadata
        first = {"erased": gone(about), "after": None, "start": about["base_fingerprint"]}
        log = [{**first, **_how(about, earlier.source), "sha256": earlier.sha256}]
    start = later.metadata["base_fingerprint"]
    newest = {"erased": targets, "after": earlier.sha256, "start": start}
    log.append({**newest, **_how(metadata, "this erasure"), "sha256": whole.sha256})
    return replace(whole, metadata={**metadata, "requests": json.dumps(log)})


def _how(metadata: Mapping[str, str], source: str) -> dict[str, Any]:
    """Method, seed and settings (by their digest) of one erasure."""
    erase = config_of(metadata, source).get("erase")
    settings = erase if isinstance(erase, dict) else {}  # of several parts: each has its own
    return {
        "method": settings.get("method", metadata["method"]),
        "seed": settings.get("seed"),
        "config_sha256": hashlib.sha256(metadata["config"].encode()).hexdigest(),
        "created_with": metadata.get("created_with", "?"),
    }


def check_earlier(earlier: object) -> None:
    """Refuse what no erasure can begin after.

    Raises:
        ErasureError: no delta, or one that puts concepts back.
    """
    if not isinstance(earlier, ErasedDelta):
        raise ErasureError(
            f"after is a {type(earlier).__name__}; give a delta, such as "
            'ErasedDelta.load("runs/heart")'
        )
    if "undoes" in earlier.metadata:
        raise ErasureError(
            f"{earlier.source} puts concepts back, so nothing is erased after it; erase from the "
            "base that it gives"
        )
