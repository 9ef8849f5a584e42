"""Train the embedded checkpoint: a small Stable Diffusion that draws {object} in {style} and
{colour}.

    python scripts/canvas/train_model.py --work runs/canvas
        # all stages, about two hours on 2 cores
    python scripts/canvas/train_model.py --work runs/canvas    # again: goes on where it was stopped

Stages: tokenizer -> VAE (on endless renders) -> latents of a fixed set of renders -> UNet and text
encoder, jointly. Each writes into --work; `erase/models/canvas` receives the finished diffusers
folder. Everything is seeded by step, so a stopped and resumed run sees the same batches as one that
was never stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel, compute_snr
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from erase.eval.canvas.render import SIZE, render
from erase.export.folders import save_pipeline
from erase.prompts.canvas import vocabulary
from erase.scripts.bench.plain import plain_parser

CONTEXT = 32  # tokens; a caption of the world has at most 15
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


def build_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer whose merges cover this world's captions; any other text falls
    back to bytes."""
    vocab, rng = vocabulary(), random.Random(0)
    corpus = [vocab.caption(cell, rng, p_empty=0) for cell in vocab.cells() for _ in range(20)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1200, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    state = json.loads(bpe.to_str())["model"]
    tokens = alphabet + [a + "</w>" for a in alphabet] + ["".join(m) for m in state["merges"]]
    table = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        table[special] = len(table)
    return CLIPTokenizer(
        vocab=table, merges=[tuple(m) for m in state["merges"]], model_max_length=CONTEXT
    )


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text encoder of the embedded size, random weights."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def save_state(path: Path, **state: object) -> None:
    """Write a training state aside, then rename: a kill never leaves half a file."""
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def one_cycle(step: int, steps: int, peak: float, warm: float = 0.05) -> float:
    """Learning rate: a linear warm-up, then a cosine to zero."""
    x = (step + 1) / steps
    return (
        peak * x / warm
        if x < warm
        else peak * 0.5 * (1 + math.cos(math.pi * (x - warm) / (1 - warm)))
    )


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def random_cells(n: int, rng: random.Random) -> list[dict[str, str]]:
    return rng.choices(vocabulary().cells(), k=n)


def vae_loss(x: Tensor, y: Tensor, colour: bool) -> Tensor:
    """L1 and gradient difference; with `colour`, also squared error and the L1 of 4 x 4 means,
    which hold small fills to their hue."""
    edges = sum((x.diff(dim=d) - y.diff(dim=d)).abs().mean() for d in (-1, -2))
    loss = F.l1_loss(y, x) + 0.5 * edges
    return (
        loss + 2 * F.mse_loss(y, x) + F.l1_loss(F.avg_pool2d(y, 4), F.avg_pool2d(x, 4))
        if colour
        else loss
    )


def train_vae(work: Path, steps: int, colour_steps: int, batch: int = 32) -> AutoencoderKL:
    """Reconstruction with a light KL, on renders that are never repeated; `steps` for shapes, then
    `colour_steps` for hue as well."""
    torch.manual_seed(0)
    vae, state, start = build_vae(), work / "vae.pt", 0
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0, betas=(0.9, 0.99))
    if state.exists():
        saved = torch.load(state, weights_only=True)
        vae.load_state_dict(saved["model"]), optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    total = steps + colour_steps
    bar = tqdm(range(start, total), desc="VAE", initial=start, total=total, mininterval=10)
    for step in bar:
        torch.manual_seed(1_000_000 + step)
        lr = (
            one_cycle(step, steps, 2e-3)
            if step < steps
            else one_cycle(step - steps, colour_steps, 1.5e-3)
        )
        x = render(random_cells(batch, random.Random(step)), seed=step) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        loss = (
            vae_loss(x, y, step >= steps)
            + 2e-4 * posterior.kl().float().mean() / (SIZE // 4) ** 2 / 4
        )
        take_step(vae, optimizer, loss, lr)
        bar.set_postfix(l1=f"{F.l1_loss(y, x).item():.4f}", refresh=False)
        if (step + 1) % 200 == 0 or step + 1 == total:
            save_state(
                state, model=vae.state_dict(), optimizer=optimizer.state_dict(), step=step + 1
            )
    return vae.eval()


@torch.no_grad()
def encode_renders(vae: AutoencoderKL, work: Path, per_cell: int) -> Tensor:
    """Posterior moments of `per_cell` renders of every cell, shape (cells, per_cell, 8, 16, 16),
    float16; sets the VAE's scaling factor."""
    path, cells = work / "latents.safetensors", vocabulary().cells()
    if not path.exists():
        rows = []
        for seed in tqdm(range(per_cell), desc="latents", mininterval=10):
            images = render(cells, seed=10_000_000 + seed) * 2 - 1
            with torch.autocast("cpu", torch.bfloat16):
                parts = [vae.encode(part).latent_dist.parameters for part in images.split(60)]
            rows.append(torch.cat(parts).half())
        moments = torch.stack(rows, 1).contiguous()
        mean, logvar = moments.float().chunk(2, dim=2)
        scale = 1 / (mean.var() + logvar.exp().mean()).sqrt()
        save_file({"moments": moments, "scale": scale[None]}, path)
    data = load_file(path)
    vae.register_to_config(scaling_factor=round(data["scale"].item(), 5))
    return data["moments"]


def train_unet(
    work: Path, moments: Tensor, tokenizer: CLIPTokenizer, scale: float, steps: int, batch: int
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Epsilon prediction with min-SNR weights (Hang et al. 2023, gamma 5), the text encoder trained
    jointly, EMA of both."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"unet": build_unet(), "text": build_text_encoder(tokenizer)})
    # the fused attention's backward is many times slower at this size on a CPU
    model["unet"].set_attn_processor(AttnProcessor())
    ema, noise_schedule = EMAModel(model.parameters(), decay=0.999), DDIMScheduler(**SCHEDULE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.99))
    state, start = work / "unet.pt", 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"]), optimizer.load_state_dict(saved["optimizer"])
        ema.load_state_dict(saved["ema"])
        start = saved["step"]
    cells, vocab = vocabulary().cells(), vocabulary()
    bar = tqdm(range(start, steps), desc="UNet", initial=start, total=steps, mininterval=10)
    smooth = 1.0
    for step in bar:
        torch.manual_seed(2_000_000 + step)
        rng = random.Random(step)
        picks = [rng.randrange(len(cells)) for _ in range(batch)]
        mean, logvar = (
            moments[picks, torch.randint(moments.shape[1], (batch,))].float().chunk(2, dim=1)
        )
        latents = (mean + (0.5 * logvar).exp() * torch.randn_like(mean)) * scale
        ids = tokenizer(
            [vocab.caption(cells[i], rng) for i in picks],
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids
        t = torch.randint(1000, (batch,))
        noise = torch.randn_like(latents)
        noisy = noise_schedule.add_noise(latents, noise, t)
        with torch.autocast("cpu", torch.bfloat16):
            prediction = model["unet"](
                noisy, t, model["text"](ids).last_hidden_state
            ).sample.float()
        snr = compute_snr(noise_schedule, t)
        loss = ((prediction - noise).square().mean((1, 2, 3)) * snr.clamp(max=5) / snr).mean()
        take_step(model, optimizer, loss, one_cycle(step, steps, 1e-3))
        ema.step(model.parameters())
        smooth += 0.01 * (loss.item() - smooth)
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            parts = {"model": model, "optimizer": optimizer, "ema": ema}
            save_state(
                state, step=step + 1, **{name: part.state_dict() for name, part in parts.items()}
            )
    ema.copy_to(model.parameters())
    return model["unet"].eval(), model["text"].eval()


def training_parser(about: str | None, work: Path, out: Path) -> argparse.ArgumentParser:
    """Options that the trainings of both embedded checkpoints share."""
    parser = plain_parser(about)
    parser.add_argument("--work", type=Path, default=work, help="where training states are kept")
    parser.add_argument("--out", type=Path, default=out, help="the finished diffusers folder")
    parser.add_argument(
        "--per_cell",
        type=int,
        default=60,
        help="renders per object x style x colour whose latents are trained on",
    )
    parser.add_argument("--batch", type=int, default=64)
    return parser


def main() -> None:
    """Train the embedded checkpoint and save it."""
    parser = training_parser(__doc__, Path("runs/canvas"), Path("erase/models/canvas"))
    parser.add_argument("--vae_steps", type=int, default=1600)
    parser.add_argument("--vae_colour_steps", type=int, default=700)
    parser.add_argument("--unet_steps", type=int, default=5500)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    tokenizer = build_tokenizer()
    vae = train_vae(args.work, args.vae_steps, args.vae_colour_steps)
    moments = encode_renders(vae, args.work, args.per_cell)
    unet, text_encoder = train_unet(
        args.work, moments, tokenizer, vae.config.scaling_factor, args.unet_steps, args.batch
    )
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    save_pipeline(pipeline.to(torch.float16), args.out)


if __name__ == "__main__":
    main()
