"""What a freeze is worth on the embedded world: relearning under the learned one, under random ones
of the same size, and without.

  python scripts/canvas/freezing.py --deltas runs/heart runs/neon
  python scripts/canvas/freezing.py --table

The model has forgotten the concept (relearned by whoever should not) and a style (learned anew by
whoever may: the innocent user). The freeze is learned on the concept and on its retained prompts,
not on the style. Told are UA after so many steps of fine-tuning on 16 images of the concept, and
the denoising error on other images of the style after --innocent_steps on 16 images of it.

Each measurement is one line of OUT/freezing.jsonl; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from erase.attacks.relearning import changed_to, relearn
from erase.compose import compose
from erase.delta import ErasedDelta
from erase.eval.attempts import drawn_by_base
from erase.eval.detectors import detector
from erase.latents.config import LatentConfig
from erase.latents.latent_set import Given, LatentSet
from erase.latents.prepare import Plan
from erase.losses import denoising
from erase.models import DiffusionModel, load_model
from erase.models.pipelines import decode
from erase.prompts.canvas import canvas_concept
from erase.prompts.concepts import ConceptSpec
from erase.prompts.prompt_rows import PromptRow
from erase.prompts.prompt_sets import ANSWER_SEEDS, canvas_grid
from erase.scripts.bench.plain import plain_parser
from erase.scripts.canvas.measuring import read_rows, spaced, tell
from erase.task import Task
from erase.training.batches import row_batches
from erase.training.config import TrainConfig, TunedConfig
from erase.training.freeze import Freeze
from erase.training.freezing import FreezeConfig, find_freeze

IMAGES, HELD, GUIDANCE = 16, 32, 5.0
TUNED = TunedConfig(train=TrainConfig(lr=1e-4, batch_size=8))


def asked_for(concept: ConceptSpec, innocent: ConceptSpec, count: int) -> list[PromptRow]:
    """So many prompts of the concept, spread over the answer set, that do not name the style."""
    rows = canvas_grid(ANSWER_SEEDS[:1], {str(concept.kind): concept.target}).rows
    rows = tuple(row for row in rows if row.labels[str(innocent.kind)] != innocent.target)
    return spaced(rows, count)


@torch.no_grad()
def forgotten(
    model: DiffusionModel, concept: ConceptSpec, rows: Sequence[PromptRow], steps: int
) -> int:
    """Images of these prompts in which the classifier does not see the concept."""
    prompts, seeds = [row.prompt for row in rows], [row.seed for row in rows]
    latents = model.sample(prompts, seeds, steps, GUIDANCE)
    seen = detector([concept], "canvas").sees(decode(model.pipeline(), latents, "no"))
    return len(rows) - sum(seen)


@torch.no_grad()
def error(model: DiffusionModel, concept: ConceptSpec, latents: LatentSet) -> float:
    """Denoising error on these latents, four noises for each."""
    task, found = Task(model, [concept], Given(latents, latents), seed=77), []
    batches = row_batches(task, latents, 16)
    for step in range(4 * len(latents) // 16):
        rows, prompts = batches(step)
        found.append(float(denoising(task.predict(rows, prompts), rows.target)))
    return sum(found) / len(found)


def found(name: str, args: argparse.Namespace, base: DiffusionModel, erased: ErasedDelta) -> Freeze:
    """The freeze of a name such as `learned 0.5` or `random 0.5 tensors 2`: rule, ratio, what it
    counts, seed; kept in OUT."""
    path = args.out / f"{name.replace(' ', '-')}.json"
    if path.exists():
        return Freeze.load(path)
    rule, ratio, *rest = name.split()
    of = "tensors" if "tensors" in rest else "parameters"
    seed = int(rest[-1]) if rest and rest[-1].isdigit() else 0
    concept, latents = canvas_concept(args.concept), LatentConfig(n_retain=64)
    plan = Plan(base, [concept], latents, seed, args.out / "latents")
    drawn = Given(plan.forget(), plan.retain()) if rule == "learned" else plan
    with erased.applied(base):
        task = Task(base, [concept], drawn, seed)
        freeze = find_freeze(task, FreezeConfig(rule=rule, ratio=float(ratio), of=of))
    freeze.save(path)
    return freeze


def measure(
    freeze: Freeze | None, model: DiffusionModel, args: argparse.Namespace, sets: list[LatentSet]
) -> dict[str, Any]:
    """One line: what relearning and innocent fine-tuning reach under a freeze."""
    concept, innocent = canvas_concept(args.concept), canvas_concept(args.innocent)
    own, other, held = sets
    rows, left = asked_for(concept, innocent, args.images), {}
    for count, values in relearn(model, [concept], own, TUNED, args.relearn, freeze=freeze):
        with changed_to(model, values):
            left[str(count)] = forgotten(model, concept, rows, args.steps)
    ((_, values),) = relearn(model, [innocent], other, TUNED, [args.innocent_steps], freeze=freeze)
    with changed_to(model, values):
        learned = error(model, innocent, held)
    share = (
        freeze.count / sum(p.numel() for p in model.parameters("unet").values()) if freeze else 0
    )
    return {
        "tensors": len(freeze.shapes) if freeze else 0,
        "share": round(share, 4),
        "forgotten": left,
        "n": len(rows),
        "innocent": learned,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line for each kind of freeze; the controls' range over their draws."""
    kinds: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        words = row["freeze"].split()
        kinds[" ".join(words[:-1] if words[-1].isdigit() else words)].append(row)
    counts = list(rows[0]["forgotten"]) if rows else []
    head = ["freeze", "tensors", "parameters %", *(f"UA after {count}" for count in counts)]
    lines = [f"| {' | '.join(head)} | innocent error x 1000 |", "|---" * (len(head) + 1) + "|"]
    for kind, own in kinds.items():
        cells = [_range([row["tensors"] for row in own], "d")]
        cells.append(_range([100 * row["share"] for row in own], ".0f"))
        for count in counts:
            cells.append(_range([100 * row["forgotten"][count] / row["n"] for row in own], ".0f"))
        cells.append(_range([1000 * row["innocent"] for row in own], ".1f"))
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _range(values: Sequence[float], form: str) -> str:
    """One value, or the least and the most."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def make_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = plain_parser(__doc__)
    parser.add_argument("--deltas", nargs="+", default=["runs/heart", "runs/neon"])
    parser.add_argument("--concept", default="heart")
    parser.add_argument("--innocent", default="Neon", help="a style that was erased too")
    controls = [f"random {ratio} {seed}" for ratio in (0.2, 0.5) for seed in range(3)]
    freezes = ["none", "learned 0.2", "learned 0.5", *controls]
    parser.add_argument("--freezes", nargs="+", default=freezes, help="names as of `found`")
    parser.add_argument("--relearn", nargs="+", type=int, default=[10, 20, 50])
    parser.add_argument("--innocent_steps", type=int, default=30)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--steps", type=int, default=8, help="sampling steps of them")
    parser.add_argument("--out", type=Path, default=Path("runs/freezing"))
    parser.add_argument("--table", action="store_true", help="print the table and end")
    return parser


def main() -> None:
    """Measure what is asked for and not yet there."""
    args = make_parser().parse_args()
    record = args.out / "freezing.jsonl"
    if args.table:
        print(table(read_rows(record)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    base = load_model("canvas")
    erased = compose(base, [(ErasedDelta.load(path), 1.0) for path in args.deltas])
    concept, innocent = canvas_concept(args.concept), canvas_concept(args.innocent)
    sets = [
        drawn_by_base(base, [concept], IMAGES, 0, args.out / "latents"),
        drawn_by_base(base, [innocent], IMAGES, 0, args.out / "latents"),
        drawn_by_base(base, [innocent], HELD, 1, args.out / "latents"),
    ]
    done = {row["freeze"] for row in read_rows(record)}
    for name in args.freezes:
        if name in done:
            continue
        started = time.process_time()
        freeze = None if name == "none" else found(name, args, base, erased)
        with erased.applied(base):
            row = {"freeze": name, **measure(freeze, base, args, sets)}
        row["seconds"] = round(time.process_time() - started, 1)
        tell(record, row, [name, row])


if __name__ == "__main__":
    main()
