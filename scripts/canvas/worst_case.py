"""Which pairs of object and style are hardest to forget on the embedded world, and whether the
search finds them.

  python scripts/canvas/worst_case.py
  python scripts/canvas/worst_case.py --objects heart moon fish tree --styles Flat Neon Mosaic Chalk
  python scripts/canvas/worst_case.py --table

ESD erases prompts such as "A heart image in Neon style." in proportion to weights, and the weights
move to the prompts that stay known (erase/worst_case.py); the --budget prompts of largest weight
are the worst-case set. It is then erased alone, as are --random sets of the same size, drawn from
all of them, and UA is told of each on its own prompts, beside the base's: images in which the
classifier does not see both the object and the style. A worst-case set is worth its name if few
random ones have a lower UA.

Each measurement is one line of OUT/worst_case.jsonl; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from erase.attacks.relearning import changed_to
from erase.eval.detectors import detector
from erase.latents.latent_set import LatentSet
from erase.latents.prepare import Given
from erase.methods.esd import ESDConfig
from erase.models import DiffusionModel, load_model
from erase.models.pipelines import decode
from erase.prompts.canvas import canvas_concept
from erase.prompts.concepts import ConceptSpec
from erase.scripts.canvas.results import read_rows, tell
from erase.task import Task
from erase.training.config import TrainConfig
from erase.worst_case import WeightedESD, WorstCaseConfig, select

GUIDANCE, SEEDS, BASE = 5.0, 1000, "base"


@dataclass(frozen=True)
class Pair:
    """An object in a style."""

    object: str
    style: str

    @property
    def prompt(self) -> str:
        return f"A {self.object} image in {self.style} style."


@torch.no_grad()
def shown(model: DiffusionModel, pair: Pair, images: int, steps: int) -> int:
    """Images of the pair's prompt, of seeds from SEEDS on, that show both."""
    seeds = list(range(SEEDS, SEEDS + images))
    latents = model.sample([pair.prompt] * images, seeds, steps, GUIDANCE)
    drawn = decode(model.pipeline(), latents, "no")
    sees = [
        detector([canvas_concept(name)], "canvas").sees(drawn) for name in (pair.object, pair.style)
    ]
    return sum(both for both in map(all, zip(*sees, strict=True)))


def latents_of(model: DiffusionModel, pairs: Sequence[Pair], each: int, steps: int) -> LatentSet:
    """So many images of each pair's prompt, by the base."""
    prompts = [pair.prompt for pair in pairs for _ in range(each)]
    latents = model.sample(prompts, list(range(len(prompts))), steps, GUIDANCE)
    return LatentSet(latents, None, tuple(prompts))


def measure(
    erasing: WeightedESD, pairs: Sequence[Pair], chosen: Sequence[int], args: argparse.Namespace
) -> dict[str, Any]:
    """UA of a set on its own prompts, erased alone."""
    weights = [float(place in chosen) for place in range(len(pairs))]
    with changed_to(erasing.task.model, erasing.edit(weights).values):
        seen = [shown(erasing.task.model, pairs[i], args.images, args.steps) for i in chosen]
    n = args.images * len(chosen)
    return {"places": list(chosen), "forgotten": n - sum(seen), "n": n, "seen": seen}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: the worst-case set, and where it stands among the random ones; the base's UA on the
    same prompts."""
    measured = [row for row in rows if row["set"] != BASE]
    base = next((row["seen"] for row in rows if row["set"] == BASE), [])
    ua = {row["set"]: 100 * row["forgotten"] / row["n"] for row in measured}
    others = sorted(value for name, value in ua.items() if name.startswith("random"))
    lines = ["| set | prompts | UA | base |", "|---" * 4 + "|"]
    for row in sorted(measured, key=lambda row: ua[row["set"]]):
        was = 100 - 100 * sum(base[place] for place in row["places"]) / row["n"]
        prompts = "; ".join(row["prompts"])
        lines.append(f"| {row['set']} | {prompts} | {ua[row['set']]:.0f} | {was:.0f} |")
    if "worst case" in ua and others:
        below = sum(value < ua["worst case"] for value in others)
        equal = sum(value == ua["worst case"] for value in others)
        lines.append(
            f"\n{below} of {len(others)} random sets have a lower UA, {equal} the same; their "
            f"mean is {sum(others) / len(others):.0f}"
        )
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--objects", nargs="+", default=["heart", "moon", "fish", "house"])
    parser.add_argument("--styles", nargs="+", default=["Flat", "Neon", "Mosaic", "Chalk"])
    parser.add_argument("--budget", type=int, default=2, help="prompts of a set")
    parser.add_argument("--rounds", type=int, default=6, help="of the search")
    parser.add_argument("--random", type=int, default=20, help="random sets to compare with")
    parser.add_argument("--each", type=int, default=4, help="images of a prompt to train on")
    parser.add_argument("--images", type=int, default=8, help="of a prompt that are judged")
    parser.add_argument("--steps", type=int, default=8, help="sampling steps")
    parser.add_argument("--train_steps", type=int, default=30, help="of ESD")
    parser.add_argument("--lr", type=float, default=3e-4, help="of ESD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/worst_case"))
    parser.add_argument("--table", action="store_true", help="print the table and end")
    return parser


def main() -> None:
    """Measure what is not yet there: the random sets, then the search and what it found."""
    args = make_parser().parse_args()
    record = args.out / "worst_case.jsonl"
    if args.table:
        print(table(read_rows(record)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    pairs = [Pair(name, style) for name in args.objects for style in args.styles]
    model, config = load_model("canvas"), WorstCaseConfig(args.budget, args.rounds)
    latents = latents_of(model, pairs, args.each, args.steps)
    concepts = [ConceptSpec(pair.prompt, "an image") for pair in pairs]
    task = Task(model, concepts, Given(latents, latents), args.seed)
    train = TrainConfig(steps=args.train_steps, lr=args.lr, batch_size=2)
    erasing = WeightedESD(task, ESDConfig(train=train))

    done = {row["set"] for row in read_rows(record)}
    if BASE not in done:
        seen = [shown(model, pair, args.images, args.steps) for pair in pairs]
        tell(record, {"set": BASE, "seen": seen}, [BASE, seen])
    every = list(combinations(range(len(pairs)), args.budget))
    drawn = random.Random(args.seed).sample(every, min(args.random, len(every)))
    sets = {**{f"random {i}": chosen for i, chosen in enumerate(drawn)}, "worst case": ()}
    for name, chosen in sets.items():
        if name in done:
            continue
        started, row = time.process_time(), {"set": name}
        if name == "worst case":
            found = select(erasing.losses, len(pairs), config)
            chosen, row["weights"] = found.chosen, [round(w, 3) for w in found.weights]
            row["losses"] = found.losses
        row |= measure(erasing, pairs, chosen, args)
        row["prompts"] = [pairs[i].prompt for i in chosen]
        row["seconds"] = round(time.process_time() - started, 1)
        tell(record, row, [name, row["prompts"], row["forgotten"], row["n"], row["seconds"], "s"])


if __name__ == "__main__":
    main()
