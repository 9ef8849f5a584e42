"""The owner of a folder and of the files in it: a run goes on only with files that it began itself,
or names the differences."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from erase.files import atomic_write, errors_named
from erase.parallel.processes import exists_on_all, processes
from erase.prompts.errors import ErasureError

SAME_BITS = {
    "train.checkpoint_every", "train.selective_recompute", "train.offload", "train.log_with",
    "mask.on_disk",
}  # fmt: skip
"""settings that leave the result as it is, to the bit"""
TO_ROUNDING = {
    "made with", "threads", "processes",
    "train.accumulation", "train.attention", "train.channels_last", "train.compile",
    "train.gradient_checkpointing",
}  # fmt: skip
"""what changes the result by rounding alone: a run goes on under another, and says so"""
PATHS = {
    "model",
    "base",
    "mask.file",
    "mask.saliency",
    "latents.forget_images",
    "latents.retain_images",
    "load.config",
    "load.vae",
}
"""settings that name files: one file under two names is the same"""
NAMES = {
    "base_fingerprint": "fingerprint of the base", "base_id": "base", "created_with": "made with",
    "forget": "digest of the forget latents", "retain": "digest of the retain latents",
    "loss": "loss of the saliency", "after": "delta that it goes on from",
}  # fmt: skip
"""key of a description -> how errors call it"""
RUN = "run.json"
"""in a run's folder: the run that it is of"""
SHOWN = 3
"""differences that an error names; of more it says how many"""
Difference = tuple[str, Any, Any]
"""(what differs, what it was, what it is now)"""
log = logging.getLogger("erase")


@contextmanager
def claimed(
    folder: Path | None,
    description: Mapping[str, str],
    defaults: Mapping[str, Any],
    finished: bool = False,
) -> Iterator[None]:
    """Within the block a folder, if there is one, is this run's, as `claim` makes it; where the
    block fails before anything is made there, it is nobody's again."""
    if folder is None:
        yield
        return
    new = not exists_on_all(folder / RUN)
    claim(folder, description, defaults, finished)
    try:
        yield
    except BaseException:
        if new and processes().is_main_process:
            _give_up(folder)
        raise


def _give_up(folder: Path) -> None:
    if [path.name for path in folder.iterdir()] == [RUN]:
        (folder / RUN).unlink()
        with suppress(OSError):
            folder.rmdir()


def claim(
    folder: Path,
    description: Mapping[str, str],
    defaults: Mapping[str, Any],
    finished: bool = False,
) -> None:
    """Mark a folder as this run's with run.json, or go on in one that is its own.

    Args:
        folder: of the run.
        description: everything that fixes its result (`erase.run.describe`).
        defaults: what stands for a setting that an older or newer run.json lacks.
        finished: the run has its result already, so nothing of it goes on.

    Raises:
        ErasureError: the folder holds another run, whose differences are named, or its run.json is
            damaged.
    """
    path = folder / RUN
    machine = {"threads": str(torch.get_num_threads()), "processes": str(processes().num_processes)}
    written = {**description, **machine}
    if exists_on_all(path):
        changes = _changes(path, _read(path), written, defaults)
        _refuse(f"{folder} holds another run", changes, "give another --out, or delete it")
        if finished or not changes:
            return
        log.warning(
            "%s goes on, but %s: its result is the same to rounding, not to the bit",
            folder,
            _text_of(changes),
        )
    if processes().is_main_process:
        with atomic_write(path) as aside:
            aside.write_text(json.dumps(written, indent=1), encoding="utf-8")


def check_settings(
    folder: Path, description: Mapping[str, str], defaults: Mapping[str, Any]
) -> None:
    """Refuse the folder of a run with other settings, before the base is loaded; `description` has
    no base yet."""
    path = folder / RUN
    if exists_on_all(path):
        old = {key: value for key, value in _read(path).items() if key in description}
        _refuse(
            f"{folder} holds another run",
            _changes(path, old, description, defaults),
            "give another --out, or delete it",
        )


def check_artifact(
    path: Path,
    own: Mapping[str, str],
    description: Mapping[str, str],
    remedy: str,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a file that another run made.

    Args:
        path: of the file.
        own: its metadata.
        description: of the run that takes it; a file that lacks some of it is refused.
        remedy: what to do then.
        defaults: what stands for a setting that the file lacks.

    Raises:
        ErasureError: it is of another run; the differences are named.
    """
    if absent := sorted(description.keys() - own.keys()):
        raise ErasureError(
            f"{path} does not say which run it is of (it lacks {', '.join(absent)}); {remedy}"
        )
    known = {key: own[key] for key in description}
    _refuse(f"{path} is of another run", _changes(path, known, description, defaults or {}), remedy)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by the names of their options: `train.lr`."""
    rows: dict[str, Any] = {}
    for key, value in settings.items():
        rows |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
        )
    return rows


def _read(path: Path) -> dict[str, str]:
    remedy = "delete the folder, or give another --out"
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ErasureError(f"cannot read {path}: {error.strerror}; {remedy}") from error
    with errors_named(path, remedy):
        return dict(json.loads(text))


def _changes(
    path: Path, old: Mapping[str, str], new: Mapping[str, str], defaults: Mapping[str, Any]
) -> list[Difference]:
    """The differences of two descriptions, without those that leave the result as it is."""
    with errors_named(path, "delete it, or give another --out"):
        was, was_said = _facts(old), _concept_facts(old)
    now, now_said = _facts(new), _concept_facts(new)
    if was.get("concepts") == now.get("concepts"):  # of other concepts, all would differ
        was, now = was | was_said, now | now_said
    rows = []
    for name in dict.fromkeys([*now, *was]):
        before, after = was.get(name, defaults.get(name)), now.get(name, defaults.get(name))
        same = before == after or (name in PATHS and _same_path(before, after))
        if not same and name not in SAME_BITS:
            rows.append((name, before, after))
    return rows


def _facts(description: Mapping[str, str]) -> dict[str, Any]:
    """A description as single facts, by the names that a user knows."""
    facts: dict[str, Any] = {}
    for key, value in description.items():
        if key == "config":
            for part in json.loads(value).values():
                facts |= flat(part)
        elif key == "concepts":
            facts["concepts"] = [concept["target"] for concept in json.loads(value)]
        else:
            facts[NAMES.get(key, key)] = value
    return facts


def _concept_facts(description: Mapping[str, str]) -> dict[str, Any]:
    concepts = json.loads(description.get("concepts", "[]"))
    return {
        f"{name} of {each['target']}": value for each in concepts for name, value in each.items()
    }


def _same_path(one: Any, other: Any) -> bool:
    try:
        return (
            isinstance(one, str)
            and isinstance(other, str)
            and Path(one).resolve() == Path(other).resolve()
        )
    except (OSError, ValueError, RuntimeError):  # too long, with a NUL, a circle of links
        return False


def _refuse(what: str, changes: list[Difference], remedy: str) -> None:
    grave = [change for change in changes if change[0] not in TO_ROUNDING]
    if grave:
        raise ErasureError(f"{what}: {_text_of(grave)}; {remedy}")


def _text_of(changes: list[Difference]) -> str:
    differences = [
        f"{name} was {_short(was)} and is now {_short(now)}" for name, was, now in changes[:SHOWN]
    ]
    more = len(changes) - SHOWN
    return ", ".join(differences) + (f", and {more} more differ" if more > 0 else "")


def _short(value: Any) -> str:
    text = (
        "not set"
        if value is None
        else str(value)
        if isinstance(value, int | float)
        else repr(value)
    )
    # of a path, the end tells most
    return text if len(text) <= 80 else f"{text[:30]}...{text[-47:]}"
