"""One erasure at the full size of Stable Diffusion, on random weights: what each stage takes in
time and memory.

  python scripts/bench/full_size.py             SD 1.x, on whatever is there; a few minutes on a CPU
  python scripts/bench/full_size.py --family sdxl --scope xattn --checkpointing

Random weights of the real architecture go through the real path: a single fp16 file in (SD 3: a
folder), saliency, mask, one training step, delta, the same out. It proves sizes, not quality:
nothing is erased from noise. Each stage prints its seconds and the peak of the process so far.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from erase.delta import ErasedDelta
from erase.latents.latent_set import Given, LatentSet
from erase.methods import get_method
from erase.methods.salun import SalUnHalfConfig
from erase.models import DiffusionModel, load_model
from erase.models.pipelines import modules
from erase.objectives.remap import Remap
from erase.parallel.processes import default_device
from erase.prompts.concepts import ConceptSpec
from erase.scripts.bench.measuring import host_peak, peak
from erase.scripts.bench.plain import plain_parser
from erase.scripts.bench.published import MODELS, wide_vae
from erase.task import Task
from erase.training.config import MaskConfig, TrainConfig
from erase.training.saliency import Objective, choose_mask

CONCEPT = ConceptSpec("a heart", "a star", retain=("a photo of a house",))
GB = 1e9


class Stages:
    """Seconds and peak memory of each stage."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Any:
        """Time the block in seconds; its row has the peaks of the process so far, in GB."""
        started = time.monotonic()
        yield
        row = {
            "stage": name,
            "seconds": round(time.monotonic() - started, 1),
            "peak_host_gb": round(host_peak() / GB, 2),
        }
        if torch.cuda.is_available():
            row["peak_gpu_gb"] = round(peak("cuda") / GB, 2)
        self.rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def random_pipeline(family: str) -> Any:
    """The real architecture with random fp16 weights; SD 3 (medium) without its T5, as many run it,
    klein with a narrow language model."""
    from erase.models.single_file.architectures import shipped

    torch.manual_seed(0)
    if family in (made := {"sd3": sd3_pipeline, "klein": klein_pipeline}):
        return made[family]()
    architecture = shipped(family, "v_prediction" if family == "sd2" else "epsilon")
    return architecture.pipeline(
        {name: filled(module) for name, module in architecture.modules().items()}
    )


def sd3_pipeline() -> Any:
    """Stable Diffusion 3 medium, sizes as in its configuration on the hub."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from erase.models.single_file.architectures import shipped

    clips = shipped("sdxl", "epsilon")
    with init_empty_weights():
        transformer = SD3Transformer2DModel(
            sample_size=128,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=192,
        )
        vae = wide_vae(sample_size=1024, scaling_factor=1.5305, shift_factor=0.0609)
        texts = [
            CLIPTextModelWithProjection(
                CLIPTextConfig(**{**clips.configs[name], "projection_dim": width})
            )
            for name, width in (("text_encoder", 768), ("text_encoder_2", 1280))
        ]
    tokenizers = clips.tokenizers["tokenizer"], clips.tokenizers["tokenizer_2"]
    parts = [filled(part) for part in (transformer, vae, *texts)]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(
        parts[0], scheduler, parts[1], parts[2], tokenizers[0], parts[3], tokenizers[1], None, None
    )


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
)


def klein_pipeline() -> Any:
    """FLUX.2 klein 4B, but for its Qwen3: the layers and the width that the denoiser reads (28 and
    2,560) at a hundredth of the weights."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

    letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=letters, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=2560,
        intermediate_size=64,
        num_hidden_layers=28,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
    )
    with init_empty_weights():
        encoder, vae = Qwen3ForCausalLM(config), AutoencoderKLFlux2()
    transformer = MODELS["klein-4b"]().network()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    parts = filled(vae), filled(encoder), tokenizer, filled(transformer)
    return Flux2KleinPipeline(scheduler, *parts)


def filled(module: Any) -> Any:
    """Random fp16 values for parameters on the meta device; the gains of norms near one."""
    for name, meta in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = torch.randn(meta.shape, dtype=torch.float16) * 0.02 + (
            1.0 if "norm" in name and leaf == "weight" else 0.0
        )
        setattr(module.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))
    return module


def save(pipeline: Any, path: Path) -> Path:
    """As a single file where the family has that, else as a folder."""
    from erase.models.single_file import write_single_file

    for part in modules(pipeline).values():
        torch.nn.Module.half(part)
    if hasattr(pipeline, "unet"):
        return write_single_file(pipeline, path.with_suffix(".safetensors"))
    pipeline.save_pretrained(path)
    return path


def random_latents(model: DiffusionModel, n: int, size: int | None) -> Given:
    """Noise in the place of images, for `n` forget and `n` retain rows."""
    side = (size or model.image_size) * model.latent_shape[1] // model.image_size
    pairs, shape = CONCEPT.pairs()[:1] * n, (n, model.latent_shape[0], side, side)
    prompts, anchors = zip(*pairs, strict=True)
    forget = LatentSet(torch.randn(shape), None, prompts, anchors)
    return Given(forget, LatentSet(torch.randn(shape), None, CONCEPT.retain * n))


def measure(args: argparse.Namespace, folder: Path, base: Path) -> list[dict[str, Any]]:
    """The erasure, stage by stage."""
    stage = Stages()
    train = TrainConfig(
        steps=1,
        batch_size=args.batch,
        gradient_checkpointing=args.checkpointing,
        mixed_precision=args.precision,
    )
    mask = MaskConfig(
        rule=args.rule, density=args.density, batch_size=args.batch, batches=args.batches
    )
    config = SalUnHalfConfig(scope=args.scope, mask=mask, train=train)
    with stage("load"):
        model = load_model(base, default_device())
    task = Task(model, [CONCEPT], random_latents(model, args.batch, args.size), 0, folder)
    remap = Remap(task, config)
    with stage(f"statistics and mask, {args.rule}"):
        salient = choose_mask(task, config, Objective(remap.loss, remap.batches))
        assert salient is not None
        salient.save(folder / "mask.safetensors")
    config = replace(config, mask=MaskConfig(file=str(folder / "mask.safetensors")))
    with stage("one training step"):
        edit = get_method("salun-half").edit(task, config)
    with stage("delta"):
        base_values = {name: param.data for name, param in task.weights(args.scope).items()}
        delta = ErasedDelta.between(
            base_values, edit.values, {"base_fingerprint": model.fingerprint}
        )
        delta.save(folder / "delta.safetensors")
    del edit
    with stage("apply and export"):
        save(delta.apply(model).pipeline(), folder / "erased")
    assert 0 < delta.count <= salient.count()
    sizes = {
        path.name: round(path.stat().st_size / GB, 3)
        for path in sorted(folder.glob("*.safetensors"))
    }
    print(f"{salient.size:,} weights in scope, {delta.count:,} changed; files in GB: {sizes}")
    return stage.rows


def main() -> None:
    """Make the checkpoint in a process of its own, so that the peak is the erasure's alone, then
    measure."""
    parser = plain_parser(__doc__)
    parser.add_argument("--family", default="sd1", choices=["sd1", "sd2", "sdxl", "sd3", "klein"])
    parser.add_argument("--scope", default="full", help="as of erase-concept")
    parser.add_argument("--rule", default="benefit", help="of the mask, as of erase-concept")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument(
        "--batches", type=int, default=1, help="that the statistics look at; the forget rule: one"
    )
    parser.add_argument(
        "--batch", type=int, default=1, help="forget rows, and retain rows, of a step"
    )
    parser.add_argument(
        "--size",
        type=int,
        help="pixels per side of the training images; the model's own by default",
    )
    parser.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument(
        "--checkpointing", action="store_true", help="recompute activations in the backward pass"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the files go (about 10 GB for SD 1.x); a temporary one by default",
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        save(random_pipeline(args.family), args.make)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [sys.executable, __file__, "--family", args.family, "--make", str(folder / "base")],
            check=True,
        )
        base = next(
            path for path in (folder / "base.safetensors", folder / "base") if path.exists()
        )
        rows = measure(args, folder, base)
    if args.json:
        args.json.write_text(
            json.dumps(
                {"settings": {k: str(v) for k, v in vars(args).items()}, "stages": rows}, indent=1
            ),
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
