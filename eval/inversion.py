"""Start noise of images, found by inversion, and the images that are drawn from it again."""

from __future__ import annotations

from dataclasses import asdict
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from erase.attacks import probes
from erase.attacks.probes import Inverted, Sampling
from erase.eval.attempts import Attempts
from erase.models import DiffusionModel
from erase.models.pipelines import decode, frozen_facts
from erase.parallel.processes import exists_on_all, in_shares, processes
from erase.tensor_files import load_tensors, save_tensors
from erase.tensors import sha256_of


def found_starts(
    base: DiffusionModel, latents: Tensor, attempts: Attempts, iterations: int, folder: Path | None
) -> Tensor:
    """Start noise of the base's images, shape as the latents': found once, whatever is erased from
    it."""
    frozen = frozen_facts(base.pipeline())
    about = [base.fingerprint, frozen, latents, asdict(attempts.settings), iterations]
    path = folder and folder / f"starts-{sha256_of(about)[:16]}.safetensors"
    if path and exists_on_all(path):
        return load_tensors(path, "starts")[0]["starts"]
    starts = invert(base, latents, attempts, iterations)
    if path and processes().is_main_process:
        save_tensors(path, {"starts": starts}, {"format": "starts"})
    return starts


def invert(model: DiffusionModel, latents: Tensor, attempts: Attempts, iterations: int) -> Tensor:
    """Start noise of each image, without a prompt, by so many iterations of each step."""
    how = Sampling(attempts.settings.steps, 1.0)

    def found(rows: range) -> Tensor:
        part = latents[rows.start : rows.stop]
        return probes.invert(model, part, [""] * len(part), how, iterations).start.cpu()

    size = attempts.settings.batch_size
    return torch.cat(in_shares(len(latents), size, found, "inversion", "image"))


def redrawn(
    model: DiffusionModel,
    latents: Tensor,
    attempts: Attempts,
    iterations: int,
    starts: Tensor | None = None,
) -> tuple[list[bool], list[float], list[float]]:
    """Whether each redrawn image shows the concept; its PSNR in dB; its start's mean square.

    Args:
        model: draws.
        latents: of the images.
        attempts: how images are drawn, and who judges them.
        iterations: of each step of inversion.
        starts: found elsewhere; None: found on this model.
    """
    begin = invert(model, latents, attempts, iterations) if starts is None else starts
    how = Sampling(attempts.settings.steps, 1.0)

    def judged(rows: range) -> list[tuple[bool, float, float]]:
        at = slice(rows.start, rows.stop)
        begun = Inverted(begin[at].to(model.device))
        drawn = probes.redraw(model, begun, [""] * len(begun.start), how)
        images = pixels(model, drawn, attempts).nan_to_num(0.0)
        error = (images - pixels(model, latents[at], attempts)).square().mean((1, 2, 3))
        psnr = -10 * error.clamp_min(1e-10).log10()
        seen = attempts.detector.sees(images)
        return list(zip(seen, psnr.tolist(), begun.mean_square(), strict=True))

    parts = in_shares(len(latents), attempts.settings.batch_size, judged, "redrawn", "image")
    shown, psnr, square = zip(*chain.from_iterable(parts), strict=True)
    return list(shown), list(psnr), list(square)


def pixels(model: DiffusionModel, latents: Tensor, attempts: Attempts) -> Tensor:
    """Images in [0, 1], on the CPU."""
    precision = attempts.settings.mixed_precision
    return decode(model.pipeline(), latents.to(model.device), precision).float().cpu()
