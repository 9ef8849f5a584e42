"""Measure an embedded checkpoint against its gate, and write its model card.

  python scripts/canvas/gate.py                           the whole grid, 5 seeds each: 2,400 images
  torchrun --nproc_per_node 2 scripts/canvas/gate.py               the same, shared by two processes
  python scripts/canvas/gate.py --model canvas-flow --trained 8000         the flow transformer

The gate: the classifier reads object, style and colour right in at least 97 % of the images each,
CLIP in at least 95 %.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from erase.eval.generate import GenerateConfig, generate
from erase.eval.run import score
from erase.eval.scores import Score
from erase.models import SHIPPED, load_model
from erase.parallel.processes import default_device, processes
from erase.prompts.canvas import EMBEDDED, vocabulary
from erase.prompts.prompt_sets import ANSWER_SEEDS, canvas_grid
from erase.scripts.bench.plain import plain_parser

LEAST = {"classifier": 97.0, "clip": 95.0}
CARDS = Path(__file__).parent / "cards"


def card(
    name: str,
    scores: dict[str, list[Score]],
    config: GenerateConfig,
    images: int,
    steps: int,
    command: str,
) -> str:
    """The model card of a checkpoint, with these figures."""
    vocab, folder = vocabulary(), SHIPPED[name]
    weights = sorted(folder.glob("*/*.safetensors"))
    template = (CARDS / f"{folder.name}.md.tmpl").read_text(encoding="utf-8")
    files = [(path, hashlib.sha256(path.read_bytes()).hexdigest()) for path in weights]
    return template.format(
        objects=len(vocab.names("object")),
        styles=len(vocab.names("style")),
        colours=len(vocab.names("colour")),
        steps=f"{steps:,}",
        images=images,
        seeds=", ".join(map(str, ANSWER_SEEDS)),
        sampler=(
            f"{config.scheduler}, {config.steps} steps, guidance {config.guidance:g}, autocast "
            f"{config.mixed_precision}"
        ),
        command=command,
        rows="\n".join(_row(judge, judged) for judge, judged in scores.items()),
        files="\n".join(
            f"| {path.relative_to(folder)} | {path.stat().st_size:,} | `{digest}` |"
            for path, digest in files
        ),
    )


def _row(judge: str, scores: list[Score]) -> str:
    cells = [score.text() for score in _accuracies(scores)]
    return f"| {judge} | {' | '.join(cells)} |"


def _accuracies(scores: list[Score]) -> list[Score]:
    return [score for score in scores if score.name.endswith("accuracy")]


def main() -> None:
    """Generate, score, write the card, and fail if the gate does not open."""
    parser = plain_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gate"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--precision", default="bf16", help="no, bf16 or fp16")
    parser.add_argument("--guidance", type=float, default=GenerateConfig.guidance)
    parser.add_argument("--scheduler", default=GenerateConfig.scheduler)
    parser.add_argument("--model", choices=EMBEDDED, default="canvas")
    parser.add_argument(
        "--trained", type=int, default=5500, help="steps that it was trained for, for the card"
    )
    args = parser.parse_args()
    config = GenerateConfig(
        steps=args.steps,
        guidance=args.guidance,
        mixed_precision=args.precision,
        scheduler=args.scheduler,
    )
    model = load_model(args.model, default_device())
    images = generate(
        model.pipeline(), canvas_grid(), args.out, config, {"fingerprint": model.fingerprint}
    )
    scores = {judge: score(images, [], [judge]) for judge in LEAST}
    if not processes().is_main_process:
        return
    command = "python scripts/canvas/gate.py"
    for option, value in vars(args).items():
        if option != "out" and value != parser.get_default(option):
            command += f" --{option} {value}"
    told = card(args.model, scores, config, len(images.rows), args.trained, command)
    (SHIPPED[args.model] / "README.md").write_text(told, encoding="utf-8")
    for judge, judged in scores.items():
        print(judge, {s.name: s.text() for s in judged})
    if any(s.value < LEAST[judge] for judge, judged in scores.items() for s in _accuracies(judged)):
        sys.exit("the gate is shut: train longer")


if __name__ == "__main__":
    main()
