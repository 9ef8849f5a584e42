"""A transformer of FLUX.1 alone in one file, with the rest of its pipeline from a diffusers
folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from torch import nn

from erase.models.config import DTYPES, LoadConfig
from erase.models.part_files import read_config
from erase.models.pipelines import Pipeline
from erase.models.single_file import bfl
from erase.models.single_file.filling import check_weights, fill, refuse_surplus
from erase.models.single_file.ldm import UNET
from erase.models.single_file.recognise import UNREADABLE, refuse
from erase.models.single_file.tensor_file import TensorFile
from erase.prompts.errors import ErasureError


def load_flux_file(
    file: TensorFile, dtype: torch.dtype, config: str | Path | None, vae: str | Path | None
) -> Pipeline:
    """The stock pipeline of a folder, with this file's transformer in the place of its own.

    Args:
        file: an open file in the layout of `bfl`.
        dtype: of the weights in memory.
        config: the folder; it needs no weights of a transformer.
        vae: a folder or file whose VAE takes the place of the folder's.

    Raises:
        ErasureError: no folder, or one of another pipeline; quantised weights, or weights that do
            not fit the folder's configuration.
    """
    from erase.models.folder import load_folder, read_index

    if config is None:
        raise ErasureError(
            f"{file.path} is FLUX.1's transformer alone; name a diffusers folder of FLUX.1 that "
            "has its text encoders and VAE (load.config)"
        )
    folder = Path(config)
    if (kind := read_index(folder)["_class_name"]) != "FluxPipeline":
        raise ErasureError(
            f"{file.path} is FLUX.1's transformer, and {folder} (load.config) is a {kind}; name a "
            "folder of FLUX.1"
        )
    name = next(name for name, one in DTYPES.items() if one == dtype)
    options = LoadConfig(dtype=name, vae=str(vae) if vae else None)
    transformer = _read(file, folder / "transformer" / "config.json", dtype)
    return load_folder(folder, str(folder), options, {"transformer": transformer})


def _bare(file: TensorFile) -> TensorFile:
    """The file without the prefix that ComfyUI puts before its keys."""
    keys = {key.removeprefix(UNET): key for key in file.shapes}
    shapes = {name: file.shapes[key] for name, key in keys.items()}
    return replace(file, shapes=shapes, read=lambda name: file.read(keys[name]))


def _read(file: TensorFile, config: Path, dtype: torch.dtype) -> nn.Module:
    refuse(file, UNREADABLE)
    file = _bare(file)
    try:
        with init_empty_weights():
            networks = {"transformer": FluxTransformer2DModel.from_config(read_config(config))}
    except (TypeError, ValueError, KeyError) as error:
        raise ErasureError(
            f"{config} describes no transformer of FLUX.1 that can be built: {error}"
        ) from error
    table = bfl.table(networks["transformer"])
    check_weights(file, table, networks)
    surplus = sorted(file.shapes.keys() - {entry.key for entry in table})
    refuse_surplus(file, surplus, str(config), "give the folder of the same model")
    fill(file, table, networks, dtype)
    module: nn.Module = networks["transformer"]
    return module
