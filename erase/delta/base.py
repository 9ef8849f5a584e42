"""The base of a delta: found again, and read as it was read then."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import replace
from pathlib import Path

import torch

from erase.delta import ErasedDelta
from erase.delta.origin import load_options
from erase.models import SHIPPED, DiffusionModel, LoadConfig, load_model
from erase.models.loading import is_here, kind_of, without_absent
from erase.prompts.canvas import EMBEDDED
from erase.prompts.errors import ErasureError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
log = logging.getLogger("erase")


def load_base(
    delta: ErasedDelta,
    name: str | Path | None = None,
    device: str | torch.device = "cpu",
    options: LoadConfig | None = None,
) -> DiffusionModel:
    """The base that a delta was made from, read as it was then.

    Args:
        delta: names its base and how it was read.
        name: where the base is now; by default where it was. A hub id is fetched only if it is
            given here: a delta may come from anybody, and name anything.
        device: where it goes.
        options: how it is read now; settings other than the defaults win over the delta's, of which
            those count that say something about the checkpoint and that it has.

    Raises:
        ErasureError: it cannot be loaded, or would have to be fetched. Whether it is the right one
            is checked where the delta is applied.
    """
    base, given = str(name or delta.metadata.get("base_id") or ""), options or LoadConfig()
    if not base:
        raise ErasureError(
            f"{delta.source} does not say which base it was made from; give the base with --model"
        )
    try:
        kind = kind_of(SHIPPED.get(base, base))
    except ErasureError as error:
        if name is not None:
            raise
        fault = str(error).partition(";")[0]
        raise ErasureError(
            f"{delta.source} names {base!r} as its base, and {fault}; give with --model where it is"
        ) from error
    config = _options(delta, base, kind, given)
    if name is None and base not in EMBEDDED:
        if not is_here(base, config):
            revision = f" --load.revision {config.revision}" if config.revision else ""
            fetch = f"to fetch it from the hub, say so with --model {base}{revision}, or "
            raise ErasureError(
                f"{delta.source} names {base!r} as its base, which is not on this machine; "
                f"{fetch if HUB_ID.fullmatch(base) else ''}give with --model where it is"
            )
        config = replace(config, offline=True)
    return load_model(base, device, config)


def _options(delta: ErasedDelta, base: str, kind: str, given: LoadConfig) -> LoadConfig:
    """How the base was read, as far as the checkpoint that is read now has it, and what is given.

    It may be an export, which holds one variant alone and no averaged weights. Other weights do not
    pass for the base's, since its fingerprint is compared later; the VAE is not in that, so a line
    tells of another.
    """
    stored = replace(load_options(delta.metadata, delta.source), offline=False)
    if base != delta.metadata.get("base_id"):
        stored = replace(stored, revision=None)
    stored = stored.meant_for(kind)
    if stored.config and not given.config and not os.path.exists(stored.config):
        raise ErasureError(
            f"{delta.source}: its base was read with the configurations of {stored.config}, which "
            "is not there; give them with --load.config"
        )
    held = without_absent(SHIPPED.get(base, base), stored)
    if stored.vae and not (held.vae or given.vae):
        log.warning(
            "%s: its base was read with the VAE %s, which is not there; the VAE of %s is taken, "
            "unless --load.vae names another",
            delta.source,
            stored.vae,
            base,
        )
    return held.updated(given)
