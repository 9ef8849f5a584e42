"""The files of one part of a diffusers folder: their kind is known before a library reads them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from erase.models.single_file.tensor_file import check_kind
from erase.prompts.errors import ErasureError

WEIGHTS = re.compile(
    r"(model|diffusion_pytorch_model|pytorch_model)(-\d+-of-\d+)?(\.(?P<variant>[^.]+?))?"
    r"(-\d+-of-\d+)?\.(?P<kind>safetensors|bin)"
)
"""model.safetensors, diffusion_pytorch_model.fp16-00001-of-00002.safetensors, pytorch_model.bin,
..."""
CODE = ("auto_map", "custom_pipelines", "trust_remote_code")
"""keys of a configuration that name Python of the checkpoint's own"""
KERNELS = re.compile(r"_*(attn|experts)_implementation(_internal)?")
"""keys whose value may name compiled code: a repository, or one that transformers fetches for it
(flash_attention_2)"""
OF_TORCH = (None, "eager", "sdpa", "grouped_mm", "batched_mm")
"""values of `KERNELS` that need none"""
PLAIN = ("F64", "F32", "F16", "BF16", "I64", "I32", "BOOL")
"""safetensors' names of the numbers that an unquantised part holds"""


def read_config(path: Path) -> dict[str, Any]:
    """A configuration of a checkpoint: one JSON object that asks for no code.

    Raises:
        ErasureError: no such file, unreadable, no JSON object, or it names code or a quantisation.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ErasureError(
            f"{path.parent} has no {path.name}; fetch the checkpoint again, whole"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ErasureError(
            f"cannot read {path}: {_said(error)}; fetch it again, or mend it"
        ) from error
    if not isinstance(config, dict):
        raise ErasureError(
            f"{path} holds a {type(config).__name__}, not named settings; fetch it again, or mend "
            "it"
        )

    for settings in _mappings(config):
        _check_plain_settings(path, settings)
    return config


def _mappings(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration and every mapping in it, such as `text_config`."""
    waiting: list[Any] = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _check_plain_settings(path: Path, settings: Mapping[str, Any]) -> None:
    for key in CODE:
        if settings.get(key):
            raise ErasureError(
                f"{path} asks for code of its own ({key}), which is never run; give a checkpoint "
                "without it"
            )
    for key, value in settings.items():
        asked = value.values() if isinstance(value, dict) else [value]
        if KERNELS.fullmatch(key) and not all(one in OF_TORCH for one in asked):
            raise ErasureError(
                f"{path} asks for compiled code ({key} {value!r}), which is never fetched; take "
                "the key out, or set it to sdpa"
            )
    if settings.get("quantization_config"):
        raise ErasureError(
            f"{path} says that its weights are quantised; give the checkpoint in float16, bfloat16 "
            "or float32"
        )


def _said(error: BaseException) -> str:
    return (
        f"permission denied ({error.strerror})"
        if isinstance(error, PermissionError)
        else str(error) or type(error).__name__
    )


def check_part(folder: Path, part: str) -> Path:
    """The folder of a part, all of whose files can be read and whose configurations ask for no
    code.

    Raises:
        ErasureError: it is missing, a file in it is unreadable, or see `read_config`.
    """
    where = folder / part
    if not where.is_dir():
        raise ErasureError(
            f"{folder} has no folder {part}/, which its model_index.json lists; fetch the "
            f"checkpoint again, whole, or copy {part}/ from another checkpoint of the same family"
        )
    for file in sorted(where.iterdir()):
        if file.is_symlink() and not file.exists():
            raise ErasureError(
                f"{file} is a link to a file that is not there; fetch the checkpoint again"
            )
        if not os.access(file, os.R_OK):
            raise ErasureError(
                f"cannot read {file}: permission denied; make it readable (chmod +r)"
            )
        if file.suffix == ".json" and file.name.endswith("config.json"):
            read_config(file)
    return where


def variants(where: Path) -> set[str | None]:
    """The variants of a part's safetensors weights; None stands for files without a variant in
    their name."""
    return {match["variant"] for match in _weights(where) if match["kind"] == "safetensors"}


def _weights(where: Path) -> list[re.Match[str]]:
    matches = (WEIGHTS.fullmatch(file.name) for file in sorted(where.iterdir()))
    return [match for match in matches if match]


def check_variant(folders: Iterable[Path], asked: str | None) -> None:
    """Refuse a variant that no part has.

    Raises:
        ErasureError: lists those that are there.
    """
    if asked is None:
        return
    there = {variant for where in folders for variant in variants(where)}
    if asked not in there:
        named = sorted(variant for variant in there if variant)
        instead = (
            f"there are {', '.join(named)}" if named else "there is none; leave load.variant out"
        )
        raise ErasureError(
            f"no part of the checkpoint has the variant {asked!r} (--load.variant); {instead}"
        )


def weight_variant(where: Path, asked: str | None) -> str | None:
    """The variant to read of a part: the one asked for, or else the files without one.

    Raises:
        ErasureError: only other variants, only pickles, or no weights at all; placeholders of git,
            quantised weights.
    """
    there = variants(where)
    if asked not in there and None not in there:
        raise ErasureError(
            f"{where} {_lacking(where, sorted(variant for variant in there if variant))}"
        )
    variant = asked if asked in there else None
    for match in _weights(where):
        if match["kind"] == "safetensors" and match["variant"] == variant:
            _check_plain(where / match.string)
    return variant


def _lacking(where: Path, named: list[str]) -> str:
    """The files of a part without readable weights, and the way out."""
    if named:
        return f"has weights only as {', '.join(named)}; add --load.variant {named[0]}"
    pickles = [match.string for match in _weights(where) if match["kind"] == "bin"]
    if not pickles:
        return "holds no weights (.safetensors); fetch the checkpoint again, whole"
    variant = next(
        (f", variant={match['variant']!r}" for match in _weights(where) if match["variant"]), ""
    )
    return (
        f"has its weights only as a pickle ({pickles[0]}), which is not opened; convert the "
        "checkpoint to safetensors, in a container "
        'without network: python -c "from diffusers import DiffusionPipeline as P; '
        f"P.from_pretrained('{where.parent}'{variant})"
        ".save_pretrained('converted')\""
    )


def _check_plain(file: Path) -> None:
    """Refuse numbers that only mean something together with scales that no stock pipeline reads."""
    check_kind(file)
    try:
        with safe_open(file, framework="pt", backend="pread") as opened:
            names = opened.keys()
            kinds = {key: opened.get_slice(key).get_dtype() for key in names}
    except (OSError, SafetensorError) as error:
        raise ErasureError(
            f"cannot load {file.parent}: {file.name}: {error}; if it was cut short, fetch it again"
        ) from error
    for key, kind in kinds.items():
        if kind not in PLAIN:
            raise ErasureError(
                f"{file} holds quantised weights ({key} is {kind}); give it in float16, bfloat16 "
                "or float32"
            )
