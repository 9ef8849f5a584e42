"""Judges whose word stands under each picture of the live page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from erase.eval.evaluators import clip
from erase.eval.evaluators.classifier import load_judge
from erase.eval.images import ImageSet
from erase.models import DiffusionModel
from erase.prompts.canvas import EMBEDDED
from erase.prompts.errors import unknown
from erase.scripts.live.stage import Judge

JUDGES: Mapping[str, str] = {
    "auto": "canvas on the embedded model, else none",
    "canvas": "the embedded world's classifier: object, style and colour",
    "clip": "the CLIP score of picture and prompt",
    "none": "no word",
}


def check_judge(name: str) -> None:
    """Refuse an unknown name, before anything is loaded."""
    if name not in JUDGES:
        raise unknown("judge", name, JUDGES)


def find_judge(name: str, model: DiffusionModel, config: clip.Config) -> Judge | None:
    """The judge of that name, loaded.

    Args:
        name: of `JUDGES`.
        model: the base.
        config: which CLIP, for `clip`.

    Raises:
        ErasureError: an unknown name, or a CLIP that cannot be loaded.
    """
    check_judge(name)
    embedded = model.name in EMBEDDED
    if name == "canvas" or (name == "auto" and embedded):
        return _canvas()
    if name != "clip":
        return None
    if config.model is None and not embedded:
        config = replace(config, model="ViT-B-32", pretrained=config.pretrained or "openai")
    return _clip(config)


def _canvas() -> Judge:
    judge = load_judge("canvas")

    @torch.inference_mode()
    def words(images: ImageSet) -> list[str]:
        """The likeliest concept of each kind, with its probability: `heart 99 %, Neon 97 %, ...`"""
        columns = []
        logits = judge.logits(images.tensor())
        for kind, names in judge.classes.items():
            best, places = logits[kind].softmax(1).max(1)
            columns.append(
                [
                    f"{names[place]} {share:.0%}"
                    for place, share in zip(places.tolist(), best.tolist(), strict=True)
                ]
            )
        return [", ".join(row) for row in zip(*columns, strict=True)]

    return words


def _clip(config: clip.Config) -> Judge:
    loaded = clip.load_clip(config)

    def words(images: ImageSet) -> list[str]:
        """100 x the cosine of each image and its prompt."""
        seen = loaded.images(images, config.batch_size)
        said = loaded.texts([row.prompt for row in images.rows], config.batch_size)
        return [f"CLIP score {100 * cosine:.1f}" for cosine in (seen * said).sum(-1).tolist()]

    return words
