"""Files of a transformer, alone or with other parts of its pipeline, the rest of which comes from a
diffusers folder."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from torch import nn

from erase.models.config import DTYPES, LoadConfig
from erase.models.part_files import read_config
from erase.models.pipelines import Pipeline
from erase.models.single_file.filling import check_weights, fill, refuse_surplus
from erase.models.single_file.layouts import Beside, Layout
from erase.models.single_file.ldm import VAE, Network, bare
from erase.models.single_file.recognise import CONTROLNET, UNREADABLE, refuse
from erase.models.single_file.tensor_file import TensorFile
from erase.prompts.errors import ErasureError, reason


def load_alone(
    file: TensorFile,
    layout: Layout,
    dtype: torch.dtype,
    config: str | Path | None,
    vae: str | Path | None,
) -> Pipeline:
    """The stock pipeline of a folder, with what this file holds in the place of its own.

    Args:
        file: an open file.
        layout: its layout.
        dtype: of the weights in memory.
        config: the folder; it needs no weights of a part that the file holds.
        vae: a folder or file whose VAE takes the place of the folder's and of the file's.

    Raises:
        ErasureError: no folder, or one of another pipeline; a sibling of the family, quantised
            weights, or weights that do not fit the folder's configuration.
    """
    from erase.models.folder import load_folder, read_index

    file = _bare(file, layout.spare)
    refuse(file, (*UNREADABLE, CONTROLNET, *layout.siblings))
    if config is None:
        raise ErasureError(
            f"{file.path} holds {layout.name}'s transformer, and not its whole pipeline; name a "
            f"diffusers folder of {layout.name} that has the rest (load.config)"
        )
    folder = Path(config)
    index = read_index(folder)
    if (kind := index["_class_name"]) != layout.pipeline:
        raise ErasureError(
            f"{file.path} is of {layout.name}, and {folder} (load.config) is a {kind}; name a "
            f"folder of {layout.name}"
        )
    if vae is not None:
        shapes = {key: shape for key, shape in file.shapes.items() if not key.startswith(VAE)}
        file = replace(file, shapes=shapes)
    parts = [part for part in layout.beside if _holds(file, part.prefix)]
    for part in parts:
        if index.get(part.component) in (None, [None, None]):
            raise ErasureError(
                f"{file.path} holds a {part.component}, which {folder} (load.config) says it has "
                f"not; give a folder that has one, or leave it out (load.ignore {part.prefix!r})"
            )
    given = _read(file, layout, parts, folder, dtype)
    name = next(name for name, one in DTYPES.items() if one == dtype)
    options = LoadConfig(dtype=name, vae=str(vae) if vae else None)
    return load_folder(folder, str(folder), options, given)


def _holds(file: TensorFile, prefix: str) -> bool:
    return any(key.startswith(prefix) for key in file.shapes)


def _bare(file: TensorFile, spare: str) -> TensorFile:
    """The file without the prefix that may stand before its transformer's keys, and without spare
    ones."""
    keys = {bare(key): key for key in file.shapes}
    shapes = {name: file.shapes[key] for name, key in keys.items() if not re.fullmatch(spare, name)}
    return replace(file, shapes=shapes, read=lambda name: file.read(keys[name]))


def _read(
    file: TensorFile, layout: Layout, parts: list[Beside], folder: Path, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """The transformer and these parts, with the file's weights."""
    names = ["transformer", *(part.component for part in parts)]
    modules: dict[str, Any] = {name: _empty(layout, name, folder) for name in names}
    table = layout.entries(modules)
    check_weights(file, table, modules)
    surplus = sorted(file.shapes.keys() - {entry.key for entry in table})
    refuse_surplus(file, surplus, str(folder), "give the folder of the same model")
    stated = {
        f"{part.component}.{name}": tensor
        for part in parts
        for name, tensor in part.stated(modules[part.component]).items()
    }
    fill(file, table, modules, dtype, stated)
    for part in parts:
        if hasattr(modules[part.component], "tie_weights"):
            modules[part.component].tie_weights()
    return modules


def _empty(layout: Layout, name: str, folder: Path) -> Network:
    """A part of the folder's configuration, its parameters on the meta device."""
    from erase.models import folder as folders

    path = folder / name / "config.json"
    config, kind = read_config(path), folders.PARTS[layout.pipeline].get(name, folders.VAE)
    try:
        with init_empty_weights():
            if hasattr(transformers, kind):
                network = getattr(transformers, kind)
                return network(network.config_class(**config))
            return getattr(diffusers, kind).from_config(config)
    except Exception as error:  # a value in the configuration can upset it anywhere
        raise ErasureError(
            f"{path} describes no {name} of {layout.name} that can be built: {reason(error)}"
        ) from error
