"""Images of a prompt set, by any Stable Diffusion pipeline: seeded row by row, resumable, shared
among processes.

An image depends on its row (prompt, seed, guidance) and on the settings in `settings.json`, on one
machine with one build of torch and one number of threads. It does not depend, to the bit, on how
often the run was stopped and resumed, on how many processes share it, or on the rows beside it. For
each image has a CPU generator of its own, each prompt is encoded alone, and all batches have one
size, the last being filled up with its last row: the rounding of a UNet's matrix products varies
with the size of a batch, though not with its members. Measured on the canvas architecture, float32,
CPU: batches of 1, 2, 3, 8 and 17 instead of 32 move at most 4 in 100,000 of the 8-bit values, each
by one level; 1, 2 and 4 threads give the same bits, and 3 threads differ by 1e-6, which is gone in
8 bits. No GPU has been measured.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erase.eval.generate_config import GenerateConfig
from erase.eval.images import (
    SETTINGS,
    ImageRow,
    ImageSet,
    holds_image,
    read_settings,
    save_image,
    write_manifest,
    write_settings,
)
from erase.eval.sampling import prepared, sampled
from erase.files import file_sha256
from erase.models import Cond, autocast
from erase.models.families import family_of
from erase.models.pipelines import (
    FROZEN,
    Pipeline,
    decode,
    denoiser,
    encode,
    frozen_facts,
    image_size,
)
from erase.models.prompt_checks import cut_prompts
from erase.models.tokenizers import tokens
from erase.parallel.processes import processes, progress
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import PromptRow, PromptSet

__all__ = ["Batch", "GenerateConfig", "batches", "denoise", "generate", "planned", "settings_for"]

TOLD = ("command", "sensitive")
"""settings that no image depends on, and that may differ from one run to the next"""
OTHERS = {
    **dict.fromkeys(("images", "prompt_set", "prompt_set_sha256"), "of other prompts or seeds"),
    **dict.fromkeys(("delta", "fingerprint"), "of another erasure or base"),
}
"""field of the settings -> what images are whose settings differ there, where a sentence says more
than the two values"""
BARS = {None: "images", "none": "base images"}
"""what is said to be drawn, by the delta that the settings tell"""
EMBEDDINGS = 2048  # kept at most; 230 KB each for SD 1.x in float32, 630 KB for SDXL
BYTES = 2_000_000_000  # of them, at most: a language model's take up to 16 MB each


@dataclass(frozen=True)
class Batch:
    """Rows of equal guidance that are denoised together, always the same ones."""

    rows: list[PromptRow]
    guidance: float


def generate(
    pipeline: Pipeline,
    prompts: PromptSet,
    out: Path,
    config: GenerateConfig,
    provenance: dict[str, str],
) -> ImageSet:
    """Make the images of `prompts` in the folder `out`; those that are there already, and whole,
    are kept.

    Under `accelerate launch`, or `torchrun` (which starts processes on CPU too), every process
    calls this with the same arguments, and each makes its share of the batches.

    Args:
        pipeline: a stock pipeline of a family that `erase.models` knows, on the device where it is
            to run; it is left as it was found. The safety checker is not asked.
        out: an empty or new folder, or one that a run with the same settings has begun.
        config: scheduler, steps, guidance, resolution, batch size.
        provenance: goes into `settings.json`: the model's fingerprint, the delta, … Its `command`,
            if given, is the line that errors tell the user to run again; it alone may differ from
            one run to the next.

    Returns:
        The finished set, verified, in every process.

    Raises:
        ErasureError: the pipeline is of another kind, or cannot take this scheduler or as many
            steps; `out` holds images made with other settings; an image is not finite; the disk is
            full.
    """
    out = Path(out)
    state = processes()
    whole = batches(prompts, config)
    settings = settings_for(pipeline, prompts, config, provenance)
    ready = prepared(pipeline, config)
    _claim(out, settings)
    _make(ready, whole[state.process_index :: state.num_processes], out, settings)
    state.wait_for_everyone()
    if state.is_main_process:
        write_manifest(
            out,
            [
                _image_row(row, batch.guidance, _digest(out / _file(row)))
                for batch in whole
                for row in batch.rows
            ],
        )
    state.wait_for_everyone()
    return ImageSet.open(out)


def left_to_make(
    pipeline: Pipeline,
    prompts: PromptSet,
    out: Path,
    config: GenerateConfig,
    provenance: dict[str, str],
) -> int:
    """How many images `generate` would make, with these arguments; nothing is written.

    Raises:
        ErasureError: what it would refuse before the first image.
    """
    whole = batches(prompts, config)
    settings = settings_for(pipeline, prompts, config, provenance)
    prepared(pipeline, config)
    _check_claim(out, settings)
    with ThreadPoolExecutor() as pool:
        missing = pool.map(lambda batch: _missing(batch, out), whole)
        return sum(map(len, missing))


def planned(prompts: PromptSet, out: Path, config: GenerateConfig) -> ImageSet:
    """The set as `generate` will leave it, but for the images and their digests."""
    rows = [
        _image_row(row, batch.guidance, "")
        for batch in batches(prompts, config)
        for row in batch.rows
    ]
    return ImageSet(out, sorted(rows, key=lambda row: row.case), asdict(config))


def batches(prompts: PromptSet, config: GenerateConfig) -> list[Batch]:
    """The prompt set cut into batches, by case, rows of one guidance at a time; a function of its
    arguments alone."""
    groups: dict[float, list[PromptRow]] = {}
    for row in sorted(prompts.rows, key=lambda row: row.case):
        groups.setdefault(
            float(config.guidance if row.guidance is None else row.guidance), []
        ).append(row)
    step = config.batch_size
    return [
        Batch(rows[i : i + step], guidance)
        for guidance, rows in groups.items()
        for i in range(0, len(rows), step)
    ]


def settings_for(
    pipeline: Pipeline, prompts: PromptSet, config: GenerateConfig, provenance: dict[str, str]
) -> dict[str, Any]:
    """How `generate` makes these images, and what is to be told of them; nothing is drawn."""
    family_of(pipeline, "the pipeline")  # refuses other kinds
    size = max(len(batch.rows) for batch in batches(prompts, config))
    settings = _own_settings(pipeline, prompts, size, config)
    if clash := settings.keys() & provenance.keys():
        raise ErasureError(
            f"provenance may not set {sorted(clash)[0]!r}: generate records it itself; rename it"
        )
    return settings | provenance


def _own_settings(
    pipeline: Pipeline, prompts: PromptSet, size: int, config: GenerateConfig
) -> dict[str, Any]:
    device = pipeline._execution_device  # unlike .device, right under CPU offload
    rows = sorted(prompts.rows, key=lambda row: row.case)
    cut = cut_prompts(
        [row.prompt for row in rows],
        lambda texts: tokens(pipeline, texts),
        [row.case for row in rows],
    )
    return {
        "images": len(prompts.rows),
        "prompt_set": prompts.name,
        "prompt_set_sha256": prompts.sha256,
        **prompts.marks,
        "scheduler": config.scheduler,
        "steps": config.steps,
        "guidance": float(config.guidance),
        "resolution": config.resolution or image_size(pipeline),
        **frozen_facts(pipeline),
        "batch_size": size,
        "mixed_precision": config.mixed_precision,
        "dtype": str(denoiser(pipeline).dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "safety_checker": "off",
        "versions": ", ".join(
            f"{package} {version(package)}" for package in ("torch", "diffusers", "transformers")
        ),
        **({"cut_prompts": cut} if cut else {}),
    }


def _check_claim(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Refuse a folder whose images were made in another way.

    Returns:
        what can be said of all its images: the settings, less those that an older version did not
        record.
    """
    earlier = read_settings(out)
    if earlier is None and any(out.glob("*.png")):
        raise ErasureError(
            f"{out} holds images but no {SETTINGS} that says how they were made; give another --out"
        )
    if earlier is None:
        return settings
    unknown = () if "vae" in earlier else FROZEN
    for field in [*settings, *earlier]:
        mine, theirs = settings.get(field), earlier.get(field)
        if field not in (*TOLD, *unknown) and mine != theirs:
            what = OTHERS.get(field, f"made with {field} {theirs!r}, not {mine!r}")
            raise ErasureError(
                f"{out} holds images {what}; give another --out, or delete this folder to make its "
                "images anew"
            )
    return {field: value for field, value in settings.items() if field not in unknown}


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Write `settings.json`, before any image, into a folder that is free."""
    known = _check_claim(out, settings)
    processes().wait_for_everyone()  # nobody writes before everybody has looked
    if processes().is_main_process:
        write_settings(out, known)


def _make(pipe: Pipeline, mine: list[Batch], out: Path, settings: dict[str, Any]) -> None:
    """Make the missing images of these batches; files are written while the next
    batch is denoised."""
    embed = _embedder(pipe)
    with ThreadPoolExecutor() as pool:
        missing = list(pool.map(lambda batch: _missing(batch, out), mine))
        total, left = sum(len(batch.rows) for batch in mine), sum(map(len, missing))
        writes: list[Future[None]] = []
        what = BARS.get(settings.get("delta"), "erased images")
        with progress(what, "image", total, total - left) as bar:
            for batch, rows in zip(mine, missing, strict=True):
                if not rows:
                    continue
                images = denoise(pipe, batch, embed, settings)
                _wait(writes)
                writes = [
                    pool.submit(
                        save_image, out / _file(row), images[row.case], _made_from(row, batch)
                    )
                    for row in rows
                ]
                bar.update(len(rows))
            _wait(writes)


def _missing(batch: Batch, out: Path) -> list[PromptRow]:
    return [row for row in batch.rows if not holds_image(out / _file(row), _made_from(row, batch))]


def _wait(writes: list[Future[None]]) -> None:
    for write in writes:
        write.result()


def _embedder(pipe: Pipeline) -> Callable[[str], Cond]:
    """prompt -> its condition, one row; encoded alone and once (or again, where there is no room
    to keep it), so that its bits are always the same."""
    device = pipe._execution_device

    @cache
    def null() -> Cond:
        return encode(pipe, [""], device)

    @cache
    def kept() -> Callable[[str], Cond]:
        size = sum(tensor.nbytes for tensor in (null().embeddings, *null().extras.values()))
        room = min(EMBEDDINGS, BYTES // size)
        return lru_cache(room)(lambda prompt: encode(pipe, [prompt], device))

    return lambda prompt: kept()(prompt) if prompt else null()


def denoise(
    pipe: Pipeline, batch: Batch, embed: Callable[[str], Cond], settings: dict[str, Any]
) -> dict[int, np.ndarray]:
    """The images of a batch: case -> pixels, shape (H, W, 3), uint8.

    Raises:
        ErasureError: an image has a value that is not finite.
    """
    rows = batch.rows + batch.rows[-1:] * (settings["batch_size"] - len(batch.rows))
    with autocast(pipe._execution_device, settings["mixed_precision"]):
        latents = sampled(
            pipe,
            Cond.stack([embed(row.prompt) for row in rows]),
            Cond.stack([embed("")] * len(rows)),
            [row.seed for row in rows],
            batch.guidance,
            settings["steps"],
            settings["resolution"],
        )
    images = decode(pipe, latents, settings["mixed_precision"])[: len(batch.rows)]
    for row, finite in zip(batch.rows, images.isfinite().all(dim=(1, 2, 3)).tolist(), strict=True):
        if not finite:
            raise ErasureError(
                f"the image of prompt {row.prompt!r}, seed {row.seed} (case {row.case}), is not "
                f"finite; the weights have diverged, or {settings['dtype']} is too narrow for "
                "them: try float32"
            )
    pixels = (images.permute(0, 2, 3, 1).float().cpu() * 255).round().to(torch.uint8).numpy()
    return {row.case: image for row, image in zip(batch.rows, pixels, strict=True)}


def _file(row: PromptRow) -> str:
    return f"{row.case:05d}.png"


def _made_from(row: PromptRow, batch: Batch) -> dict[str, Any]:
    return {"case": row.case, "prompt": row.prompt, "seed": row.seed, "guidance": batch.guidance}


def _image_row(row: PromptRow, guidance: float, digest: str) -> ImageRow:
    return ImageRow(_file(row), row.case, row.prompt, row.seed, guidance, row.labels, digest)


def _digest(path: Path) -> str:
    digest = file_sha256(path)
    if digest is None:
        raise ErasureError(
            f"{path} was deleted while its set was being made, or was made on a machine that does "
            "not share this disk; run the same command again, on several machines with a folder "
            "that all of them share"
        )
    return digest
