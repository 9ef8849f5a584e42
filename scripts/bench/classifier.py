"""Unlearning in a classifier, where retraining without the forgotten data is the exact answer (Fan
et al., ICLR 2024, section 5.1): scikit-learn's digits, through the loop and the masks of this
project. The tables of docs/classifier_bench.md.

measure everything, and print the tables:
  OMP_NUM_THREADS=1 python scripts/bench/classifier.py
a part of it, on the tuning seeds first (several processes can share the work):
  python scripts/bench/classifier.py --scenarios class --seeds 100 101 --rows SSD
  python scripts/bench/classifier.py --scenarios class --seeds 0 1 --rows SSD
the tables of what is measured:
  python scripts/bench/classifier.py --table

First every row is measured with each of its four settings on the tuning seeds; the setting with
the smallest mean gap to Retrain is then measured on the seeds that are reported. Each measurement
is one line of OUT/classifier.jsonl; what is there is not measured again.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from erase.prompts.errors import ErasureError, unknown
from erase.scripts.bench.classifier_data import SCENARIOS
from erase.scripts.bench.classifier_methods import Row, World, rows
from erase.scripts.bench.classifier_scores import gap, scores
from erase.scripts.bench.classifier_tables import tables
from erase.scripts.bench.plain import plain_parser

TUNING_SEEDS, SEEDS = (100, 101), tuple(range(10))
Measurement = dict[str, Any]


class Record:
    """The file of measurements."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.found: dict[tuple[Any, ...], Measurement] = {}
        for line in lines:
            measurement = json.loads(line)
            self.found[_key(**measurement)] = measurement

    def has(self, world: World, name: str, setting: Mapping[str, float]) -> bool:
        """Whether it is measured."""
        return _key(world.scenario, world.seed, name, setting) in self.found

    def add(self, measurement: Measurement) -> None:
        """One more line."""
        self.found[_key(**measurement)] = measurement
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(measurement) + "\n")

    def best(self, scenario: str, name: str, row: Row) -> dict[str, float]:
        """The setting of a row with the smallest mean gap on the tuning seeds; the first of equal
        ones.

        Raises:
            ErasureError: one was not measured there.
        """

        def of(setting: dict[str, float]) -> float:
            keys = [_key(scenario, seed, name, setting) for seed in TUNING_SEEDS]
            if not all(key in self.found for key in keys):
                raise ErasureError(
                    f"{name} was not measured on all tuning seeds of {scenario}; run "
                    f"--seeds {' '.join(map(str, TUNING_SEEDS))} first"
                )
            return fmean(self.found[key]["gap"] for key in keys)

        return min(row.settings, key=of)


def _key(
    scenario: str, seed: int, row: str, setting: Mapping[str, float], **_: Any
) -> tuple[Any, ...]:
    return scenario, seed, row, json.dumps(setting)


def measure(world: World, name: str, row: Row, setting: Mapping[str, float]) -> Measurement:
    """One network, and its distance to Retrain."""
    net, seconds = row.unlearn(world, setting)
    own = scores(net, world.split)
    return {
        "scenario": world.scenario,
        "seed": world.seed,
        "row": name,
        "setting": dict(setting),
        **own,
        "gap": gap(own, exact(world)),
        "seconds": round(seconds, 3),
    }


@cache
def exact(world: World) -> dict[str, float]:
    """The columns of Retrain."""
    return scores(world.retrain[0], world.split)


def measure_all(
    record: Record, chosen: Mapping[str, Row], scenarios: Sequence[str], seeds: Sequence[int]
) -> None:
    """Measure what is not there yet: every setting on a tuning seed, the best on another."""
    for scenario in scenarios:
        for seed in seeds:
            world = World(scenario, seed)
            for name, row in chosen.items():
                tuning = seed in TUNING_SEEDS
                settings = row.settings if tuning else [record.best(scenario, name, row)]
                for setting in settings:
                    if not record.has(world, name, setting):
                        record.add(measure(world, name, row, setting))
            print(scenario, seed, "done", flush=True)


def main() -> None:
    """Measure what is asked for and not yet there; print the tables."""
    parser = plain_parser(__doc__)
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[*TUNING_SEEDS, *SEEDS])
    parser.add_argument("--rows", nargs="+", help="names of rows; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/classifier"))
    parser.add_argument("--table", action="store_true", help="print the tables and end")
    args = parser.parse_args()

    known = rows()
    for name in args.rows or ():
        if name not in known:
            raise SystemExit(str(unknown("row", name, known)))
    record = Record(args.out / "classifier.jsonl")
    if not args.table:
        # every training ends with a garbage collection, which need not look at the libraries
        gc.freeze()
        chosen = {name: known[name] for name in args.rows or known}
        try:
            measure_all(record, chosen, args.scenarios, args.seeds)
        except ErasureError as error:
            raise SystemExit(str(error)) from error
    print(tables(record.found.values(), set(TUNING_SEEDS)))


if __name__ == "__main__":
    main()
