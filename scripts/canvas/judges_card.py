"""The card of the embedded world's judges: their accuracy on held-out renders and the sha256 of
their files.

`python scripts/canvas/train_judges.py --judge card` writes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from erase.eval.canvas.judges import WEIGHTS, load_classifier
from erase.eval.canvas.render import render
from erase.eval.evaluators.clip import Config, load_clip, zero_shot_weights
from erase.files import atomic_write
from erase.prompts.canvas import KINDS, vocabulary

# renders of one purpose share none with another
SEEDS = {
    "classifier": 20_000_000,
    "clip": 30_000_000,
    "held-out": 40_000_000,
}
HELD_OUT = 10  # renders per cell on which the card's accuracies are measured


def truth(kind: str, cells: list[dict[str, str]]) -> Tensor:
    """Class index of each cell's concept of one kind, shape (cells,)."""
    return torch.tensor([vocabulary().names(kind).index(cell[kind]) for cell in cells])


def held_out_accuracy(
    predict: Callable[[Tensor], dict[str, Tensor]], per_cell: int, seed: int = SEEDS["held-out"]
) -> dict[str, float]:
    """Percent right per kind over `per_cell` renders of every cell; `predict` maps (n, 3, 64, 64)
    in [0, 1] to logits per kind."""
    cells, right = vocabulary().cells(), dict.fromkeys(KINDS, 0)
    for i in range(per_cell):
        logits = predict(render(cells, seed=seed + i))
        for kind in KINDS:
            right[kind] += int((logits[kind].argmax(1) == truth(kind, cells)).sum())
    return {kind: 100 * right[kind] / (per_cell * len(cells)) for kind in KINDS}


CARD = """# The judges of the embedded world

Two models that say which object, style and colour an image of the `canvas` world shows. \
`scripts/canvas/train_judges.py` made both from
renders of `eval/canvas/render.py` alone; neither has seen a generated image. \
Licence: Apache-2.0, as the rest of this repository.
No data of anybody else went into them.

| judge | load with | parameters | stored as |
|---|---|---|---|
| classifier | `erase.eval.canvas.judges.load_classifier()` | {classifier_size:,} | float16 |
| CLIP (open_clip: ResNet image tower, two-layer text tower) | \
`open_clip.create_model_and_transforms("local-dir:…/clip")` | {clip_size:,} | float16 |

## Accuracy on held-out renders

{n:,} renders ({per_cell} per object x style x colour, seeds that no training batch used), \
judged by the files in this folder. CLIP is
zero-shot: each kind's names in the captions of the vocabulary that name this kind alone.

| judge | object | style | colour |
|---|---|---|---|
{rows}

Command: `{command}` ({recipe}).
Measure again: `python scripts/canvas/train_judges.py --judge card`.

## Files

| file | bytes | sha256 |
|---|---|---|
{files}

## Limits

They know this world's {concepts} concepts and nothing else: any picture gets one of these names, \
however wrong. They were trained
with mild noise, blur and changes of brightness, as small autoencoders show them; \
not with other resolutions or heavy damage.
"""


def write_card(recipe: str) -> None:
    """Measure the judges as shipped and write their card."""
    clip = load_clip(Config())
    text = {
        kind: zero_shot_weights(clip, vocabulary().names(kind), kind, Config()) for kind in KINDS
    }

    @torch.no_grad()
    def by_clip(images: Tensor) -> dict[str, Tensor]:
        seen = F.normalize(clip.model.encode_image(images * 2 - 1), dim=-1)
        return {kind: seen @ text[kind].T for kind in KINDS}

    judges = {"classifier": load_classifier(), "CLIP, zero-shot": by_clip}
    accuracies = {name: held_out_accuracy(predict, HELD_OUT) for name, predict in judges.items()}
    files = [
        path for path in sorted(WEIGHTS.rglob("*")) if path.is_file() and path.name != "README.md"
    ]
    card = CARD.format(
        classifier_size=sum(p.numel() for p in load_classifier().parameters()),
        clip_size=sum(p.numel() for p in clip.model.parameters()),
        n=HELD_OUT * len(vocabulary().cells()),
        per_cell=HELD_OUT,
        rows="\n".join(_row(name, by_kind) for name, by_kind in accuracies.items()),
        command="python scripts/canvas/train_judges.py",
        recipe=recipe,
        files="\n".join(
            f"| {path.relative_to(WEIGHTS)} | {path.stat().st_size:,} | "
            f"`{hashlib.sha256(path.read_bytes()).hexdigest()}` |"
            for path in files
        ),
        concepts=sum(len(vocabulary().names(kind)) for kind in KINDS),
    )
    with atomic_write(WEIGHTS / "README.md") as aside:
        aside.write_text(card, encoding="utf-8")
    print(card)


def _row(judge: str, accuracies: Mapping[str, float]) -> str:
    cells = [f"{accuracies[kind]:.2f} %" for kind in KINDS]
    return f"| {judge} | {' | '.join(cells)} |"
