"""What the judges say of single images, as a report holds it under `extras`, in `judged`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from erase.eval.report.report import EvalReport


class Said:
    """The judges' words, of all sets together: their case numbers differ."""

    def __init__(self, report: EvalReport) -> None:
        self._rows: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
        for label, judges in report.extras.get("judged", {}).items():
            row = self._rows.setdefault(label.partition(", ")[0], {})
            for judge, told in judges.items():
                row.setdefault(judge, []).append(told)

    def judges(self, row: str, question: str) -> list[str]:
        """Those that answer a question, `seen` or `wrong`, on a row of the report."""
        found = []
        for judge, parts in self._rows.get(row, {}).items():
            if any(told[question] is not None for told in parts):
                found.append(judge)
        return found

    def silent(self, row: str, question: str) -> list[str]:
        """Judges that have words on a row's images, and no answer to a question."""
        answering = self.judges(row, question)
        return [judge for judge in self._rows.get(row, {}) if judge not in answering]

    def cases(self, row: str, judge: str, question: str) -> set[int]:
        """The cases that a judge calls `seen` or `wrong`; `words`: all that it has a word on."""
        found: set[int] = set()
        for told in self._rows.get(row, {}).get(judge, ()):
            found |= set(map(int, told[question] or ()))
        return found

    def words(self, row: str, case: int) -> list[tuple[str, str]]:
        """Each judge and its word on an image."""
        found = []
        for judge, parts in self._rows.get(row, {}).items():
            found += [
                (judge, told["words"][str(case)]) for told in parts if str(case) in told["words"]
            ]
        return found

    def seen(self, row: str) -> dict[int, list[str]]:
        """Cases of which a judge says that they show the concept, and which judges do."""
        return self.by_case(row, "seen")

    def harmed(self, base: str, row: str) -> dict[int, list[str]]:
        """Cases that a judge finds right in the base and wrong in a row, and which judges do."""
        found: dict[int, list[str]] = {}
        for judge in self.judges(row, "wrong"):
            before = self.cases(base, judge, "words") - self.cases(base, judge, "wrong")
            for case in sorted(before & self.cases(row, judge, "wrong")):
                found.setdefault(case, []).append(judge)
        return found

    def by_case(self, row: str, question: str) -> dict[int, list[str]]:
        """Cases that a judge calls `seen` or `wrong`, and which judges do."""
        found: dict[int, list[str]] = {}
        for judge in self.judges(row, question):
            for case in sorted(self.cases(row, judge, question)):
                found.setdefault(case, []).append(judge)
        return found
