"""Three, ten, thirty and a hundred concepts at once on the embedded world.

  python scripts/canvas/many.py --counts 3 10 30 100 --methods uce rece speed
  python scripts/canvas/many.py --counts 10 --methods salun mace
  python scripts/canvas/many.py --counts 3 10 --methods salun --limit 1    steps of one alone
  python scripts/canvas/many.py --counts 10 30 --methods salun --rule fisher-ratio
  python scripts/canvas/many.py --table

Three are the heart, Neon and red. Ten are names: four objects, three styles, three colours. Thirty
are objects in a colour, half of the sixty that there are: a red heart goes, a yellow heart and a
red star must stay. A hundred are cells of the world, drawn at random: a red heart in Neon style
goes, a red heart in Chalk style must stay.

UA is the share of images of the concepts in which the classifier does not see all that was asked
for (of a name: the name); kept is the share of the other images in which it sees all. Beside them
the base's, on the same prompts and seeds. Methods have the settings of scripts/canvas/variants.py;
those that train have as many steps, latents and batches behind the mask for each concept as one
alone has, of at most --limit concepts, and may have another rule for the mask. Each measurement is
one line of OUT/many.jsonl; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

from erase.eval.evaluators.classifier import load_judge, predict
from erase.eval.generate import GenerateConfig, generate
from erase.eval.metrics.intervals import of_rate
from erase.models import DiffusionModel, load_model
from erase.prompts.canvas import KINDS, canvas_concept, vocabulary
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import unknown
from erase.prompts.prompt_rows import PromptRow
from erase.prompts.prompt_sets import ANSWER_SEEDS, PromptSet, canvas_grid
from erase.run import EraseConfig, erase_concept
from erase.scripts.bench.plain import plain_parser
from erase.scripts.canvas.measuring import read_rows, spaced, tell
from erase.scripts.canvas.sequence import of_many
from erase.scripts.canvas.variants import Variant, groups
from erase.training.config import RULES, TunedConfig

THREE = ("heart", "Neon", "red")
NAMES = ("heart", "star", "house", "fish", "Neon", "Striped", "Chalk", "red", "green", "blue")
COLOURED = ("a {}", "A {} in %s style.", "A {} image in %s style.")
CELL = "{colour} {object} in {style} style"
GRID_CELL = "{colour} {object} image in {style} style"
Labels = dict[str, str]
"""kind -> name: what an image of a concept shows"""


@dataclass(frozen=True)
class World:
    """What is forgotten together, and the images that tell."""

    concepts: list[ConceptSpec]
    gone: list[Labels]
    """of each concept"""
    prompts: PromptSet
    """rows that ask for one of them, and rows that ask for none"""

    def asks(self, row: PromptRow) -> Labels:
        """What the row asks for of what is forgotten; nothing, of one that must stay."""
        return next((one for one in self.gone if one.items() <= row.labels.items()), {})


def world(count: int, images: int) -> World:
    """So many concepts, and so many images of them and of the rest, each spread evenly.

    Raises:
        SystemExit: another count than 3, 10, 30 and 100.
    """
    makers = {3: partial(_names, THREE), 10: partial(_names, NAMES), 30: _coloured, 100: _cells}
    if count not in makers:
        raise SystemExit(str(unknown("count", str(count), [*map(str, makers)])))
    pairs, prompts = makers[count](), canvas_grid(ANSWER_SEEDS[:1])
    whole = World([concept for concept, _ in pairs], [labels for _, labels in pairs], prompts)

    kept = [row for row in prompts.rows if not whole.asks(row)]
    forgotten = [row for row in prompts.rows if whole.asks(row)]
    retain = tuple(row.prompt for row in kept)
    concepts = [one if one.retain else replace(one, retain=retain) for one in whole.concepts]
    rows = spaced(forgotten, min(images, len(forgotten))) + spaced(kept, min(images, len(kept)))
    return World(concepts, whole.gone, replace(prompts, rows=tuple(rows)))


def _names(names: Sequence[str]) -> list[tuple[ConceptSpec, Labels]]:
    """Each with its own anchor, or the next of its kind that stays."""
    vocab, pairs = vocabulary(), []
    for name in names:
        kind = vocab.kind_of(name) or ""
        order = vocab.names(kind) * 2
        after = (other for other in order[order.index(name) :] if other not in names)
        own = vocab.anchor(name)
        anchor = next(after) if own in names else own
        pairs.append((canvas_concept(name, anchor), {kind: name}))
    return pairs


def _coloured() -> list[tuple[ConceptSpec, Labels]]:
    """Every other colour of an object, in turn; the anchor is the next object in that colour, which
    stays."""
    things, pairs = vocabulary().names("object"), []
    styles = vocabulary().names("style")
    templates = [COLOURED[0], *(text % style for text, style in product(COLOURED[1:], styles))]
    for i, thing in enumerate(things):
        for colour in vocabulary().names("colour")[i % 2 :: 2]:
            names = [f"{colour} {name}" for name in (thing, things[(i + 1) % len(things)])]
            concept = ConceptSpec(*names, templates=tuple(templates))
            pairs.append((concept, {"object": thing, "colour": colour}))
    return pairs


def _cells() -> list[tuple[ConceptSpec, Labels]]:
    """A hundred of the 480; the anchor is the next object's cell that stays."""
    cells, things = vocabulary().cells(), vocabulary().names("object")
    chosen, pairs = random.Random(0).sample(cells, 100), []
    for cell in chosen:
        after = things[things.index(cell["object"]) :] + things
        anchors = ({**cell, "object": thing} for thing in after)
        anchor = next(other for other in anchors if other not in chosen)
        name, synonym = (text.format(**cell) for text in (CELL, GRID_CELL))
        concept = ConceptSpec(name, CELL.format(**anchor), (synonym,), ("A {}.",))
        pairs.append((concept, cell))
    return pairs


def shares(here: World, model: DiffusionModel, folder: Path, steps: int) -> dict[str, list[float]]:
    """UA and kept in percent: value, number of images, ends of the 95 % interval."""
    config, provenance = GenerateConfig(steps=steps), {"fingerprint": model.fingerprint}
    images = generate(model.pipeline(), here.prompts, folder, config, provenance)
    seen, hits = predict(load_judge("canvas"), images), {"UA": [], "kept": []}
    for i, row in enumerate(images.rows):
        asked = here.asks(row)
        right = all(seen[kind][i] == row.labels[kind] for kind in asked or KINDS)
        hits["UA" if asked else "kept"].append(not right if asked else right)
    found = {}
    for name, ones in hits.items():
        numbers = (sum(ones) / len(ones), *of_rate(sum(ones), len(ones)))
        value, low, high = (round(100 * number, 2) for number in numbers)
        found[name] = [value, len(ones), low, high]
    return found


def measure(
    here: World, model: DiffusionModel, variant: Variant, args: argparse.Namespace
) -> dict[str, Any]:
    """Erase all of them at once, and judge what is left of them and of the rest."""
    count = len(here.concepts)
    settings, latents = of_many(variant.settings, variant.latents, min(count, args.limit))
    if args.rule and isinstance(settings, TunedConfig):
        settings = replace(settings, mask=replace(settings.mask, rule=args.rule))
    config = EraseConfig(method=variant.method, seed=args.seed, latents=latents)
    started = time.process_time()
    delta = erase_concept(here.concepts, config, settings, model=model)
    seconds = round(time.process_time() - started, 1)

    folder = args.out / f"images-{count}-{variant.method}"
    with delta.applied(model):
        erased = shares(here, model, folder, args.steps)
    shutil.rmtree(folder)
    return {"seconds": seconds, "changed": delta.count, "erased": erased}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each number of concepts, method, rule, and limit of its steps."""
    lines = ["| concepts | method | rule | limit | UA | kept | changed | CPU s |", "|---" * 8 + "|"]
    for row in sorted(rows, key=lambda row: row["count"]):
        cells = [str(row[name] or "") for name in ("count", "method", "rule", "limit")]
        for name in ("UA", "kept"):
            value, n, low, high = row["erased"][name]
            cells.append(f"{value:.1f} [{low:.1f}, {high:.1f}] / {row['base'][name][0]:.1f} ({n})")
        lines.append(f"| {' | '.join(cells)} | {row['changed']:,} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = plain_parser(__doc__)
    parser.add_argument("--counts", nargs="+", type=int, default=[10, 30, 100])
    parser.add_argument("--methods", nargs="+", default=["uce", "rece", "speed"])
    parser.add_argument("--limit", type=int, default=10, help="concepts' worth of steps, at most")
    parser.add_argument("--rule", choices=RULES, help="of the mask; default: the method's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=120, help="of concepts, and of the rest")
    parser.add_argument("--steps", type=int, default=12, help="sampling steps of the images")
    parser.add_argument("--out", type=Path, default=Path("runs/many"))
    parser.add_argument("--table", action="store_true", help="print the table and end")
    return parser


def main() -> None:
    """Measure what is asked for and not yet there."""
    args = make_parser().parse_args()
    record = args.out / "many.jsonl"
    if args.table:
        print(table(read_rows(record)))
        return
    known = groups("no")
    variants = {**known["presets"], **known["methods"]}
    for name in args.methods:
        if name not in variants:
            raise SystemExit(str(unknown("method", name, variants)))

    args.out.mkdir(parents=True, exist_ok=True)
    keys = ("count", "method", "rule", "seed", "limit")
    done = set(map(itemgetter(*keys), read_rows(record)))
    for count in args.counts:
        asked = [(count, name, args.rule, args.seed, args.limit) for name in args.methods]
        missing = [key for key in asked if key not in done]
        if not missing:
            continue
        here, model = world(count, args.images), load_model("canvas")
        base = shares(here, model, args.out / f"base-{count}", args.steps)
        for key in missing:
            row = dict(zip(keys, key, strict=True), base=base)
            row |= measure(here, model, variants[key[1]], args)
            tell(record, row, [*key, row["seconds"], "s", row["erased"]])


if __name__ == "__main__":
    main()
