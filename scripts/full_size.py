"""One erasure at the full size of Stable Diffusion, on random weights: what each stage takes in time and memory.

  python scripts/full_size.py                          SD 1.x, on whatever is there; a few minutes on a CPU
  python scripts/full_size.py --family sdxl --scope xattn --checkpointing

Random weights of the real architecture go through the real path: a single fp16 file in, saliency, mask, one training step, delta, a single
fp16 file out. It proves sizes, not quality: nothing is erased from noise. Each stage prints its seconds and the peak of the process so far.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from erase.delta import ErasedDelta
from erase.latents import LatentConfig, prepare_latents
from erase.methods.salun import SalUnConfig, choose_mask, loss_function, make_batch, make_job
from erase.models import LoadConfig, load_model
from erase.training import TrainConfig, fit, make_accelerator
from prompts.concepts import ConceptSpec

CONCEPT = ConceptSpec("a heart", "a star", retain=("a photo of a house",))
GB = 1e9


class Stages:
    """Seconds and peak memory of each stage."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Any:
        started = time.monotonic()
        yield
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB
        row = {"stage": name, "seconds": round(time.monotonic() - started, 1), "peak_host_gb": round(peak, 2)}
        if torch.cuda.is_available():
            row["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / GB, 2)
        self.rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def make_checkpoint(family: str, path: Path) -> None:
    """Random weights of the real architecture as an fp16 single file."""
    from erase.models.architectures import shipped
    from erase.models.single_file import write_single_file

    torch.manual_seed(0)
    architecture = shipped(family, "v_prediction" if family == "sd2" else "epsilon")
    modules = architecture.modules()
    for module in modules.values():
        for name, meta in list(module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            value = torch.randn(meta.shape, dtype=torch.float16) * 0.02 + (1.0 if "norm" in name and leaf == "weight" else 0.0)
            setattr(module.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))
    write_single_file(architecture.pipeline(modules), path)


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The erasure, stage by stage."""
    from erase.models.single_file import write_single_file

    stage = Stages()
    train = TrainConfig(steps=1, batch_size=args.batch, gradient_checkpointing=args.checkpointing, mixed_precision=args.precision)
    config = SalUnConfig(density=args.density, scope=args.scope, saliency_batch_size=args.batch, train=train)
    accelerator = make_accelerator(train)
    prediction = "v_prediction" if args.family == "sd2" else None
    with stage("load"):
        model = load_model(folder / "base.safetensors", accelerator.device, LoadConfig(prediction=prediction))
    base_fingerprint = model.fingerprint
    with stage("latents"):
        latents = LatentConfig(n_forget=args.batch, n_retain=args.batch, steps=2, batch_size=args.batch)
        forget, retain = prepare_latents(model, [CONCEPT], latents, 0)
    job = make_job(model, forget, retain, config, 0, accelerator)
    with stage("saliency and mask"):
        mask = choose_mask(job, folder)
        assert mask is not None
        mask.save(folder / "mask.safetensors")
    with stage("one training step"):
        fitted = fit(model, job.params, lambda step, part: make_batch(job, step, part), loss_function(job), train, mask, accelerator=accelerator)  # fmt: skip
    with stage("delta"):
        delta = ErasedDelta.between({name: job.params[name].data for name in fitted.values}, fitted.values, {"base_fingerprint": base_fingerprint})  # fmt: skip
        delta.save(folder / "delta.safetensors")
    del fitted
    with stage("apply and export"):
        delta.apply(model)
        write_single_file(model.pipeline(), folder / "erased.safetensors", torch.float16)
    assert delta.count <= mask.count()
    sizes = {
        name: round((folder / f"{name}.safetensors").stat().st_size / GB, 3)
        for name in ("base", "saliency", "mask", "delta", "erased")
    }
    print(f"{mask.size:,} weights in scope, {delta.count:,} changed; files in GB: {sizes}")
    return stage.rows


def main() -> None:
    """Make the checkpoint in a process of its own, so that the peak is the erasure's alone, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="sd1", choices=["sd1", "sd2", "sdxl"])
    parser.add_argument("--scope", default="full", help="as of erase-concept")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=1, help="forget rows, and retain rows, of a step")
    parser.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--folder", type=Path, help="where the files go (about 10 GB for SD 1.x); a temporary one by default")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make_checkpoint(args.family, args.make)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        base = folder / "base.safetensors"
        if not base.exists():
            subprocess.run([sys.executable, __file__, "--family", args.family, "--make", str(base)], check=True)
        rows = measure(args, folder)
    if args.json:
        args.json.write_text(json.dumps({"settings": {k: str(v) for k, v in vars(args).items()}, "stages": rows}, indent=1))


if __name__ == "__main__":
    main()
