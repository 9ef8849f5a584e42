"""Families that are published as one file of their transformer alone, and the rest of whose
pipeline comes from a diffusers folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn

from erase.models.config import DTYPES, LoadConfig
from erase.models.part_files import read_config
from erase.models.pipelines import Pipeline
from erase.models.single_file import bfl, z_image
from erase.models.single_file.filling import check_weights, fill, refuse_surplus
from erase.models.single_file.ldm import UNET, Entry, Network
from erase.models.single_file.recognise import UNREADABLE, refuse
from erase.models.single_file.spec import FLUX, Z_IMAGE
from erase.models.single_file.tensor_file import TensorFile
from erase.prompts.errors import ErasureError


@dataclass(frozen=True)
class Layout:
    """How a transformer lies in a file of its own."""

    name: str
    """of the family, for people"""
    pipeline: str
    network: str
    """the transformer's class"""
    origin: str
    """the implementation whose names the keys are"""
    holds: Callable[[TensorFile], bool]
    table: Callable[[Network], list[Entry]]
    spare: tuple[str, ...] = ()
    """keys that no program uses"""


LAYOUTS = (
    Layout("FLUX.1", "FluxPipeline", "FluxTransformer2DModel", FLUX, bfl.is_flux, bfl.table),
    Layout(
        "Z-Image",
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        Z_IMAGE,
        z_image.is_z_image,
        z_image.table,
        z_image.SPARE,
    ),
)


def layout_in(file: TensorFile) -> Layout | None:
    """The layout of a file that holds a transformer alone."""
    return next((layout for layout in LAYOUTS if layout.holds(file)), None)


def layout_of(pipeline: Pipeline) -> Layout | None:
    """The layout in which a pipeline's transformer is published alone."""
    kind = type(pipeline).__name__
    return next((layout for layout in LAYOUTS if layout.pipeline == kind), None)


def load_alone(
    file: TensorFile,
    layout: Layout,
    dtype: torch.dtype,
    config: str | Path | None,
    vae: str | Path | None,
) -> Pipeline:
    """The stock pipeline of a folder, with this file's transformer in the place of its own.

    Args:
        file: an open file.
        layout: its layout.
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
            f"{file.path} is {layout.name}'s transformer alone; name a diffusers folder of "
            f"{layout.name} that has its text encoders and VAE (load.config)"
        )
    folder = Path(config)
    if (kind := read_index(folder)["_class_name"]) != layout.pipeline:
        raise ErasureError(
            f"{file.path} is {layout.name}'s transformer, and {folder} (load.config) is a {kind}; "
            f"name a folder of {layout.name}"
        )
    name = next(name for name, one in DTYPES.items() if one == dtype)
    options = LoadConfig(dtype=name, vae=str(vae) if vae else None)
    transformer = _read(file, layout, folder / "transformer" / "config.json", dtype)
    return load_folder(folder, str(folder), options, {"transformer": transformer})


def _bare(file: TensorFile, spare: tuple[str, ...]) -> TensorFile:
    """The file without the prefix that ComfyUI puts before its keys, and without spare ones."""
    keys = {key.removeprefix(UNET): key for key in file.shapes}
    shapes = {name: file.shapes[key] for name, key in keys.items() if name not in spare}
    return replace(file, shapes=shapes, read=lambda name: file.read(keys[name]))


def _read(file: TensorFile, layout: Layout, config: Path, dtype: torch.dtype) -> nn.Module:
    refuse(file, UNREADABLE)
    file, kind = _bare(file, layout.spare), getattr(diffusers, layout.network)
    try:
        with init_empty_weights():
            networks: dict[str, Any] = {"transformer": kind.from_config(read_config(config))}
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise ErasureError(
            f"{config} describes no transformer of {layout.name} that can be built: {error}"
        ) from error
    table = layout.table(networks["transformer"])
    check_weights(file, table, networks)
    surplus = sorted(file.shapes.keys() - {entry.key for entry in table})
    refuse_surplus(file, surplus, str(config), "give the folder of the same model")
    fill(file, table, networks, dtype)
    module: nn.Module = networks["transformer"]
    return module
