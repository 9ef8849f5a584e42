"""How a checkpoint is to be read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prompts.errors import unknown

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class LoadConfig:
    """How a checkpoint is to be read; the defaults suit nearly all."""

    variant: str | None = None
    """of a diffusers checkpoint: fp16, non_ema, …; parts that have no such file are read without"""
    revision: str | None = None
    """branch, tag or commit of a hub id"""
    dtype: str = "float32"
    """of the weights in memory: float32 (training needs it), float16 or bfloat16"""
    prediction: str | None = None
    """epsilon or v_prediction, where a single file does not tell (Stable Diffusion 2.x)"""
    ema: bool = False
    """of a single file that holds both: the averaged weights (true) or the last ones (false, as A1111 and ComfyUI take)"""
    config: str | None = None
    """for a single file: a diffusers folder whose configs and tokenizers fit it, where the shipped ones do not"""
    offline: bool = False
    """of a hub id: only what is in the local cache"""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.prediction is not None and self.prediction not in PREDICTIONS:
            raise unknown("prediction", self.prediction, PREDICTIONS)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]
