"""Reading a checkpoint: its family, and every weight present, finite and of the right shape."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from erase.models.config import LoadConfig
from erase.models.part_files import variants
from erase.models.pipelines import Pipeline
from erase.models.single_file.tensor_file import SINGLE_FILES, TensorFile, open_tensors
from erase.prompts.canvas import EMBEDDED
from erase.prompts.errors import ErasureError, near_name, reason, unknown


def load_pipeline(name: str | Path, options: LoadConfig) -> Pipeline:
    """The stock pipeline of a folder, a single file or a hub id, its weights checked.

    Raises:
        ErasureError: nothing there, another family, or weights that are missing, surplus, misshapen
            or not finite.
    """
    kind = check_model(name)
    options.check_meant_for(kind, str(name))
    if kind == "single file":
        from erase.models.single_file import load_single_file

        return load_single_file(
            name,
            options.torch_dtype,
            config=options.config,
            prediction=options.prediction,
            ema=options.ema,
            vae=options.vae,
            ignore=options.ignore,
        )
    from erase.models.folder import load_folder

    folder = Path(name) if kind == "folder" else _download(str(name), options)
    return load_folder(folder, str(name), options)


def check_model(name: str | Path) -> str:
    """The kind of checkpoint that a name stands for, as `kind_of`, before anything is read of it.

    Raises:
        ErasureError: as `kind_of`; a run's folder or its delta; or no path, and nearly the name of
            a shipped checkpoint.
    """
    kind, path = kind_of(name), Path(name)
    if path.suffix.lower() == ".safetensors" and kind == "single file":
        with open_tensors(path):  # its header alone
            pass
    if (path / "delta.safetensors").is_file() and not (path / "model_index.json").exists():
        raise ErasureError(
            f"{name} is the folder of a run, and no checkpoint; give it as --delta (to "
            "erase-concept as --after), and as --model the base that it erased from"
        )
    near = near_name(str(name), EMBEDDED) if kind == "hub id" else None
    if near and name not in EMBEDDED and "/" not in str(name):
        raise unknown("model", str(name), EMBEDDED)
    return kind


def kind_of(name: str | Path) -> str:
    """The kind of checkpoint that a name stands for: `single file`, `folder`, or else `hub id`.

    Raises:
        ErasureError: a single file that is not there, or a path that cannot be looked at.
    """
    path = Path(name)
    try:
        if path.is_file():
            return "single file"
        if path.exists():
            return "folder"
    except (
        OSError,
        ValueError,
    ) as error:  # no permission on the way there, a name that is too long, a NUL in it
        raise ErasureError(
            f"cannot look at {str(name)[:200]!r}: {reason(error)}; give another path"
        ) from error
    if path.suffix.lower() in SINGLE_FILES:
        raise ErasureError(f"there is no file {path}; check the path")
    return "hub id"


def is_here(name: str, options: LoadConfig) -> bool:
    """Whether a checkpoint is on this disk, at its path or in the hub's cache, so that loading it
    asks nothing of the network."""
    if kind_of(name) != "hub id":
        return True
    try:
        _download(name, replace(options, offline=True))
    except ErasureError:
        return False
    return True


def without_absent(name: str | Path, options: LoadConfig) -> LoadConfig:
    """The options less those for what is not on this disk: a variant of a folder, averaged or
    surplus weights of a single file, a VAE elsewhere. A hub id is not looked at."""
    path = Path(name)
    if options.vae and not os.path.exists(options.vae):
        options = replace(options, vae=None)
    if options.variant and path.is_dir() and options.variant not in _variants_in(path):
        options = replace(options, variant=None)
    if (options.ema or options.ignore) and path.is_file():
        with open_tensors(path) as file:
            options = _without_absent_tensors(file, options)
    return options


def _variants_in(folder: Path) -> set[str | None]:
    parts = [part for part in folder.iterdir() if part.is_dir()]
    return {variant for part in parts for variant in variants(part)}


def _without_absent_tensors(file: TensorFile, options: LoadConfig) -> LoadConfig:
    from erase.models.single_file.recognise import is_averaged

    ignored = any(options.ignores(key) for key in file.shapes)
    return replace(
        options,
        ema=options.ema and is_averaged(file),
        ignore=options.ignore if ignored else None,
    )


UNREACHED = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "TransportError"}
"""names of the errors of the hub client and of its HTTP libraries, old and new, of no connection"""


def unreached(error: BaseException | None) -> bool:
    """Whether the hub gave no answer: an error of the connection is behind this one, and none that
    has a response."""
    kinds: set[str] = set()
    while error is not None:
        if getattr(error, "response", None) is not None:
            return False
        kinds |= {kind.__name__ for kind in type(error).__mro__}
        error = error.__cause__ or error.__context__
    return not kinds.isdisjoint(UNREACHED)


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
        raise ErasureError(
            f"there is no file or folder {name!r}, and it is no hub id (owner/name)"
        ) from error
    except (
        Exception
    ) as error:  # the hub client, its HTTP library and diffusers each raise their own kinds
        if not options.offline and unreached(error):
            raise ErasureError(
                f"{name!r} is no file or folder here, and the hub cannot be reached; check the "
                "name, or give a local path"
            ) from error
        raise ErasureError(
            f"{name!r} is no file or folder here, and cannot be fetched from the hub as a "
            f"diffusers checkpoint with safetensors weights ({reason(error)}); check the name, the "
            "network and your access to it, or give a local path"
        ) from error
