"""How well a concept stays forgotten: attacks on erasures that scripts/canvas/results.py has made.

  python scripts/canvas/robustness.py --variants presets --relearn 5 10 20 40 80
  python scripts/canvas/robustness.py --variants presets --attack 5e-3 3e-2 --restarts 2
  python scripts/canvas/robustness.py --base --attack 5e-3 3e-2      the control: nothing was erased
  python scripts/canvas/robustness.py --unknown zorb --relearn 20    the base learns a word anew
  python scripts/canvas/robustness.py --table

Relearning fine-tunes the erased model on 16 images of the concept, as the base drew them, for so
many steps. What `--unknown` teaches the base are the same images and prompts, with a word of no
meaning in the place of the concept's names: how soon a model learns to call what it can draw. The
pseudo-token attack learns embeddings on the same images, at each rate and from each start, and
reports all; the best of them is the attacker's. Each measurement is one line of
OUT/robustness.jsonl; what is there is not measured again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor

from erase.attacks.pseudo_token import PseudoTokenConfig, find_pseudo_token, nameless
from erase.attacks.relearning import changed_to, relearn
from erase.delta import ErasedDelta
from erase.eval.attempts import drawn_by_base
from erase.eval.detectors import detector
from erase.latents.latent_set import Given, LatentSet
from erase.models import DiffusionModel, load_model
from erase.models.pipelines import decode
from erase.prompts.canvas import canvas_concept
from erase.prompts.concepts import ConceptSpec
from erase.prompts.prompt_sets import ANSWER_SEEDS, canvas_grid
from erase.scripts.canvas.measuring import delta_path, jobs_of, make_parser, read_rows, tell
from erase.scripts.canvas.tables import spread
from erase.task import Task
from erase.training.config import TrainConfig, TunedConfig

IMAGES, GUIDANCE, BATCH = 16, 5.0, 32


def shown(
    model: DiffusionModel,
    concept: ConceptSpec,
    steps: int,
    prefix: dict[str, Tensor] | None = None,
    worded: Callable[[str], str] = str,
) -> float:
    """Percentage of the concept's own answer prompts, otherwise worded, under which the classifier
    sees it: 100 - UA."""
    rows = canvas_grid(ANSWER_SEEDS[:1], {str(concept.kind): concept.target}).rows
    seen, sees = 0, detector([concept], "canvas").sees
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        prompts, seeds = [worded(row.prompt) for row in part], [row.seed for row in part]
        latents = model.sample(prompts, seeds, steps, GUIDANCE, prefix=prefix)
        seen += sum(sees(decode(model.pipeline(), latents, "no")))
    return 100 * seen / len(rows)


def called(concept: ConceptSpec, word: str | None) -> Callable[[str], str]:
    """Prompts with this word in the place of the concept's names; None: as they are."""
    return str if word is None else nameless((concept,), word)


def relearning(
    model: DiffusionModel,
    concept: ConceptSpec,
    latents: LatentSet,
    steps: list[int],
    sampling: int,
    worded: Callable[[str], str] = str,
) -> dict[str, float]:
    """Steps of fine-tuning -> UA afterwards; each count starts from the erased model anew."""
    left = {}
    latents = replace(latents, prompts=tuple(map(worded, latents.prompts)))
    config = TunedConfig(train=TrainConfig(lr=1e-4, batch_size=8))
    for count, values in relearn(model, [concept], latents, config, steps):
        with changed_to(model, values):
            left[str(count)] = 100 - shown(model, concept, sampling, worded=worded)
    return left


def attacked(
    model: DiffusionModel,
    concept: ConceptSpec,
    latents: LatentSet,
    rates: list[float],
    restarts: int,
    sampling: int,
) -> dict[str, list[float]]:
    """Rate -> success of each restart: images that show the concept, in percent."""
    task, success = Task(model, [concept], Given(latents, latents)), {}
    worded = nameless((concept,))
    for rate in rates:
        found = [
            find_pseudo_token(task, latents, PseudoTokenConfig(lr=rate), restart)
            for restart in range(restarts)
        ]
        success[f"{rate:g}"] = [shown(model, concept, sampling, prefix, worded) for prefix in found]
    return success


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: UA after so many steps of relearning, and the best attack at each rate; means over
    concepts and seeds, with their range."""
    cells: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        own = cells[row["variant"]]
        for steps, ua in row.get("relearned", {}).items():
            own[f"UA after {steps}"].append(ua)
        for rate, found in row.get("pseudo-token", {}).items():
            own[f"pseudo-token {rate}"].append(max(found))
    columns = list(dict.fromkeys(column for own in cells.values() for column in own))
    lines = [f"| erased with | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for variant, own in cells.items():
        values = [spread(own.get(column, [])) for column in columns]
        lines.append(f"| {variant} | {' | '.join(values)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is asked for and not yet there."""
    parser = make_parser()
    parser.description = __doc__
    parser.add_argument("--relearn", nargs="*", type=int, default=[], help="steps of fine-tuning")
    parser.add_argument(
        "--attack", nargs="*", type=float, default=[], help="rates of the pseudo-token's Adam"
    )
    parser.add_argument("--restarts", type=int, default=1, help="of the attack, at each rate")
    parser.add_argument("--base", action="store_true", help="attack the base instead")
    parser.add_argument(
        "--unknown",
        metavar="WORD",
        help="teach the base instead, with this word in the place of the concept's names",
    )
    args = parser.parse_args()
    control = "the base" if args.base else ""
    if args.unknown:
        control = f"the base, by {args.unknown!r}"
    record = args.out / "robustness.jsonl"
    if args.table:
        print(table(read_rows(record)))
        return

    asked = (args.relearn, args.attack, args.restarts)
    done = {tuple(map(str, row["key"])) for row in read_rows(record)}
    model = load_model(args.model)
    for job, _ in jobs_of(args):
        name = control or job.name
        key = (job.concept, name, job.seed, *map(str, asked))
        if tuple(map(str, key)) in done:
            continue
        concept = canvas_concept(job.concept)
        latents = drawn_by_base(model, [concept], IMAGES, job.seed, args.out / "latents")
        delta = None if control else ErasedDelta.load(delta_path(job, args.out))
        worded = called(concept, args.unknown)
        with delta.applied(model) if delta else nullcontext():
            row: dict[str, Any] = {"concept": job.concept, "variant": name, "seed": job.seed}
            row["UA"] = 100 - shown(model, concept, args.steps, worded=worded)
            row["relearned"] = relearning(model, concept, latents, args.relearn, args.steps, worded)
            row["pseudo-token"] = attacked(
                model, concept, latents, args.attack, args.restarts, args.steps
            )
        found = {name: row[name] for name in ("UA", "relearned", "pseudo-token")}
        tell(record, {**row, "key": key}, [control or job.slug, found])


if __name__ == "__main__":
    main()
