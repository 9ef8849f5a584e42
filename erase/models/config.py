"""How a checkpoint is to be read."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch

from erase.prompts.errors import ErasureError, unknown

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PREDICTIONS = ("epsilon", "v_prediction")
MEANT_FOR = {
    "variant": ("folder", "hub id"),
    "revision": ("hub id",),
    "config": ("single file",),
    "ema": ("single file",),
}
"""option -> the kinds of checkpoint that it says something about; the others, about all"""


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
    """of a single file that holds both: the averaged weights (true) or the last ones (false, as
    A1111 and ComfyUI take)"""
    config: str | None = None
    """for a single file: a diffusers folder whose configs and tokenizers fit it, where the shipped
    ones do not; for a file of a flow transformer (SD 3, FLUX, Z-Image, Qwen-Image), the folder of
    what the file does not hold"""
    vae: str | None = None
    """a VAE folder or file, in the place of the checkpoint's own or where it has none"""
    ignore: str | None = None
    """a regular expression: surplus tensors whose names begin with it are not read"""
    offline: bool = False
    """of a hub id: only what is in the local cache"""
    offload: bool | Literal["blocks"] = False
    """true: parts of the checkpoint wait in main memory, and come to the GPU one at a time, when
    they are called; `train.offload` asks for it too. blocks: of denoiser and text encoders one
    block at a time comes, so that a GPU has room for models many times its size; slower"""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, flag = getattr(self, field.name), isinstance(field.default, bool)
            by_block = (field.name, value) == ("offload", "blocks")
            if not by_block and not (
                isinstance(value, bool)
                if flag
                else isinstance(value, str) or (value is None and field.name != "dtype")
            ):
                wanted = "true or false" if flag else "text"
                also = ", or blocks" if field.name == "offload" else ""
                raise ErasureError(f"load.{field.name} is {value!r}; it must be {wanted}{also}")
        try:
            re.compile(self.ignore or "")
        except re.error as error:
            raise ErasureError(
                f"load.ignore {self.ignore!r} is no regular expression ({error})"
            ) from error
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.prediction is not None and self.prediction not in PREDICTIONS:
            raise unknown("prediction", self.prediction, PREDICTIONS)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def facts(self) -> dict[str, Any]:
        """What decides which values are read."""
        return {name: value for name, value in asdict(self).items() if name != "offload"}

    def ignores(self, key: str) -> bool:
        """Whether a surplus tensor of this name is not to be read."""
        return self.ignore is not None and re.match(self.ignore, key) is not None

    def check_meant_for(self, kind: str, name: str) -> None:
        """Refuse options that say nothing about this kind of checkpoint.

        Raises:
            ErasureError: names the option.
        """
        for option, kinds in MEANT_FOR.items():
            if kind not in kinds and getattr(self, option):
                raise ErasureError(
                    f"load.{option} is for a {' or a '.join(kinds)}; {name} is a {kind}, so leave "
                    "it out"
                )

    def meant_for(self, kind: str) -> LoadConfig:
        """Only what says something about this kind of checkpoint; the rest as it is by default.

        A diffusers checkpoint states its prediction itself, so a single file's is dropped for it.
        """
        dropped = {option for option, kinds in MEANT_FOR.items() if kind not in kinds}
        dropped |= set() if kind == "single file" else {"prediction"}
        defaults: dict[str, Any] = {
            field.name: field.default for field in fields(self) if field.name in dropped
        }
        return replace(self, **defaults)

    def updated(self, given: LoadConfig) -> LoadConfig:
        """These options, with those of `given` that are not the defaults in their place."""
        changed = {field.name: getattr(given, field.name) for field in fields(given)}
        return replace(
            self, **{f.name: changed[f.name] for f in fields(given) if changed[f.name] != f.default}
        )
