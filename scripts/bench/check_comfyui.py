"""Whether ComfyUI's own loader reads what `erase-export` wrote as diffusers reads it: one
prediction of the denoiser, on the CPU.

  python scripts/bench/check_comfyui.py --comfyui COMFYUI --folder MODEL --file MODEL.safetensors
      a diffusers folder and the single file of the same erasure
  python scripts/bench/check_comfyui.py --comfyui COMFYUI --folder MODEL --lora LORA.safetensors
      a LoRA over a folder, ComfyUI's way and diffusers'
  python scripts/bench/check_comfyui.py --comfyui COMFYUI --random sd1 sd3 flux1 qwen-image
      files and LoRAs of random weights in the published widths; all but sd1 with few blocks

COMFYUI is a checkout of ComfyUI, which runs in this process; it wants einops, torchsde and
sentencepiece beside this toolkit. Not part of the tests. docs/formats.md has what was found.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erase.export.kohya import kohya_entries, lora_header
from erase.export.lora import LoRA
from erase.models.patches import pack, positions, unpack
from erase.models.pipelines import denoiser
from erase.models.single_file import write_single_file
from erase.scripts.bench.full_size import filled, random_pipeline
from erase.scripts.bench.plain import plain_parser

BOUND = 1e-4
"""relative error up to which two programs agree, in float32"""
TOKENS, SIDE = 77, 16


@dataclass(frozen=True)
class Given:
    """What both programs are given."""

    latents: Tensor
    text: Tensor
    pooled: Tensor
    time: float = 500.0


@dataclass(frozen=True)
class Family:
    """How the two programs call the denoiser of a pipeline's class, and what it is given."""

    widths: Callable[[Any], tuple[int, int, int]]
    """of a denoiser: channels of a latent, of a text state, of the pooled state"""
    diffusers: Callable[[Any, Given], Tensor]
    comfyui: Callable[[Any, Given], Tensor]
    """of what its loader makes, a `BaseModel`"""


def _unet(unet: Any, given: Given) -> Tensor:
    found: Tensor = unet(given.latents, given.time, given.text).sample
    return found


def _unet_xl(unet: Any, given: Given) -> Tensor:
    size = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    beside = {"text_embeds": given.pooled, "time_ids": size}
    found: Tensor = unet(given.latents, given.time, given.text, added_cond_kwargs=beside).sample
    return found


def _sd3(transformer: Any, given: Given) -> Tensor:
    time = torch.tensor([given.time])
    found: Tensor = transformer(given.latents, given.text, given.pooled, time).sample
    return found


def _flux(transformer: Any, given: Given) -> Tensor:
    height, width = given.latents.shape[-2:]
    guided = transformer.config.guidance_embeds
    found = transformer(
        pack(given.latents),
        given.text,
        given.pooled,
        torch.tensor([given.time / 1000]),
        positions(height, width),
        given.text.new_zeros(given.text.shape[1], 3),
        torch.tensor([3.5]) if guided else None,
    ).sample
    return unpack(found, height, width)


def _qwen(transformer: Any, given: Given) -> Tensor:
    height, width = given.latents.shape[-2:]
    found = transformer(
        pack(given.latents),
        given.text,
        torch.ones(given.text.shape[:2], dtype=torch.bool),
        torch.tensor([given.time / 1000]),
        [[(1, height // 2, width // 2)]],
    ).sample
    return unpack(found, height, width)


def _theirs(scale: float = 1.0, **also: Any) -> Callable[[Any, Given], Tensor]:
    """ComfyUI's call of its denoiser, time times `scale`."""

    def call(model: Any, given: Given) -> Tensor:
        time = torch.tensor([given.time * scale])
        more = {name: make(model, given) for name, make in also.items()}
        found: Tensor = model.diffusion_model(given.latents, time, context=given.text, **more)
        return found

    return call


def _sizes(model: Any, given: Given) -> Tensor:
    found: Tensor = model.encode_adm(pooled_output=given.pooled, width=64, height=64)
    return found


FAMILIES = {
    "StableDiffusionPipeline": Family(
        lambda unet: (4, unet.config.cross_attention_dim, 1), _unet, _theirs()
    ),
    "StableDiffusionXLPipeline": Family(
        lambda unet: (4, unet.config.cross_attention_dim, 1280), _unet_xl, _theirs(y=_sizes)
    ),
    "StableDiffusion3Pipeline": Family(
        lambda part: (16, part.config.joint_attention_dim, part.config.pooled_projection_dim),
        _sd3,
        _theirs(y=lambda model, given: given.pooled),
    ),
    "FluxPipeline": Family(
        lambda part: (16, part.config.joint_attention_dim, part.config.pooled_projection_dim),
        _flux,
        _theirs(
            0.001,
            y=lambda model, given: given.pooled,
            guidance=lambda model, given: torch.tensor([3.5]),
        ),
    ),
    "QwenImagePipeline": Family(
        lambda part: (16, part.config.joint_attention_dim, 1),
        _qwen,
        lambda model, given: _theirs(0.001)(
            model, replace(given, latents=given.latents[:, :, None])
        )[:, :, 0],
    ),
}
"""pipeline class -> its calls"""


# ---- random weights ----


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)


def _flux_pipeline() -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    return FluxPipeline(None, _vae(), None, None, None, None, filled(transformer))


def _qwen_pipeline() -> Any:
    from diffusers import (
        AutoencoderKLQwenImage,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    vae, transformer = AutoencoderKLQwenImage(base_dim=8), QwenImageTransformer2DModel(num_layers=1)
    return QwenImagePipeline(None, vae, None, None, filled(transformer))


def _sd3_pipeline() -> Any:
    """Stable Diffusion 3.5 medium's kind of blocks; ComfyUI has one for each 64 of the width."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=SIDE,
        num_layers=3,
        num_attention_heads=3,
        caption_projection_dim=192,
        pos_embed_max_size=2 * SIDE,
        qk_norm="rms_norm",
        dual_attention_layers=(0, 1),
    )
    return StableDiffusion3Pipeline(
        filled(transformer), None, _vae(), None, None, None, None, None, None
    )


RANDOM: dict[str, Callable[[], Any]] = {
    "sd1": lambda: random_pipeline("sd1"),
    "sd2": lambda: random_pipeline("sd2"),
    "sdxl": lambda: random_pipeline("sdxl"),
    "sd3": _sd3_pipeline,
    "flux1": _flux_pipeline,
    "qwen-image": _qwen_pipeline,
}


def random_lora(pipeline: Any, rank: int = 4) -> LoRA:
    """Factors of every attention projection of the denoiser, random."""
    component = "unet" if hasattr(pipeline, "unet") else "transformer"
    layers = {
        f"{component}.{name}": module.weight
        for name, module in denoiser(pipeline).named_modules()
        if isinstance(module, torch.nn.Linear) and re.search(r"\.(to|add)_", name)
    }
    down = {name: torch.randn(rank, weight.shape[1]) * 0.05 for name, weight in layers.items()}
    up = {name: torch.randn(weight.shape[0], rank) * 0.05 for name, weight in layers.items()}
    named = kohya_entries(pipeline, down), lora_header(pipeline, "random", [rank])
    return LoRA(down, up, [], {}, {}, *named)


# ---- the two programs ----


def start(comfyui: Path) -> Any:
    """ComfyUI's modules, for the CPU; its version is printed."""
    sys.path.insert(0, str(comfyui))
    importlib.import_module("comfy.cli_args").args.cpu = True
    comfy = importlib.import_module("comfy.sd")
    print("ComfyUI", importlib.import_module("comfyui_version").__version__, flush=True)
    return comfy


def compare(comfy: Any, pipeline: Any, file: Path, lora: Path | None = None) -> tuple[float, str]:
    """||ComfyUI's prediction - diffusers'|| / ||diffusers'||, and what a LoRA does there."""
    family = FAMILIES[type(pipeline).__name__]
    network = denoiser(pipeline).float().eval()
    channels, width, pooled = family.widths(network)
    torch.manual_seed(1)
    given = Given(
        torch.randn(1, channels, SIDE, SIDE), torch.randn(1, TOKENS, width), torch.randn(1, pooled)
    )
    patcher, told = comfy.load_diffusion_model(str(file), {"dtype": torch.float32}), ""
    with torch.no_grad():
        stock = family.diffusers(network, given)
        if lora:
            pipeline.load_lora_weights(str(lora))
            without, stock = stock, family.diffusers(network, given)
            pipeline.unload_lora_weights()
            weights = importlib.import_module("comfy.utils").load_torch_file(str(lora))
            patcher, _ = comfy.load_lora_for_models(patcher, None, weights, 1.0, 0.0)
            told = f"; it changes {len(patcher.patches)} weights, and the prediction by "
            told += f"{_distance(stock, without):.2g}"
        patcher.patch_model(device_to=torch.device("cpu"))
        theirs = family.comfyui(patcher.model, given)
    patcher.unpatch_model()
    return _distance(theirs, stock), told


def compare_rest(comfy: Any, pipeline: Any, file: Path) -> dict[str, float]:
    """The same of a whole checkpoint's text states and decoded pixels."""
    _, clip, vae, _ = comfy.load_checkpoint_guess_config(str(file))
    prompt, latents = "a red heart, in a photo", torch.randn(1, 4, SIDE, SIDE)
    pipeline.to(torch.float32)
    with torch.no_grad():
        own = pipeline.encode_prompt(prompt, torch.device("cpu"), 1, False)
        theirs = clip.encode_from_tokens(clip.tokenize(prompt))
        pixels = pipeline.vae.decode(latents).sample.permute(0, 2, 3, 1) / 2 + 0.5
        drawn = vae.decode(latents)
    return {
        "text states": _distance(theirs, own[0]),
        "pixels": _distance(drawn, pixels.clamp(0, 1)),
    }


def _distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def main() -> int:
    """Compare what is asked for; exit code 1 if something differs."""
    parser = plain_parser(__doc__)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--folder", help="of diffusers, whose denoiser is compared")
    parser.add_argument("--file", type=Path, help="the same as a single file; default: made of it")
    parser.add_argument("--lora", type=Path, help="to be loaded over both")
    parser.add_argument("--random", nargs="+", choices=RANDOM, default=[])
    options = parser.parse_args()
    comfy = start(options.comfyui)
    logging.getLogger().setLevel(logging.WARNING)
    wrong = 0

    def tell(name: str, found: tuple[float, str]) -> None:
        nonlocal wrong
        error, told = found
        wrong += not error < BOUND
        print(f"{name}: relative error {error:.1e}{told}", flush=True)

    with tempfile.TemporaryDirectory() as kept:
        if options.folder:
            from diffusers import DiffusionPipeline

            pipeline = DiffusionPipeline.from_pretrained(options.folder)
            file = options.file or write_single_file(pipeline, Path(kept) / "file.safetensors")
            tell(options.folder, compare(comfy, pipeline, file, options.lora))
        for name in options.random:
            torch.manual_seed(0)
            pipeline = RANDOM[name]()
            file = write_single_file(pipeline, Path(kept) / f"{name}.safetensors", torch.float32)
            tell(name, compare(comfy, pipeline, file))
            if hasattr(pipeline, "unet"):
                for part, error in compare_rest(comfy, pipeline, file).items():
                    tell(f"{name}, {part}", (error, ""))
            found = random_lora(pipeline)
            layouts = ["kohya"] * bool(found.kohya)
            if hasattr(pipeline, "transformer"):  # ComfyUI has no such names for a UNet's attention
                layouts.append("diffusers")
            for layout in layouts:
                lora = Path(kept) / f"{name}-{layout}.safetensors"
                found.save(lora, layout=layout)
                tell(f"{name}, LoRA, {layout}", compare(comfy, pipeline, file, lora))
            file.unlink()
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
