"""A VAE from elsewhere than the checkpoint: a diffusers folder, or a single file in the LDM
layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from torch import nn

from erase.models.config import DTYPES, LoadConfig
from erase.models.part_files import read_config
from erase.models.parts import load_part
from erase.models.single_file import ldm
from erase.models.single_file.filling import check_weights, fill
from erase.models.single_file.tensor_file import SINGLE_FILES, TensorFile, open_tensors
from erase.prompts.errors import ErasureError


def load_vae(source: str | Path, config: Mapping[str, Any] | None, dtype: torch.dtype) -> nn.Module:
    """A VAE for a checkpoint that has none, or in the place of its own.

    Args:
        source: a diffusers folder of a VAE, or of a whole pipeline; a `.safetensors`, `.ckpt` or
            `.pt` file of a VAE alone, or of a whole checkpoint.
        config: the architecture of a single file, which does not tell its own.
        dtype: of the weights in memory.

    Raises:
        ErasureError: there is none, it is damaged, or it does not fit its configuration.
    """
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, dtype)
    if not path.is_file():
        raise ErasureError(
            f"there is no file or folder {path} (load.vae); it is read from this disk alone"
        )
    if path.suffix.lower() not in SINGLE_FILES:
        raise ErasureError(
            f"{path} (load.vae) is neither a folder nor one of {', '.join(SINGLE_FILES)}"
        )
    if config is None:
        raise ErasureError(
            f"nothing tells the architecture of {path} (load.vae); give a VAE folder with its "
            "config.json"
        )
    return _from_file(path, config, dtype)


def _from_folder(path: Path, dtype: torch.dtype) -> nn.Module:
    folder = path / "vae" if (path / "model_index.json").is_file() else path
    kind = read_config(folder / "config.json").get("_class_name")
    if kind != "AutoencoderKL":
        raise ErasureError(f"{folder} (load.vae) holds a {kind}; an AutoencoderKL is needed")
    name = next(name for name, one in DTYPES.items() if one == dtype)
    return load_part(AutoencoderKL, folder, LoadConfig(dtype=name))


def _from_file(path: Path, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    with init_empty_weights():
        modules = {"vae": AutoencoderKL.from_config(dict(config))}
    table = ldm.vae_table(modules["vae"])
    with open_tensors(path) as opened:
        file = _prefixed(opened)
        check_weights(file, table, modules)
        fill(file, table, modules, dtype)
    module: nn.Module = modules["vae"]
    return module


def _prefixed(file: TensorFile) -> TensorFile:
    """The file with its keys as they stand in a whole checkpoint."""
    if any(key.startswith(ldm.VAE) for key in file.shapes):
        return file
    if any(".down_blocks." in key for key in file.shapes):
        raise ErasureError(
            f"{file.path} (load.vae) has the names of diffusers; give its folder, with its "
            "config.json"
        )
    if "decoder.conv_in.weight" not in file.shapes:
        raise ErasureError(f"{file.path} (load.vae) holds no VAE: it has no decoder.conv_in.weight")
    shapes = {ldm.VAE + key: shape for key, shape in file.shapes.items()}
    return replace(file, shapes=shapes, read=lambda key: file.read(key.removeprefix(ldm.VAE)))
