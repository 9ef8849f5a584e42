"""A CLIP of open_clip, loaded without running any code of its source."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from erase.eval.canvas.judges import clip_folder
from erase.eval.evaluators.clip_activation import decide_quick_gelu
from erase.eval.evaluators.clip_sources import HUB, Source, check_weights, find_source, tag_config
from erase.eval.images import ImageSet
from erase.models.loading import unreached
from erase.parallel.processes import default_device, in_shares
from erase.prompts.errors import ErasureError, reason

CANVAS = "canvas"
log = logging.getLogger("erase")


@dataclass(frozen=True)
class Clip:
    """A loaded CLIP: its encoders, its own image preprocessing, its tokenizer."""

    name: str
    model: Any
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    device: str

    @torch.inference_mode()
    def texts(self, captions: Sequence[str], batch_size: int) -> Tensor:
        """Unit text embeddings, shape (captions, d), float32."""
        parts = (list(captions[i : i + batch_size]) for i in range(0, len(captions), batch_size))
        embeddings = [
            self.model.encode_text(self.tokenizer(part).to(self.device)).float().cpu()
            for part in parts
        ]
        return F.normalize(torch.cat(embeddings), dim=-1)

    @torch.inference_mode()
    def embed(self, images: Iterable[Image.Image]) -> Tensor:
        """Unit image embeddings, shape (images, d), float32."""
        pixels = torch.stack([self.preprocess(image) for image in images])
        features: Tensor = self.model.encode_image(pixels.to(self.device))
        return F.normalize(features.float().cpu(), dim=-1)

    def images(self, images: ImageSet, batch_size: int) -> Tensor:
        """Unit image embeddings, shape (rows, d), float32."""

        def embed(rows: range) -> Tensor:
            return self.embed([images.image(images.rows[row]) for row in rows])

        return torch.cat(in_shares(len(images.rows), batch_size, embed, "CLIP", "image"))


def load(model: str, pretrained: str | None, quick_gelu: bool | None, device: str) -> Clip:
    """A CLIP in float32 and eval mode; loaded once per name.

    Args:
        model: `canvas`, a folder in open_clip's format, a name that open_clip lists, or one of its
            hub's.
        pretrained: tag or file of weights.
        quick_gelu: None: as the source tells.
        device: where it runs; `auto` is this process's GPU if there is one.

    Raises:
        ErasureError: an unknown name or tag, a config that names code, an activation that nothing
            tells, or weights that cannot be loaded.
    """
    where = str(default_device()) if device == "auto" else device
    return _load(model, pretrained, quick_gelu, where)


@cache
def _load(model: str, pretrained: str | None, quick_gelu: bool | None, device: str) -> Clip:
    if model == CANVAS and pretrained:
        raise ErasureError(
            f"canvas brings its own weights; name the CLIP model of {pretrained!r} with clip.model"
        )
    if model.startswith(HUB) or tag_config(model, pretrained):
        log.info(
            "CLIP %s is fetched from the hub, unless this machine has it; without a network its "
            "client tries for up to a minute, and HF_HUB_OFFLINE=1 spares that",
            " ".join(filter(None, [model, pretrained])),
        )
    source = find_source(str(clip_folder()) if model == CANVAS else model, pretrained)
    quick_gelu = decide_quick_gelu(source, quick_gelu)
    if pretrained and Path(pretrained).is_file():
        check_weights(Path(pretrained))
    try:
        network, preprocess, tokenizer = _built(source, quick_gelu, device)
    except (
        Exception
    ) as error:  # open_clip lets through whatever its parsers, readers and downloads raise
        weights = f" with weights {pretrained!r}" if pretrained else ""
        absent = "they are not on this machine, and the hub cannot be reached"
        raise ErasureError(
            f"open_clip cannot load {model!r}{weights}: "
            f"{absent if unreached(error) else reason(error)}; give a folder in open_clip's format "
            "or a name and tag that it lists, or other evaluators"
        ) from error
    return Clip(
        " ".join(filter(None, [model, pretrained])), network.eval(), preprocess, tokenizer, device
    )


def _built(source: Source, quick_gelu: bool, device: str) -> tuple[Any, Any, Any]:
    """Network, preprocessing and tokenizer, by open_clip."""
    import open_clip

    with warnings.catch_warnings(), _unlogged():
        # it compares before the activation is set
        warnings.filterwarnings("ignore", "QuickGELU mismatch")
        network, preprocess = open_clip.create_model_from_pretrained(
            source.name, source.weights, device=device, quick_gelu=quick_gelu
        )
    # transformers would ask at the terminal whether to run a repository's code, if this were left
    # out
    safe = {"trust_remote_code": False} if source.model["text_cfg"].get("hf_tokenizer_name") else {}
    return network, preprocess, open_clip.get_tokenizer(source.name, **safe)


@contextmanager
def _unlogged() -> Iterator[None]:
    """Within the block nothing is logged: open_clip logs what it raises, too."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        yield
    finally:
        logging.disable(before)
