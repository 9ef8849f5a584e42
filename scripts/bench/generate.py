"""Making images, for the evaluation and for training: ours against what the public code does, and
against the machine's own limit.

  python scripts/bench/generate.py
      canvas and a UNet of 92 M weights, on a CPU: some minutes
  python scripts/bench/generate.py --models sd1 sdxl --device cuda --precision bf16 \\
      --json generate.json

`naive` is how the public code makes images: one prompt at a time in float32, the prompt and the
empty one encoded for each image, both guidance branches in one pass, LMS with `--naive_steps` steps
(its published commands take 100, Stable Diffusion was released with 50), the VAE, a PNG written
before the next image. `images` is `erase.eval.generate` with its scheduler, steps and batches;
`latents` is what `erase_concept` trains on (`erase.latents.prepare`), which the naive way makes as
images. Each runs in a process of its own, after a warm-up. A forward is one row through the
denoiser; the floor is the multiplications of these rows, and of the VAE where it runs, at the
matrix-multiplication rate measured in the same run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import LMSDiscreteScheduler
from torch.utils.flop_counter import FlopCounterMode

from erase.eval.generate import GenerateConfig, generate
from erase.latents.config import LatentConfig
from erase.latents.prepare import prepare_latents
from erase.models import DiffusionModel
from erase.models.pipelines import decode, denoiser
from erase.prompts.canvas import canvas_concept
from erase.prompts.prompt_sets import PromptSet, canvas_grid
from erase.scripts.bench.measuring import begin, in_own_process, wait, write_rows
from erase.scripts.bench.plain import plain_parser
from erase.scripts.bench.train import MODELS, build, matmul_rate

VARIANTS = ("naive", "images", "latents")


def naive_images(model: DiffusionModel, prompts: PromptSet, steps: int, out: Path) -> None:
    """One image after the other, nothing shared between them."""
    pipe = model.pipeline()
    own, pipe.scheduler = pipe.scheduler, LMSDiscreteScheduler.from_config(pipe.scheduler.config)
    for row in prompts.rows:
        generator = torch.Generator().manual_seed(row.seed)
        pipe(row.prompt, num_inference_steps=steps, generator=generator).images[0].save(
            out / f"{row.case}.png"
        )
    pipe.scheduler = own


def run(
    model: DiffusionModel,
    variant: str,
    count: int,
    short: bool,
    args: argparse.Namespace,
    out: Path,
) -> None:
    """Make `count` images or latents; `short`: with one step each, to warm up."""
    rows = canvas_grid().rows  # words for any model
    prompts = PromptSet(
        "bench",
        tuple(
            replace(row, case=i) for i, row in enumerate((rows * (count // len(rows) + 1))[:count])
        ),
    )
    if variant == "naive":
        naive_images(model, prompts, 1 if short else args.naive_steps, out)
    elif variant == "images":
        config = GenerateConfig(batch_size=args.batch, mixed_precision=args.precision)
        generate(
            model.pipeline(),
            prompts,
            out / "images",
            replace(config, steps=1) if short else config,
            {},
        )
    else:
        half = LatentConfig(
            max(count // 2, 1),
            max(count - count // 2, 1),
            batch_size=args.batch,
            mixed_precision=args.precision,
        )
        prepare_latents(
            model,
            [canvas_concept("heart")],
            replace(half, steps=1) if short else half,
            seed=0,
            anchor_share=0.5,
        )


def measure(name: str, variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and forwards of one image, and the floor."""
    model = build(name, args.device)
    count = args.naive_images if variant == "naive" else args.images
    forwards: list[int] = []
    with tempfile.TemporaryDirectory() as warm, tempfile.TemporaryDirectory() as out:
        run(model, variant, min(count, 2), True, args, Path(warm))
        hook = denoiser(model.pipeline()).register_forward_pre_hook(
            lambda module, given: forwards.append(len(given[0]))
        )
        started = time.perf_counter()
        run(model, variant, count, False, args, Path(out))
        wait(args.device)
        seconds = (time.perf_counter() - started) / count
        hook.remove()
    denoising, decoding = flops(model)
    rate = matmul_rate(args.device, args.precision if variant != "naive" else "no")
    floor = (sum(forwards) / count * denoising + (0 if variant == "latents" else decoding)) / rate
    return {
        "model": name,
        "variant": variant,
        "seconds": seconds,
        "forwards": sum(forwards) / count,
        "floor_seconds": floor,
    }


@torch.no_grad()
def flops(model: DiffusionModel) -> tuple[int, int]:
    """Multiply-adds times two: of one row through the denoiser, of decoding one latent."""
    latent, counted = torch.randn(1, *model.latent_shape, device=model.device), []
    cond = model.encode(["a photo of a heart"])
    for work in (
        lambda: model.predict(latent, torch.tensor([500], device=model.device), cond),
        lambda: decode(model.pipeline(), latent, "no"),
    ):
        with FlopCounterMode(display=False) as counter:
            work()
        counted.append(counter.get_total_flops())
    return counted[0], counted[1]


def main() -> None:
    """Each model and variant in its own process; a table, and JSON where asked for."""
    parser = plain_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["canvas", "mid"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--images", type=int, default=8, help="images and latents that ours makes")
    parser.add_argument("--batch", type=int, default=8, help="at a time")
    parser.add_argument(
        "--precision",
        default="no",
        choices=["no", "bf16", "fp16"],
        help="of ours; the naive way is float32",
    )
    parser.add_argument("--naive_images", type=int, default=2)
    parser.add_argument("--naive_steps", type=int, default=50)
    args = begin(parser, measure)
    rows: list[dict[str, Any]] = []
    print(
        f"{'model':8}{'variant':10}{'s/image':>9}{'forwards':>10}{'x naive':>9}{'floor s':>9}"
        f"{'share of floor':>16}"
    )
    for name in args.models:
        base = None
        for variant in args.variants:
            row = in_own_process(__file__, name, variant, args)
            if not row:
                continue
            rows.append(row)
            base = base or row["seconds"]
            print(
                f"{name:8}{variant:10}{row['seconds']:>9.3f}{row['forwards']:>10.0f}"
                f"{base / row['seconds']:>9.1f}{row['floor_seconds']:>9.3f}"
                f"{row['floor_seconds'] / row['seconds']:>16.0%}",
                flush=True,
            )
    write_rows(rows, args)


if __name__ == "__main__":
    main()
