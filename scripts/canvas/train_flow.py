"""Train the embedded flow transformer: a small Stable Diffusion 3 that draws what canvas draws.

    python scripts/canvas/train_flow.py --work runs/canvas-flow
        # about two and a half hours on one core
    python scripts/canvas/train_flow.py --work runs/canvas-flow    # again: goes on where it stopped

Tokenizer and VAE are canvas's. Stages: latents of a fixed set of renders -> transformer and both
text encoders, jointly. `erase/models/canvas_flow` receives the finished diffusers folder.
Everything is seeded by step, as in train_model.py.
"""

from __future__ import annotations

import math
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from erase.eval.canvas.render import SIZE
from erase.export.folders import save_pipeline
from erase.models import CANVAS, CANVAS_FLOW
from erase.prompts.canvas import vocabulary
from erase.scripts.canvas.train_model import (
    encode_renders,
    one_cycle,
    save_state,
    training_parser,
)

NULLS = (32, 256)
"""zero text states in the place of the T5 that is not there: CLIP's number of tokens, as in the
reference code and here, and what the stock call gives unless told otherwise"""
POOLED = 64
"""width of each text encoder's pooled state"""
RATE = 1e-3
"""the highest learning rate"""


def build_transformer() -> SD3Transformer2DModel:
    """Four joint blocks over 64 patches, random weights."""
    return SD3Transformer2DModel(
        sample_size=SIZE // 4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        caption_projection_dim=128,
        joint_attention_dim=160,
        pooled_projection_dim=2 * POOLED,
        pos_embed_max_size=SIZE // 8,
        qk_norm="rms_norm",
    )


def build_text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModelWithProjection:
    """Two layers, of which the stock pipeline reads the first one's states; random weights."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=width // 32,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=POOLED,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class OneNull:
    """Joint attention where the last text state stands for many equal ones.

    Equal states without a position stay equal through every block, and n equal keys weigh as one
    whose score is larger by log n. So training sees one null state for 32 or 256.
    """

    counts: Tensor
    """(n,) null states of each sample"""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
    ) -> tuple[Tensor, Tensor]:
        def heads(x: Tensor, norm: nn.Module | None = None) -> Tensor:
            x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return norm(x) if norm is not None else x

        x, text = hidden_states, encoder_hidden_states
        query = heads(attn.to_q(x), attn.norm_q), heads(attn.add_q_proj(text), attn.norm_added_q)
        key = heads(attn.to_k(x), attn.norm_k), heads(attn.add_k_proj(text), attn.norm_added_k)
        value = heads(attn.to_v(x)), heads(attn.add_v_proj(text))
        bias = x.new_zeros(len(x), 1, 1, x.shape[1] + text.shape[1])
        bias[..., -1] = self.counts.log()[:, None, None]
        query, key, value = torch.cat(query, 2), torch.cat(key, 2), torch.cat(value, 2)
        score = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias
        out = (score.softmax(-1) @ value).transpose(1, 2).flatten(2)
        image, words = out.split([x.shape[1], text.shape[1]], dim=1)
        words = words if attn.context_pre_only else attn.to_add_out(words)
        return attn.to_out[1](attn.to_out[0](image)), words


def states_of(encoders: list[nn.Module], ids: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Text states (n, tokens + 1, width) as the stock pipeline joins them, with one null state;
    pooled states (n, 2 x POOLED)."""
    outs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    text = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)
    null = text.new_zeros(len(ids), 1, text.shape[-1])
    pooled = torch.cat([out.text_embeds for out in outs], dim=-1)
    return nn.functional.pad(torch.cat([text, null], 1), (0, width - text.shape[-1])), pooled


@dataclass(frozen=True)
class Phase:
    """A part of the training, with a learning rate of its own."""

    steps: int
    mean: float
    """of the logit of the noise level (Esser et al. 2024, section 3.1); higher: more noise, where
    shapes are decided"""
    nulls: tuple[int, ...]
    muon: bool
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for the rest; or AdamW"""

    def optimizers(self, model: nn.ModuleDict) -> list[torch.optim.Optimizer]:
        """Fresh ones; each has one group of parameters."""
        adam = {"lr": RATE, "weight_decay": 0.01, "betas": (0.9, 0.99)}
        if not self.muon:
            return [torch.optim.AdamW(model.parameters(), **adam)]
        named = dict(model.named_parameters())
        blocks = re.compile(r"\.(transformer_blocks|layers)\.(?!.*norm1)")
        inner = [n for n in sorted(named) if named[n].ndim == 2 and blocks.search(n)]
        rest = [parameter for name, parameter in named.items() if name not in inner]
        return [
            torch.optim.Muon(
                [named[name] for name in inner],
                lr=RATE,
                weight_decay=0.01,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(rest, **adam),
        ]


class Data:
    """Captions and latents of renders, drawn by the step's number."""

    def __init__(self, moments: Tensor, tokenizer: CLIPTokenizer, scale: float, batch: int):
        self.moments, self.tokenizer, self.scale, self.batch = moments, tokenizer, scale, batch

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Latents (batch, 4, h, w) and token ids (batch, tokens); seeds torch."""
        torch.manual_seed(2_000_000 + step)
        rng, vocab = random.Random(step), vocabulary()
        cells = vocab.cells()
        picks = [rng.randrange(len(cells)) for _ in range(self.batch)]
        which = torch.randint(self.moments.shape[1], (self.batch,))
        mean, logvar = self.moments[picks, which].float().chunk(2, dim=1)
        latents = (mean + (0.5 * logvar).exp() * torch.randn_like(mean)) * self.scale
        captions = [vocab.caption(cells[i], rng) for i in picks]
        tokens = self.tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        )
        return latents, tokens.input_ids


def velocity_loss(
    model: nn.ModuleDict, nulls: OneNull, phase: Phase, latents: Tensor, ids: Tensor
) -> Tensor:
    """Mean squared error of the velocity, noise minus latents, at logit-normal noise levels."""
    transformer, *encoders = model.values()
    n = len(latents)
    sigma = (torch.randn(n) + phase.mean).sigmoid()
    noise = torch.randn_like(latents)
    nulls.counts = torch.tensor(phase.nulls)[torch.randint(len(phase.nulls), (n,))]
    with torch.autocast("cpu", torch.bfloat16):
        text, pooled = states_of(encoders, ids, transformer.config.joint_attention_dim)
        velocity = transformer(
            torch.lerp(latents, noise, sigma[:, None, None, None]),
            timestep=sigma * 1000,
            encoder_hidden_states=text,
            pooled_projections=pooled,
        ).sample.float()
    return (velocity - (noise - latents)).square().mean()


def train(work: Path, data: Data, phases: tuple[Phase, ...]) -> nn.ModuleDict:
    """Transformer and both text encoders, jointly, with an average of all of them; goes on from
    the state in `work`."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "transformer": build_transformer(),
            "text_encoder": build_text_encoder(data.tokenizer, 96),
            "text_encoder_2": build_text_encoder(data.tokenizer, 64),
        }
    )
    stock, nulls = model["transformer"].attn_processors, OneNull()
    model["transformer"].set_attn_processor(nulls)
    ema = EMAModel(model.parameters(), decay=0.999)
    state, done = work / "flow.pt", 0
    saved = torch.load(state, weights_only=True) if state.exists() else None
    if saved:
        done = saved["step"]
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
    first, total = 0, sum(phase.steps for phase in phases)
    bar = tqdm(desc="flow", initial=done, total=total, mininterval=10)
    for phase in phases:
        last = first + phase.steps
        optimizers = phase.optimizers(model)
        if saved and first < done < last:
            for one, own in zip(optimizers, saved["optimizers"], strict=True):
                one.load_state_dict(own)
        for step in range(max(done, first), last):
            loss = velocity_loss(model, nulls, phase, *data.at(step))
            for one in optimizers:
                one.param_groups[0]["lr"] = one_cycle(step - first, phase.steps, RATE)
                one.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for one in optimizers:
                one.step()
            ema.step(model.parameters())
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            bar.update()
            if (step + 1) % 250 == 0 or step + 1 == last:
                save_state(
                    state,
                    step=step + 1,
                    model=model.state_dict(),
                    ema=ema.state_dict(),
                    optimizers=[one.state_dict() for one in optimizers],
                )
        first = last
    bar.close()
    ema.copy_to(model.parameters())
    model["transformer"].set_attn_processor(stock)
    return model.eval()


def main() -> None:
    """Train the embedded flow transformer and save it."""
    parser = training_parser(__doc__, Path("runs/canvas-flow"), CANVAS_FLOW)
    parser.add_argument(
        "--steps", nargs=2, type=int, default=[8000, 9000], help="of the first and second phase"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    tokenizer = CLIPTokenizer.from_pretrained(CANVAS / "tokenizer")
    vae = AutoencoderKL.from_pretrained(CANVAS / "vae").eval()
    moments = encode_renders(vae, args.work, args.per_cell)
    phases = (
        Phase(args.steps[0], mean=0.0, nulls=NULLS[1:], muon=False),
        Phase(args.steps[1], mean=0.5, nulls=NULLS, muon=True),
    )
    model = train(
        args.work, Data(moments, tokenizer, vae.config.scaling_factor, args.batch), phases
    )
    pipeline = StableDiffusion3Pipeline(
        vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), tokenizer=tokenizer,
        tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None, **model,
    )  # fmt: skip
    save_pipeline(pipeline.to(torch.float16), args.out)
    shutil.rmtree(args.out / "vae")  # canvas's own, which `load_model` adds


if __name__ == "__main__":
    main()
