"""Measure erasures on the embedded world and write the table of docs/results.md.

  python scripts/canvas/results.py --concepts all                                 the default preset, every concept, seed 0
  python scripts/canvas/results.py --concepts heart Neon red --seeds 0 1 2        three seeds of one concept of each kind
  python scripts/canvas/results.py --concepts heart Neon red --variants controls  a group or names of scripts/canvas/variants.py
  python scripts/canvas/results.py --concepts heart --variants salun --relearn 5 10 20 40    and how soon it comes back
  python scripts/canvas/results.py --table                                        the table of all that was measured

Each measurement is one line of OUT/results.jsonl; what is there is not measured again, so the script can be stopped at any time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import defaultdict
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from erase.eval.generate import GenerateConfig, generate
from erase.eval.images import ImageSet
from erase.eval.run import score
from erase.eval.scores import Score
from erase.latents.prepare import Plan
from erase.models import load_model
from erase.prompts.canvas import KINDS, canvas_concept, vocabulary
from erase.prompts.errors import unknown
from erase.prompts.prompt_sets import ANSWER_SEEDS, canvas_grid
from erase.run import EraseConfig, erase_concept
from erase.scripts.canvas.relearning import curve
from erase.scripts.canvas.variants import Variant, groups
from erase.training.config import TrainConfig

EVALUATORS = ["classifier", "clip"]
SHOWN = ("UA", "IRA", "CRA", "CLIP UA", "CLIP IRA", "CLIP CRA")


def _rounded(scores: list[Score]) -> dict[str, float]:
    return {score.name: round(score.value, 3) for score in scores}


def measure(
    concept: str,
    name: str,
    variant: Variant,
    seed: int,
    out: Path,
    answers: int,
    config: GenerateConfig,
    relearn: list[int],
) -> dict[str, Any]:
    """Erase, generate the answer set, score it beside the base's; the images and the delta's folder are removed afterwards."""
    spec = canvas_concept(concept)
    model = load_model("canvas")
    prompts = canvas_grid(ANSWER_SEEDS[:answers])
    generate(model.pipeline(), prompts, out / "base", config, {"fingerprint": model.fingerprint})
    folder = out / f"{concept}-{name.replace(' ', '-')}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (out / "latents").mkdir(exist_ok=True)
    # the same for all variants of a concept and seed
    (folder / "latents").symlink_to((out / "latents").resolve())
    started = time.monotonic()
    erasure = EraseConfig(method=variant.method, seed=seed, latents=variant.latents)
    delta = erase_concept(spec, erasure, variant.settings, model=model, out=folder)
    seconds = time.monotonic() - started
    few = replace(variant.latents, n_forget=16, n_retain=1, trajectory=0)
    # by the base
    latents = Plan(model, [spec], few, seed, out / "latents").forget() if relearn else None
    delta.apply(model)
    after = generate(
        model.pipeline(), prompts, folder / "images", config, {"fingerprint": model.fingerprint}
    )
    scores = {
        "base": _base_scores(out / "base", concept),
        "erased": score(after, [spec], EVALUATORS),
    }
    train = TrainConfig(lr=1e-4, batch_size=8, mixed_precision=config.mixed_precision)
    back = curve(model, spec, latents, prompts, relearn, train, folder, config) if latents else {}
    shutil.rmtree(folder)
    return {
        "concept": concept,
        "kind": spec.kind,
        "variant": name,
        "seed": seed,
        "answers": answers,
        "base_fingerprint": delta.metadata["base_fingerprint"],
        "settings": asdict(variant.settings),
        "latents": asdict(variant.latents),
        "seconds": round(seconds, 1),
        "changed": delta.count,
        **{row: _rounded(row_scores) for row, row_scores in scores.items()},
        **({"UA after relearning": back} if back else {}),
    }


@cache
def _base_scores(folder: Path, concept: str) -> list[Score]:
    """The same for every variant and seed of a concept: the same images, the same judges."""
    return score(ImageSet.open(folder), [canvas_concept(concept)], EVALUATORS)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: per variant and concept, means over seeds (with their range) beside the base."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["variant"], row["kind"], row["concept"]].append(row)
    lines = [
        "| variant | kind | concept | seeds | " + " | ".join(SHOWN) + " |",
        "|---" * (4 + len(SHOWN)) + "|",
    ]
    for (variant, kind, concept), runs in sorted(
        groups.items(), key=lambda item: (item[0][0] != "salun", item[0])
    ):
        cells = []
        for name in SHOWN:
            base = fmean(run["base"][name] for run in runs)
            cells.append(_cell([run["erased"][name] for run in runs], base))
        lines.append(
            f"| {variant} | {kind} | {concept} | {len(runs)} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> str:
    """Markdown: per kind, over all runs of the default preset, the mean and the worst of UA and of what IRA and CRA lost."""
    lines = [
        "| kind | runs | UA, mean (worst) | IRA - base, mean (worst) | CRA - base, mean (worst) |",
        "|---|---|---|---|---|",
    ]
    for kind in KINDS:
        runs = [row for row in rows if row["kind"] == kind and row["variant"] == "salun"]
        if runs:
            ua = [row["erased"]["UA"] for row in runs]
            lost = []
            for name in ("IRA", "CRA"):
                lost.append([row["erased"][name] - row["base"][name] for row in runs])
            cells = [
                f"{fmean(ua):.1f} ({min(ua):.1f})",
                *(f"{fmean(values):+.1f} ({min(values):+.1f})" for values in lost),
            ]
            lines.append(f"| {kind} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: list[float], base: float) -> str:
    ends = [f"{end:.1f}" for end in (min(values), max(values))]
    spread = f" ({' to '.join(ends)})" if ends[0] != ends[1] else ""
    return f"{fmean(values):.1f}{spread} / {base:.1f}"


def main() -> None:
    """Measure what is asked for and not yet there."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--concepts", nargs="+", default=["heart", "Neon", "red"], help="names, or all"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["salun"],
        help="names or groups of scripts/canvas/variants.py",
    )
    parser.add_argument(
        "--relearn",
        nargs="*",
        type=int,
        default=[],
        help="steps of fine-tuning on 16 images of the concept, afterwards",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--answers",
        type=int,
        default=1,
        help="seeds of the answer set: images of each object x style x colour",
    )
    parser.add_argument(
        "--precision", default="bf16", help="no, bf16 or fp16; of sampling and training alike"
    )
    parser.add_argument(
        "--steps", type=int, default=12, help="sampling steps of the images that are judged"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--table", action="store_true", help="print the tables and end")
    args = parser.parse_args()
    record = args.out / "results.jsonl"
    rows = (
        [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
        if record.exists()
        else []
    )
    if args.table:
        print(f"{summary(rows)}\n\n{table(rows)}")
        return
    names = (
        [name for kind in KINDS for name in vocabulary().names(kind)]
        if args.concepts == ["all"]
        else args.concepts
    )
    variants = groups(args.precision)
    known = {name: variant for group in variants.values() for name, variant in group.items()}
    picked = [name for word in args.variants for name in variants.get(word, [word])]
    for name in picked:
        if name not in known:
            raise SystemExit(str(unknown("variant", name, [*known, *variants])))
    done = {_key(row) for row in rows}
    args.out.mkdir(parents=True, exist_ok=True)
    config = GenerateConfig(steps=args.steps, mixed_precision=args.precision)
    for name in picked:
        for seed in args.seeds:
            for concept in names:
                if (concept, name, seed, args.answers, bool(args.relearn)) in done:
                    continue
                row = measure(
                    concept, name, known[name], seed, args.out, args.answers, config, args.relearn
                )
                with record.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(
                    concept,
                    name,
                    seed,
                    row["seconds"],
                    "s",
                    row["erased"],
                    row.get("UA after relearning", ""),
                    flush=True,
                )


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["concept"], row["variant"], row["seed"], row["answers"], "UA after relearning" in row


if __name__ == "__main__":
    main()
