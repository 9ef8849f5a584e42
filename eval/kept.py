"""Findings of an evaluator, kept on disk as they are made, so that a stopped evaluation goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from erase.eval.attempts import Attempts
from erase.eval.case import Case
from erase.files import atomic_write, errors_named
from erase.models import DiffusionModel
from erase.models.pipelines import frozen_facts
from erase.parallel.processes import exists_on_all, processes


class Kept:
    """Findings by name, in a folder that belongs to what they were made from."""

    def __init__(self, folder: Path | None, what: str, made_from: Mapping[str, Any]) -> None:
        """
        Args:
            folder: the case's; None: nothing is kept.
            what: begins the folder's name.
            made_from: everything that the findings depend on, JSON-ready; of something else they
                are other findings, in another folder.
        """
        digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        self.folder = folder / f"{what}-{digest[:16]}" if folder else None
        self._found: dict[str, Any] = {}
        if self.folder and exists_on_all(path := self.folder / "found.json"):
            with errors_named(path, "delete it to measure again"):
                self._found = dict(json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def of(
        cls,
        case: Case,
        what: str,
        attempts: Attempts,
        base: DiffusionModel,
        settings: Mapping[str, Any],
    ) -> Kept:
        """Findings on a case by these attempts and settings."""
        made_from = {
            "base": base.fingerprint,
            "frozen": frozen_facts(base.pipeline()),
            "delta": case.delta.sha256 if case.delta else "",
            "concepts": [concept.to_dict() for concept in case.concepts],
            "rows": [[row.prompt, row.seed, row.guidance] for row in attempts.rows],
            "generate": asdict(attempts.settings),
            "judge": attempts.detector.name,
            "settings": dict(settings),
        }
        return cls(case.folder, what, made_from)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __getitem__(self, name: str) -> Any:
        return self._found[name]

    def find(self, name: str, make: Callable[[], Any]) -> Any:
        """The finding of that name, JSON-ready: from disk, or made now and kept; every process asks
        for the same ones in the same order."""
        if name not in self._found:
            self._found[name] = make()
            if self.folder and processes().is_main_process:
                with atomic_write(self.folder / "found.json") as aside:
                    aside.write_text(json.dumps(self._found), encoding="utf-8")
        return self._found[name]
