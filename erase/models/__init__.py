"""Checkpoints, by folder, hub id or the name `canvas` (the one that is shipped in this package)."""

from __future__ import annotations

from pathlib import Path

import torch

from erase.models.base import PRECISIONS, Cond, DiffusionModel, autocast, weights_at
from prompts.errors import ErasureError

CANVAS = Path(__file__).parent / "canvas"

__all__ = ["CANVAS", "PRECISIONS", "Cond", "DiffusionModel", "autocast", "load_model", "weights_at"]


def load_model(name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> DiffusionModel:
    """Load a Stable Diffusion checkpoint through stock diffusers; the safety checker is left out.

    Args:
        name: `canvas`, a diffusers folder, or a hub id.
        device: where the modules go.
        dtype: of the weights in memory; training needs float32.

    Raises:
        ErasureError: nothing can be loaded from there, or the family is not supported.
    """
    from diffusers import StableDiffusionPipeline

    from erase.models.sd import StableDiffusion

    path = CANVAS if name == "canvas" else Path(name)
    if path.exists() and not (path / "model_index.json").is_file():
        raise ErasureError(f"{path} is not a diffusers folder: it has no model_index.json")
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            path if path.exists() else name,
            dtype=dtype,
            safety_checker=None,
            requires_safety_checker=False,
            use_safetensors=True,
        )
    except Exception as error:  # diffusers, safetensors and the hub client each raise their own kinds
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise ErasureError(f"cannot load a Stable Diffusion checkpoint from {name!r}: {reason}") from error
    return StableDiffusion(pipeline.to(device), name)
