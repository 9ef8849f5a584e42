"""Train the judges of the embedded world: a classifier and a small CLIP. Both see renders only,
never a generated image.

    python scripts/canvas/train_judges.py       # both, then the card: about ten minutes on one core
    python scripts/canvas/train_judges.py                      # again: goes on where it was stopped
    python scripts/canvas/train_judges.py --judge classifier
        # one of them: classifier, clip or card

Training states are kept in --work. The finished judges go to eval/canvas/weights in half precision:

    classifier.safetensors      erase.eval.canvas.judges.load_classifier()
    clip/                open_clip.create_model_and_transforms("local-dir:eval/canvas/weights/clip")
    README.md                   their card: sha256 of each file, accuracy on held-out renders

Everything is seeded by step, so a stopped and resumed run sees the same batches as one that was
never stopped.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Formatter

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from erase.eval.canvas.judges import SIDE, WEIGHTS, CanvasClassifier
from erase.eval.canvas.render import render
from erase.files import atomic_write
from erase.prompts.canvas import KINDS, vocabulary
from erase.scripts.bench.plain import plain_parser
from erase.scripts.canvas.judges_card import SEEDS, truth, write_card
from erase.scripts.canvas.train_model import build_tokenizer, random_cells, save_state

EMBEDDING = 128
CONTEXT = 20  # tokens that the CLIP reads; a caption of the world has at most 15


def augment(images: Tensor) -> Tensor:
    """Brightness, contrast, blur and noise as mild as a small VAE's faults, each image with its own
    strengths; same shape."""
    n = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(n, 1, 1, 1).uniform_(low, high)

    images = (images - 0.5) * uniform(0.9, 1.1) + 0.5 + uniform(-0.05, 0.05)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = images + (soft - images) * uniform(-0.4, 0.9).clamp(min=0)
    return (images + torch.randn_like(images) * uniform(-0.03, 0.07).clamp(min=0)).clamp(0, 1)


def train(
    model: nn.Module, loss_at: Callable[[int], Tensor], steps: int, lr: float, state: Path
) -> None:
    """AdamW under a one-cycle schedule, in bfloat16 autocast. `loss_at(step)` draws its own batch,
    seeded by `step`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    parts, start = {"model": model, "optimizer": optimizer, "schedule": schedule}, 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        start = saved["step"]
    model.train()
    bar = tqdm(range(start, steps), desc=state.stem, initial=start, total=steps, mininterval=5)
    for step in bar:
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            save_state(
                state, step=step + 1, **{name: part.state_dict() for name, part in parts.items()}
            )
    model.eval()


def draw(judge: str, step: int, batch: int) -> tuple[list[dict[str, str]], Tensor]:
    """One training batch: random cells and their augmented renders; fixes torch's random state for
    the rest of the step."""
    cells = random_cells(batch, random.Random(SEEDS[judge] + step))
    images = render(cells, seed=SEEDS[judge] + step)
    torch.manual_seed(SEEDS[judge] + step)
    return cells, augment(images)


def save_half(model: nn.Module, path: Path) -> None:
    state = {
        name: value.half() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    with atomic_write(path) as aside:
        save_file(
            {name: value.contiguous() for name, value in state.items()},
            aside,
            metadata={"format": "pt"},
        )


# ---- classifier ----------------------------------------------------------------------------------


def classes_loss(logits: dict[str, Tensor], cells: list[dict[str, str]]) -> Tensor:
    """Cross-entropy of each kind, summed. Logits: kind -> (cells, names of the kind)."""
    return torch.stack(
        [F.cross_entropy(logits[kind].float(), truth(kind, cells)) for kind in KINDS]
    ).sum()


def train_classifier(work: Path, steps: int, batch: int) -> None:
    torch.manual_seed(0)
    model = CanvasClassifier()

    def loss_at(step: int) -> Tensor:
        cells, images = draw("classifier", step, batch)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        return classes_loss(logits, cells)

    train(model, loss_at, steps, 4e-3, work / "classifier.pt")
    save_half(model, WEIGHTS / "classifier.safetensors")


# ---- CLIP ----------------------------------------------------------------------------------------


def fields(template: str) -> list[str]:
    return [field for _, field, _, _ in Formatter().parse(template) if field]


def write_caption(
    cell: dict[str, str], rng: random.Random, templates: Sequence[str]
) -> tuple[str, dict[str, str]]:
    """A caption from one of `templates`, half of the names replaced by synonyms, and the part of
    `cell` that it states."""
    template = rng.choice(templates)
    stated = {field: cell[field] for field in fields(template)}
    words = {
        kind: rng.choice(vocabulary().synonyms[kind][name]) if rng.random() < 0.5 else name
        for kind, name in stated.items()
    }
    return template.format(**words), stated


def name_captions(rng: random.Random) -> list[str]:
    """One caption for each concept of the world, kind by kind, that names this concept alone."""
    alone = {}
    for kind in KINDS:
        alone[kind] = [t for t in vocabulary().templates if fields(t) == [kind]]
    return [
        write_caption({kind: name}, rng, alone[kind])[0]
        for kind in KINDS
        for name in vocabulary().names(kind)
    ]


def matches(stated: list[dict[str, str]], cells: list[dict[str, str]]) -> Tensor:
    """1 where an image shows all that a caption states; shape (captions, cells)."""
    shown = torch.zeros(len(stated), len(cells))
    for i, claim in enumerate(stated):
        for j, cell in enumerate(cells):
            shown[i, j] = float(claim.items() <= cell.items())
    return shown


def contrastive_loss(similarity: Tensor, match: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy with every match a positive (the supervised contrast of Khosla
    et al. 2020, L_out).

    Args:
        similarity: scaled cosines, shape (captions, images).
        match: 1 where a caption is true of an image, same shape; each row and column has at least
            one.
    """
    by_caption = (similarity.log_softmax(1) * match).sum(1) / match.sum(1)
    by_image = (similarity.log_softmax(0) * match).sum(0) / match.sum(0)
    return -(by_caption.mean() + by_image.mean()) / 2


def clip_config(vocab_size: int) -> dict[str, object]:
    """open_clip's own description of the model: a 1.4M-parameter ResNet with attention pooling and
    a two-layer text tower."""
    return {
        "model_cfg": {
            "embed_dim": EMBEDDING,
            "init_logit_scale": math.log(30),
            "vision_cfg": {
                "image_size": SIDE,
                "layers": [1, 2, 2, 1],
                "width": 16,
                "head_width": 64,
            },
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": vocab_size,
                # any name: from a folder, open_clip loads the folder's own tokenizer
                "hf_tokenizer_name": "canvas",
                "width": EMBEDDING,
                "heads": 4,
                "layers": 2,
            },
        },
        "preprocess_cfg": {
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def build_clip(folder: Path, tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """Write all of the open_clip folder but the weights. Returns its untrained `clip`, and linear
    `heads` that only training uses."""
    tokenizer.save_pretrained(folder)
    with atomic_write(folder / "open_clip_config.json") as aside:
        aside.write_text(json.dumps(clip_config(len(tokenizer)), indent=2) + "\n", encoding="utf-8")
    torch.manual_seed(0)
    clip = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    heads = nn.ModuleDict(
        {kind: nn.Linear(EMBEDDING, len(vocabulary().names(kind))) for kind in KINDS}
    )
    return nn.ModuleDict({"clip": clip, "heads": heads})


def train_clip(work: Path, steps: int, batch: int) -> None:
    """Three losses, summed.

    - contrast of images and random captions, where a caption that names one thing is true of every
    image that shows it;
    - zero-shot: of one caption for each name of a kind, the true one (random captions seldom set
    such captions against each other);
    - classes by linear heads on the image embedding, without which the image tower is slow to tell
      objects apart while the text tower's names still lie close together.
    """
    folder, tokenizer = WEIGHTS / "clip", build_tokenizer()
    model = build_clip(folder, tokenizer)
    clip, sizes = model["clip"], [len(vocabulary().names(kind)) for kind in KINDS]

    def loss_at(step: int) -> Tensor:
        """Of one step's renders: captions, class names and linear heads together."""
        cells, images = draw("clip", step, batch)
        rng = random.Random(SEEDS["clip"] + step)
        names = name_captions(rng)
        captions, stated = zip(
            *(write_caption(cell, rng, vocabulary().templates) for cell in cells), strict=True
        )
        texts = tokenizer(
            [*names, *captions],
            padding="max_length",
            max_length=CONTEXT,
            truncation=True,
            return_tensors="pt",
        )
        with torch.autocast("cpu", torch.bfloat16):
            seen = clip.encode_image(images * 2 - 1).float()
            said = clip.encode_text(texts.input_ids).float()
        similarity = (
            F.normalize(said, dim=-1)
            @ F.normalize(seen, dim=-1).T
            * clip.logit_scale.exp().clamp(max=100)
        )
        *by_name, by_caption = similarity.split([*sizes, batch])
        zero_shot = {kind: scores.T for kind, scores in zip(KINDS, by_name, strict=True)}
        linear = {kind: head(seen) for kind, head in model["heads"].items()}
        return (
            contrastive_loss(by_caption, matches(list(stated), cells))
            + classes_loss(zero_shot, cells)
            + classes_loss(linear, cells)
        )

    train(model, loss_at, steps, 2e-3, work / "clip.pt")
    save_half(clip, folder / "open_clip_model.safetensors")


def main() -> None:
    """Make what is asked for."""
    parser = plain_parser(__doc__)
    parser.add_argument(
        "--judge",
        choices=["all", "classifier", "clip", "card"],
        default="all",
        help="what to make (default: all)",
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/judges"), help="where training states are kept"
    )
    parser.add_argument("--classifier_steps", type=int, default=550)
    parser.add_argument("--clip_steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=128, help="renders per step")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    if args.judge in ("all", "classifier"):
        train_classifier(args.work, args.classifier_steps, args.batch)
    if args.judge in ("all", "clip"):
        train_clip(args.work, args.clip_steps, args.batch)
    if args.judge in ("all", "card"):
        write_card(f"{args.classifier_steps} and {args.clip_steps} steps of {args.batch} renders")


if __name__ == "__main__":
    main()
