"""Erased weights in the formats of others."""

from __future__ import annotations

import shutil
from pathlib import Path

from erase.delta import ErasedDelta
from erase.models import load_model
from prompts.errors import ErasureError


def export_diffusers(delta: ErasedDelta, base: str, out: str | Path, card: str = "") -> Path:
    """Write base + delta as a diffusers folder that `StableDiffusionPipeline.from_pretrained` loads.

    Args:
        delta: what changed.
        base: the checkpoint that it was made from, as for `load_model`.
        out: a folder that does not exist yet; it appears whole or not at all.
        card: text of its README.md, the model card.

    Raises:
        ErasureError: another base, an existing folder, or one that cannot be written to.
    """
    out = Path(out)
    if out.exists():
        raise ErasureError(f"{out} exists already; choose another folder or delete it")
    pipeline = delta.apply(load_model(base)).pipeline()
    aside = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        pipeline.save_pretrained(aside, safe_serialization=True)
        if card:
            (aside / "README.md").write_text(card, encoding="utf-8")
        aside.rename(out)
    except OSError as error:
        raise ErasureError(f"cannot write {out}: {error.strerror or error}; free some space or choose another folder") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out
