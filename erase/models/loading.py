"""Reading a checkpoint: which family it is of, every weight present, finite and of the right shape."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from erase.finite import all_finite
from erase.models.config import LoadConfig
from erase.models.pipelines import Pipeline, modules
from erase.models.tensor_file import SINGLE_FILES
from prompts.errors import ErasureError, reason
from prompts.reading import as_path

FAMILIES = {
    "StableDiffusionPipeline": ("erase.models.sd", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("erase.models.sdxl", "StableDiffusionXL"),
    "StableDiffusion3Pipeline": ("erase.models.sd3", "StableDiffusion3"),
}
"""pipeline class in model_index.json -> where its `DiffusionModel` is"""
INDEX = "model_index.json"
LEFT_OUT = {
    "safety_checker": "it hides images, and would hide what is left of a concept",
    "image_encoder": "only IP-Adapters use it",
}
log = logging.getLogger("erase")


def load_pipeline(name: str | Path, options: LoadConfig) -> Pipeline:
    """The stock pipeline of a folder, a single file or a hub id, its weights checked.

    Raises:
        ErasureError: nothing there, another family, or weights that are missing, surplus, misshapen or not finite.
    """
    path = as_path(name)
    if path.is_file() or path.suffix in SINGLE_FILES:
        from erase.models.single_file import load_single_file

        if not path.is_file():
            raise ErasureError(f"there is no file {path}")
        return load_single_file(path, options.torch_dtype, config=options.config, prediction=options.prediction, ema=options.ema)
    for field in ("config", "ema"):
        if getattr(options, field):
            raise ErasureError(f"load.{field} is for single files; {name} is none")
    if (path / "delta.safetensors").is_file() and not (path / INDEX).exists():
        raise ErasureError(
            f"{name} is the folder of a run, and no checkpoint; give it as --delta, and as --model the base that it erased from"
        )
    folder = path if path.exists() else _download(str(name), options)
    pipeline = _from_folder(folder, str(name), options)
    check_finite(modules(pipeline), str(name))
    _own(modules(pipeline))
    return pipeline


def family_of(pipeline: Pipeline, name: str) -> Any:
    """The `DiffusionModel` class for a pipeline.

    Raises:
        ErasureError: a pipeline class that none supports.
    """
    kind = type(pipeline).__name__
    if kind not in FAMILIES:
        raise ErasureError(f"{name} is a {kind}, which is not supported; supported: {', '.join(FAMILIES)}")
    module, cls = FAMILIES[kind]
    return getattr(import_module(module), cls)


def _download(name: str, options: LoadConfig) -> Path:
    """The folder of a hub id, fetched or cached: weights as safetensors only."""
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            DiffusionPipeline.download(
                name,
                revision=options.revision,
                variant=options.variant,
                use_safetensors=True,
                local_files_only=options.offline,
            )
        )
    except HFValidationError as error:
        raise ErasureError(f"there is no file or folder {name!r}, and it is no hub id (owner/name)") from error
    except Exception as error:  # the hub client, its HTTP library and diffusers each raise their own kinds
        raise ErasureError(
            f"{name!r} is no file or folder here, and cannot be fetched from the hub as a diffusers checkpoint with safetensors weights "
            f"({reason(error)}); check the name, the network and your access to it, or give a local path"
        ) from error


def _from_folder(folder: Path, name: str, options: LoadConfig) -> Pipeline:
    index = _index(folder)
    kind = index["_class_name"]
    if kind not in FAMILIES:
        raise ErasureError(f"{folder / INDEX} says {kind}, which is not supported; supported: {', '.join(FAMILIES)}")
    import diffusers

    parts = {part: entry for part, entry in index.items() if isinstance(entry, list) and entry[0]}
    for part in LEFT_OUT.keys() & parts.keys():
        log.info("%s: its %s is left out (%s)", name, part, LEFT_OUT[part])
    # what the folder says it has not (SD 3 without its T5), diffusers wants to be told again
    given: dict[str, Any] = dict.fromkeys(part for part, entry in index.items() if isinstance(entry, list) and entry[0] is None)
    given |= dict.fromkeys(LEFT_OUT.keys() & index.keys())
    for part, (library, cls) in parts.items():
        if part not in LEFT_OUT and (kind_of := _module_class(library, cls)):
            given[part] = _load_part(kind_of, folder, part, options)
    extra = {"requires_safety_checker": False} if "safety_checker" in index else {}
    extra |= {"add_watermarker": False} if kind == "StableDiffusionXLPipeline" else {}
    try:
        pipeline = getattr(diffusers, kind).from_pretrained(folder, **given, **extra)
    except Exception as error:
        raise ErasureError(f"cannot load the {kind} in {folder}: {reason(error)}") from error
    if options.prediction and (own := pipeline.scheduler.config.get("prediction_type")) != options.prediction:
        raise ErasureError(
            f"{name} says of itself that its prediction is {own!r}, not {options.prediction!r}; leave load.prediction out"
        )
    return pipeline


def _index(folder: Path) -> Mapping[str, Any]:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ErasureError(
            f"{folder} is not a diffusers folder: it has no {INDEX}; give a folder that has one, or a single .safetensors file"
        ) from None
    except (OSError, ValueError) as error:
        raise ErasureError(f"cannot read {folder / INDEX}: {error}") from error
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ErasureError(f"{folder / INDEX} names no pipeline class (_class_name)")
    return index


def _module_class(library: str, cls: str) -> Any:
    """The class of a part, if it holds weights."""
    if library not in ("diffusers", "transformers"):
        return None
    found = getattr(import_module(library), cls, None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def _load_part(kind: Any, folder: Path, part: str, options: LoadConfig) -> nn.Module:
    """One part of a pipeline, with every one of its weights from the file and none left over."""
    where = folder / part
    try:
        module, found = kind.from_pretrained(
            where,
            dtype=options.torch_dtype,
            use_safetensors=True,
            output_loading_info=True,
            **({"variant": options.variant} if options.variant and any(where.glob(f"*.{options.variant}*")) else {}),
        )
    except Exception as error:
        raise ErasureError(f"cannot load {where}: {reason(error)}") from error
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if keys := [key for key in found.get(problem, ()) if "position_ids" not in str(key)]:
            what = {"missing_keys": "lacks", "mismatched_keys": "holds with another shape", "unexpected_keys": "holds in surplus"}
            raise ErasureError(f"{where} {what[problem]} {keys[0]} ({len(keys)} such keys); it does not fit its config.json")
    return module  # type: ignore[no-any-return]


def check_finite(parts: Mapping[str, nn.Module], name: str) -> None:
    """Refuse NaN and infinite weights.

    Raises:
        ErasureError: names the first one.
    """
    for part, module in parts.items():
        for key, tensor in module.named_parameters():
            if not all_finite(tensor):
                bad = int((~torch.isfinite(tensor)).sum())
                raise ErasureError(f"{name}: {part}.{key} holds {bad:,} values that are not finite; the checkpoint is damaged")


def _own(parts: Mapping[str, nn.Module]) -> None:
    """Copy weights out of the files they are mapped from: those may change under us, and their addresses, which follow from the length
    of a file's header, change the last bits of sums. So one checkpoint gives one delta, whatever format it is read from."""
    for module in parts.values():
        for tensor in module.parameters():
            tensor.data = tensor.data.clone()
