"""Measure the embedded checkpoint against its gate, and write its model card.

  python scripts/canvas/gate.py                           the whole grid, 5 seeds each: 2,400 images
  torchrun --nproc_per_node 2 scripts/canvas/gate.py               the same, shared by two processes

The gate: the classifier reads object, style and colour right in at least 97 % of the images each,
CLIP in at least 95 %.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

from erase.eval.generate import GenerateConfig, generate
from erase.eval.run import score
from erase.eval.scores import Score
from erase.models import CANVAS, load_model
from erase.parallel.processes import default_device, processes
from erase.prompts.canvas import vocabulary
from erase.prompts.prompt_sets import ANSWER_SEEDS, canvas_grid

LEAST = {"classifier": 97.0, "clip": 95.0}
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion, synthetic, unlearning]
---

# canvas: the embedded checkpoint

A small Stable Diffusion that draws one of {objects} objects in one of {styles} styles and \
{colours} colours at 64 x 64 pixels:
CLIP tokenizer and text model, AutoencoderKL (factor 4, 4 channels), \
UNet2DConditionModel (16 x 16 latents, cross-attention at the two
lower levels), DDIM schedule of SD 1.x, epsilon prediction. \
It exists to test the erasure of concepts; it can draw nothing else.

```python
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained("erase/models/canvas")
pipe("A red heart image in Watercolor style.", num_inference_steps=20, \
guidance_scale=5.0).images[0].save("heart.png")
```

## How it was made

Trained from random weights on images drawn by `eval/canvas/render.py` and captions of \
`prompts/data/canvas.yaml`, by
`python scripts/canvas/train_model.py` (VAE {vae_steps} steps of 32 renders; \
UNet and text encoder {unet_steps} steps of 64, averaged with decay 0.999) on
two CPU cores. No image, caption or weight of anybody else is in it. Stored as float16. \
Licence: Apache-2.0.

During training the renderer was changed once, between the two phases of the VAE and the UNet \
(larger objects, quieter mosaic tiles): a rerun gives a
model of the same kind, not the same bits.

## Measured quality

{images:,} images: every object x style x colour, seeds {seeds}; {sampler}. `{command}`

| judge | object % | style % | colour % |
|---|---|---|---|
{rows}

## Files

| file | bytes | sha256 |
|---|---|---|
{files}
"""


def card(
    scores: dict[str, list[Score]], config: GenerateConfig, images: int, unet_steps: int
) -> str:
    """The model card with these figures."""
    vocab = vocabulary()
    weights = sorted(CANVAS.glob("*/*.safetensors"))
    files = [(path, hashlib.sha256(path.read_bytes()).hexdigest()) for path in weights]
    return CARD.format(
        objects=len(vocab.names("object")),
        styles=len(vocab.names("style")),
        colours=len(vocab.names("colour")),
        vae_steps="2,300",
        unet_steps=f"{unet_steps:,}",
        images=images,
        seeds=", ".join(map(str, ANSWER_SEEDS)),
        sampler=(
            f"{config.scheduler}, {config.steps} steps, guidance {config.guidance:g}, autocast "
            f"{config.mixed_precision}"
        ),
        command="python scripts/canvas/gate.py",
        rows="\n".join(_row(judge, judged) for judge, judged in scores.items()),
        files="\n".join(
            f"| {path.relative_to(CANVAS)} | {path.stat().st_size:,} | `{digest}` |"
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
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gate"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--precision", default="bf16", help="no, bf16 or fp16")
    parser.add_argument("--guidance", type=float, default=GenerateConfig.guidance)
    parser.add_argument(
        "--unet_steps",
        type=int,
        default=5500,
        help="what train_model.py was run with, for the card",
    )
    args = parser.parse_args()
    config = GenerateConfig(
        steps=args.steps, guidance=args.guidance, mixed_precision=args.precision
    )
    model = load_model("canvas", default_device())
    images = generate(
        model.pipeline(), canvas_grid(), args.out, config, {"fingerprint": model.fingerprint}
    )
    scores = {judge: score(images, [], [judge]) for judge in LEAST}
    if not processes().is_main_process:
        return
    (CANVAS / "README.md").write_text(
        card(scores, config, len(images.rows), args.unet_steps), encoding="utf-8"
    )
    for judge, judged in scores.items():
        print(judge, {s.name: s.text() for s in judged})
    if any(s.value < LEAST[judge] for judge, judged in scores.items() for s in _accuracies(judged)):
        sys.exit("the gate is shut: train longer")


if __name__ == "__main__":
    main()
