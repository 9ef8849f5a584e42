"""Checkpoints, by folder, single file, hub id or the name of one that is shipped in this package
(`canvas`, `canvas-flow`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from erase.models.base import Cond, DiffusionModel
from erase.models.config import LoadConfig
from erase.models.precision import PRECISIONS, autocast, check_precision, pin_mkl_rounding
from erase.prompts.canvas import EMBEDDED

CANVAS = Path(__file__).parent / "canvas"
CANVAS_FLOW = Path(__file__).parent / "canvas_flow"
SHIPPED = dict(zip(EMBEDDED, (CANVAS, CANVAS_FLOW), strict=True))
"""name -> folder"""

__all__ = [
    "CANVAS",
    "CANVAS_FLOW",
    "PRECISIONS",
    "SHIPPED",
    "Cond",
    "DiffusionModel",
    "LoadConfig",
    "autocast",
    "check_precision",
    "load_model",
    "wrap",
]


def load_model(
    name: str | Path, device: str | torch.device = "cpu", options: LoadConfig | None = None
) -> DiffusionModel:
    """Load a checkpoint; its family is recognised from what it says of itself, and its safety
    checker is left out.

    Args:
        name: `canvas` or `canvas-flow`; a diffusers folder; a single file in the LDM layout
            (.safetensors, .ckpt, .pt), as A1111 and ComfyUI use, or of a flow transformer; or a
            hub id.
        device: where the modules go.
        options: variant, revision, dtype, what a single file does not tell, and whether parts wait
            in main memory.

    Raises:
        ErasureError: nothing can be loaded from there, its family is not supported, or its weights
            are damaged.
    """
    from erase.models.loading import load_pipeline
    from erase.models.waiting import Waiting

    pin_mkl_rounding()
    options = options or LoadConfig()
    if name == "canvas-flow" and not options.vae:  # it shares canvas's
        options = replace(options, vae=str(CANVAS / "vae"))
    pipeline = load_pipeline(SHIPPED.get(str(name), name), options)
    if options.offload:
        Waiting(pipeline, torch.device(device), by_block=options.offload == "blocks")
    else:
        pipeline.to(device)
    return wrap(pipeline, str(name))


def wrap(pipeline: Any, name: str = "in memory") -> DiffusionModel:
    """The `DiffusionModel` over a stock diffusers pipeline, by its class.

    Raises:
        ErasureError: a pipeline class that is not supported.
    """
    from erase.models.families import family_of

    model: DiffusionModel = family_of(pipeline, name)(pipeline, name)
    return model
