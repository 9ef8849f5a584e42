"""Checks of options before they are used: texts that would not end, files that name
files, paths that cannot be."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

import yaml
from jsonargparse import Namespace, get_loader, set_loader

from erase.prompts.errors import ErasureError
from erase.prompts.reading import as_path, parse_yaml

PATHS = {
    *(
        "out",
        "delta",
        "erased",
        "model",
        "prompts",
        "concepts",
        "base_images",
        "report",
        "conflicts",
        "lora_delta",
    ),
    *("forget_images", "retain_images", "cache", "config", "vae", "judge", "pretrained"),
    *("file", "saliency"),
}
"""options, also of groups, that name files or folders (or else what is shipped or on the hub)"""
_as_jsonargparse_reads = get_loader("yaml")


def guard_yaml() -> None:
    """Have the parser read no YAML, of a group's own file either, whose aliases or brackets would
    not end or whose keys stand twice."""
    set_loader("yaml", _guarded, (yaml.YAMLError,))


def _guarded(text: str) -> Any:
    parse_yaml(text)
    return _as_jsonargparse_reads(text)


def check_settings(path: str, settings: object, groups: Collection[str]) -> None:
    """Refuse a recipe's content that is no mapping, or that names further files to be read as
    options.

    Raises:
        ErasureError: so.
    """
    if not isinstance(settings, dict):
        raise ErasureError(
            f"{path}: expected `option: value` lines; --print_config shows their form"
        )
    if settings.get("config") not in (None, "null", "~", ""):  # --print_config writes null
        raise ErasureError(
            f"{path} includes another file as its config; give both, --config A --config B: the "
            "later one wins"
        )
    for group in groups:
        if not isinstance(settings.get(group, {}), dict):
            raise no_group(group)


def no_group(name: str) -> ErasureError:
    """The error for a group of options that is something else."""
    return ErasureError(
        f"{name!r} must be a group of options, `{name}: {{…: …}}`; --print_config shows which"
    )


def settle_paths(options: Namespace) -> None:
    """Write out the `~` of paths, which no shell does in a file or behind a `=`, and refuse what no
    file can be called.

    Raises:
        ErasureError: a path that is empty, too long, or holds a NUL.
    """
    for key, value in list(options.items()):
        if key == "config" or key.split(".")[-1] not in PATHS:
            continue
        try:
            if isinstance(value, str):
                options[key] = _settled(value)
            elif isinstance(value, list):
                options[key] = [_settled(one) if isinstance(one, str) else one for one in value]
        except ErasureError as error:
            raise ErasureError(f"--{key}: {error}") from error


def _settled(text: str) -> str:
    as_path(text)
    return os.path.expanduser(text)
