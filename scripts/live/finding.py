"""Erasures for the page: of files, of runs, of folders of runs, and made now."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from erase.delta import ErasedDelta
from erase.delta.stored import FILE
from erase.eval.run import Evidence
from erase.models import DiffusionModel
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.prompts.reading import as_path
from erase.run import EraseConfig, erase_concept
from erase.scripts.live.stage import Erasure

log = logging.getLogger("erase")


def find_deltas(path: str) -> list[ErasedDelta]:
    """The delta of a file or of a run's folder, or those of all runs in a folder, in the order of
    their names.

    Raises:
        ErasureError: there is none.
    """
    folder = as_path(path)
    if not folder.is_dir() or (folder / FILE).is_file():
        return [ErasedDelta.load(path)]
    found = sorted(folder.rglob(FILE))
    if not found:
        raise ErasureError(
            f"{path} holds no {FILE}, nor does a folder in it; give what erase-concept wrote"
        )
    return [ErasedDelta.load(each) for each in found]


def of_base(deltas: Sequence[ErasedDelta], model: DiffusionModel) -> list[ErasedDelta]:
    """Those of a folder that are of this base.

    Raises:
        ErasureError: none is.
    """
    ours: list[ErasedDelta] = []
    others: list[ErasedDelta] = []
    for delta in deltas:
        same = delta.metadata.get("base_fingerprint") == model.fingerprint
        (ours if same else others).append(delta)
    if not ours:
        others[0].check(model)  # says of which base it is
    for delta in others:
        log.info("%s is of another base and is left out", delta.source)
    return ours


def made_now(model: DiffusionModel, concepts: Sequence[ConceptSpec]) -> list[ErasedDelta]:
    """A delta for each concept, by `uce`: in closed form, in seconds."""
    config = EraseConfig(model=model.name, method="uce")
    return [erase_concept(concept, config, model=model) for concept in concepts]


def named(deltas: Sequence[ErasedDelta]) -> list[Erasure]:
    """Each under a name of its own, with its run's mask where there is one."""
    names = [_name(delta) for delta in deltas]
    times = Counter(names)
    erasures = []
    for i, delta in enumerate(deltas):
        name = names[i] if times[names[i]] == 1 else f"{names[i]} [{i + 1}]"
        mask = Evidence.of(Path(delta.source).parent, delta).mask if _is_file(delta) else None
        erasures.append(Erasure(name, delta, mask))
    return erasures


def _name(delta: ErasedDelta) -> str:
    where = Path(delta.source).parent.as_posix() if _is_file(delta) else "made now"
    return f"{delta.title}: {delta.metadata.get('method', '?')}, {where}"


def _is_file(delta: ErasedDelta) -> bool:
    return Path(delta.source).is_file()
