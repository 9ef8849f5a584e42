"""A SalUn training step: ours against what the public code does in its place, and against the
machine's own limit.

  python scripts/bench/train.py --precision bf16
      canvas and a UNet of 92 M weights, on a CPU: some minutes
  python scripts/bench/train.py --models canvas --variants salun-half --grow
  python scripts/bench/train.py --models sd1 --device cuda --precision bf16 --checkpointing \\
      --accumulation 2 --offload --optimizer AdamW8bit
  python scripts/bench/train.py --models sd1 --device cuda --precision bf16 --checkpointing \\
      --offload --scope xattn

`naive` is the step of the public code: VAE and text encoder in the loop, one pass of each for
forget, anchor and retain, the anchor with its graph and then detached, gradients of all weights, a
dense int64 mask moved to the device and multiplied into each, Adam over the scope's weights,
float32. `naive-checkpointed` recomputes activations besides, as that code's SD 1.x settings have it
(use_checkpoint). `ours` is `fit` with the same rows: cached latents and embeddings, forget and
retain in one pass, the teacher without a graph, an optimizer over the masked weights alone.
`salun-paper` has the same equations as the naive step; `salun-half` adds the frozen teacher's pass
over the retain rows; `trajectory` is `salun-half` on fixed points (`latents.trajectory`), whose
targets are computed once, before the steps that are timed. Each runs in a process of its own.
Memory is the process's peak beyond the loaded model (on a GPU: all that is allocated). The floor is
the forward passes' worth of multiplications that the variant needs per row (3 forget, 1 anchor, 3
retain; `salun-half` 1 more, `trajectory` 1 less) at the matrix-multiplication rate measured in the
same run; share is floor / seconds.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from erase.latents.latent_set import Given, LatentSet
from erase.mask import SaliencyMask
from erase.methods import get_method
from erase.models import DiffusionModel, load_model, wrap
from erase.models.scopes import select
from erase.objectives.remap import Remap
from erase.prompts.concepts import ConceptSpec
from erase.scripts.bench.measuring import (
    begin,
    in_own_process,
    new_peak,
    start_peak,
    wait,
    write_rows,
)
from erase.scripts.bench.plain import plain_parser
from erase.task import Task
from erase.training.loop import fit
from erase.training.running import checkpointed, running

FORGET, ANCHOR, RETAIN = "a photo of a heart", "a photo of a mushroom", "a photo of a house"
CONCEPT = ConceptSpec("heart", "mushroom", retain=(RETAIN,))
MODELS = ("canvas", "mid", "sd1", "sdxl")
PASSES = {"naive": 7, "naive-checkpointed": 9, "salun-paper": 7, "salun-half": 8, "trajectory": 6}
"""variant -> forward passes' worth of arithmetic per row and step; a backward pass counts twice, or
three times where it recomputes"""
GROWTH = [
    ("batch", [2, 4, 8, 16]),
    ("density", [0.01, 0.1, 0.5, 1.0]),
    ("scope", ["full", "xattn", "xattn_kv"]),
]


def build(name: str, device: str) -> DiffusionModel:
    """canvas; mid: 92 M weights at 256 pixels; sd1, sdxl: the real architectures, random weights at
    512 and 1024 pixels."""
    if name == "canvas":
        return load_model("canvas", device)
    from erase.models.single_file.architectures import shipped
    from erase.scripts.bench.full_size import filled

    torch.manual_seed(0)
    architecture = shipped("sdxl" if name == "sdxl" else "sd1", "epsilon")
    if name == "mid":
        architecture.configs["unet"] |= {
            "block_out_channels": [128, 256, 384, 384],
            "sample_size": 32,
            "cross_attention_dim": 768,
        }
    pipeline = architecture.pipeline(
        {part: filled(module).float() for part, module in architecture.modules().items()}
    )
    return wrap(pipeline.to(device), name)


def naive_steps(
    model: DiffusionModel,
    mask: SaliencyMask,
    rows: int,
    steps: int,
    scope: str,
    checkpointing: bool,
) -> list[float]:
    """The public code's step; seconds of each."""
    device, pipe = model.device, model.pipeline()
    params = select(model.parameters(), "full")
    for param in params.values():
        # all of them, whatever the scope: there it is only the optimizer's
        param.requires_grad_(True)
    dense = {name: mask[name].long() for name in params}
    optimizer = torch.optim.Adam(select(params, scope).values(), lr=1e-5)
    images = torch.rand(rows, 3, model.image_size, model.image_size) * 2 - 1
    seconds = []
    with checkpointed(pipe.unet, checkpointing):
        for _ in range(steps):
            started = time.perf_counter()
            texts = [model.encode([prompt] * rows) for prompt in (FORGET, ANCHOR, RETAIN)]
            with torch.no_grad():
                latents = [
                    pipe.vae.encode(images.to(device)).latent_dist.sample()
                    * pipe.vae.config.scaling_factor
                    for _ in range(3)
                ]
            t = torch.randint(model.timesteps, (rows,), device=device)
            noise = torch.randn_like(latents[0])
            forget, anchor, retain = (model.add_noise(x, noise, t) for x in latents)
            forgot = model.predict(forget, t, texts[0])
            target = model.predict(anchor, t, texts[1]).detach()
            retained = model.predict(retain, t, texts[2])
            loss = (forgot - target).square().mean() + 0.1 * (retained - noise).square().mean()
            optimizer.zero_grad()
            loss.backward()
            for name, param in params.items():
                if param.grad is not None:
                    param.grad *= dense[name].to(device)
            optimizer.step()
            seconds.append(_lap(started, device))
    return seconds


def our_steps(
    model: DiffusionModel,
    mask: SaliencyMask,
    rows: int,
    steps: int,
    preset: str,
    args: argparse.Namespace,
) -> list[float]:
    """`fit` on cached latents; seconds of each step."""
    points, latents = preset == "trajectory", torch.randn(rows, *model.latent_shape)
    fixed = (
        {"noise": torch.randn_like(latents), "t": torch.randint(model.timesteps, (rows,))}
        if points
        else {}
    )
    forget = LatentSet(latents, None, (FORGET,) * rows, (ANCHOR,) * rows, **fixed)
    retain = LatentSet(latents, None, (RETAIN,) * rows, **fixed)
    config = get_method("salun-half" if points else preset).config
    train = replace(
        config.train,
        steps=steps,
        batch_size=rows,
        mixed_precision=args.precision,
        accumulation=args.accumulation,
        optimizer=args.optimizer,
        gradient_checkpointing=args.checkpointing,
        selective_recompute=args.selective_recompute,
        attention=args.attention,
        channels_last=args.channels_last,
        compile=args.compile,
        offload=args.offload,
    )
    config = replace(config, train=train, scope=args.scope)
    task = Task(model, [CONCEPT], Given(forget, retain))
    remap = Remap(task, config)
    seconds, laps = [], [time.perf_counter()]

    def batches(step: int) -> Any:
        """The rows of one step; notes the seconds since it was asked for those before."""
        seconds.append(_lap(laps[-1], model.device))
        laps.append(time.perf_counter())
        return remap.batches(step)

    params = task.weights(args.scope)
    with running(model, params, train) as active:
        fit(params, remap.loss, batches, config, mask, active=active)
    seconds.append(_lap(laps[-1], model.device))
    return seconds[1:]


def _lap(started: float, device: torch.device) -> float:
    wait(device)
    return time.perf_counter() - started


def matmul_rate(device: str, precision: str) -> float:
    """Multiply-adds times two per second of a large matrix product, the best of several."""
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        best = min(best, _lap(started, a.device))
    return 2 * n**3 / best


def measure(name: str, variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the quickest step, peak memory and the floor of one variant."""
    torch.manual_seed(0)
    model = build(name, args.device)
    naive = variant.startswith("naive")
    params = select(model.parameters(), "full" if naive else args.scope)
    provenance = {"base_fingerprint": model.fingerprint}
    mask = SaliencyMask.random(params, args.density, 0, provenance)
    held = start_peak(args.device)
    if naive:
        seconds = naive_steps(
            model,
            mask,
            args.batch,
            args.steps,
            args.scope,
            checkpointing=variant == "naive-checkpointed",
        )
    else:
        seconds = our_steps(model, mask, args.batch, args.steps, variant, args)
    extra = (new_peak(args.device) - (0 if args.device == "cuda" else held)) / 1e9
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        x = torch.randn(1, *model.latent_shape, device=model.device)
        model.predict(x, torch.tensor([500], device=model.device), model.encode([FORGET]))
    floor = (
        PASSES[variant]
        * args.batch
        * flops.get_total_flops()
        / matmul_rate(args.device, "no" if naive else args.precision)
    )
    return {
        "model": name,
        "weights": sum(p.numel() for p in params.values()),
        "variant": variant,
        "batch": args.batch,
        "density": args.density,
        "scope": args.scope,
        "seconds": min(seconds),
        "extra_gb": extra,
        "floor_seconds": floor,
    }


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A table of all variants of each model."""
    rows = []
    print(
        f"{'model':8}{'weights':>13}  {'variant':20}{'s/step':>9}{'extra GB':>10}{'floor s':>9}"
        f"{'share':>7}{'x naive speed':>15}{'x naive memory':>16}"
    )
    for name in args.models:
        base = None
        for variant in args.variants:
            row = in_own_process(__file__, name, variant, args)
            if not row:
                continue
            rows.append(row)
            base = base or row  # the naive step, unless it was left out
            gain, memory, share = (
                base["seconds"] / row["seconds"],
                row["extra_gb"] / base["extra_gb"],
                row["floor_seconds"] / row["seconds"],
            )
            print(
                f"{name:8}{row['weights']:>13,}  {variant:20}{row['seconds']:>9.2f}"
                f"{row['extra_gb']:>10.2f}{row['floor_seconds']:>9.2f}{share:>7.0%}{gain:>15.2f}"
                f"{memory:>16.2f}",
                flush=True,
            )
    return rows


def grow(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds and memory of one variant against batch, density and scope, each with the others
    as given."""
    rows = []
    for what, values in GROWTH:
        print(f"{what:>10}{'s/step':>9}{'extra GB':>10}")
        for value in values:
            row = in_own_process(
                __file__,
                args.models[0],
                args.variants[-1],
                argparse.Namespace(**vars(args) | {what: value}),
            )
            if row:
                rows.append(row)
                print(f"{value:>10}{row['seconds']:>9.2f}{row['extra_gb']:>10.2f}", flush=True)
    return rows


def main() -> None:
    """Each model and variant in its own process; a table, and JSON where asked for."""
    parser = plain_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["canvas", "mid"])
    parser.add_argument("--variants", nargs="+", choices=list(PASSES), default=list(PASSES))
    parser.add_argument(
        "--grow",
        action="store_true",
        help="the last variant of the first model against batch, density and scope",
    )
    parser.add_argument(
        "--batch", type=int, default=8, help="forget rows, and retain rows, of a step"
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--scope", default="full", help="as of erase-concept; full and xattn are the public code's"
    )
    ours = parser.add_argument_group("ours (the naive step is float32, its mask over all weights)")
    ours.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"])
    ours.add_argument("--density", type=float, default=0.5)
    ours.add_argument(
        "--accumulation", type=int, default=1, help="parts that a batch is split into"
    )
    ours.add_argument("--optimizer", default="Adam")
    ours.add_argument("--attention", default="auto")
    ours.add_argument(
        "--checkpointing", action="store_true", help="recompute activations in the backward pass"
    )
    ours.add_argument(
        "--selective-recompute",
        action="store_true",
        help="of these, recompute the cheap ones alone",
    )
    ours.add_argument("--channels-last", action="store_true")
    ours.add_argument("--compile", action="store_true")
    ours.add_argument(
        "--offload", action="store_true", help="what the steps do not use waits on the CPU"
    )
    args = begin(parser, measure)
    write_rows(grow(args) if args.grow else compare(args), args)


if __name__ == "__main__":
    main()
