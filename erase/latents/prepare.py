"""The training data of an erasure: latents of forget and retain images, with the embeddings of their prompts."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from erase.files import errors_named, file_sha256, load_tensors, save_tensors
from erase.latents.captions import captioned, check_named, forget_pairs, retain_prompts, that_stay
from erase.latents.image_folders import OwnImage, look_at, read_folder, read_image, take
from erase.latents.sampling import sample_points
from erase.models import Cond, DiffusionModel, check_precision
from erase.parallel.processes import exists_on_all, in_shares, processes
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import COUNT, FINITE, ErasureError, check_names, check_ranges
from erase.prompts.retain import without

T = TypeVar("T")
log = logging.getLogger("erase")
TENSORS, TEXTS = ("latents", "std", "noise", "t"), ("prompts", "anchors", "own", "each")  # of a set's file
CAPTIONS = ("beside", "folder", "none")


@dataclass
class LatentConfig:
    """Where forget and retain latents come from."""

    n_forget: int = 96
    """forget images in all, over all concepts"""
    n_retain: int = 192
    """retain images in all"""
    steps: int = 10
    """sampling steps (DPM-Solver++ 2M) of latents that the model makes itself"""
    guidance: float = 3.0
    """guidance scale of that sampling"""
    trajectory: int = 0
    """k: of each image that the model makes itself, train on k noisy states that its sampling passed through (on all, where there are fewer
    steps). They are fixed, so that what the frozen base predicts there is computed once. 0: on the finished image, noised anew at each step"""
    mixed_precision: str = "no"
    """no, bf16 or fp16, for the sampling"""
    batch_size: int = 32
    """images sampled or encoded at a time"""
    forget_images: str | None = None
    """a folder of images of the concept to encode instead of sampling: n_forget of all in it and in its folders, spread by the seed;
    without captions, the concept's prompts are paired with them in turn"""
    retain_images: str | None = None
    """a folder of images to keep, likewise"""
    captions: str = "beside"
    """what the prompts of these images are: beside (the .txt file of the same name, where images have one), folder (the name of the folder
    that each lies in, put into templates), or none. A forget image's must name the concept; with the anchor in its place it is the anchor
    prompt"""

    def __post_init__(self) -> None:
        check_precision(self.mixed_precision)
        check_names(self, {"captions": CAPTIONS})
        for given in ("forget_images", "retain_images"):
            if (folder := getattr(self, given)) is not None and not folder.strip():
                raise ErasureError(f"latents.{given} is empty; name a folder, or leave it out to sample the images")
        counts = dict.fromkeys(("n_forget", "n_retain", "steps", "batch_size"), COUNT)
        check_ranges(self, {**counts, "trajectory": (0, inf), "guidance": FINITE})


@dataclass(frozen=True)
class LatentSet:
    """Latents with one prompt each, and for forget latents the anchor prompt beside it."""

    latents: Tensor
    """posterior means, scaled as the denoiser sees them, shape (n, c, h, w)"""
    std: Tensor | None
    """posterior standard deviations, same shape: the latent is drawn anew at each use; None for sampled latents"""
    prompts: tuple[str, ...]
    """one prompt per latent"""
    anchors: tuple[str, ...] | None = None
    """one anchor prompt per forget latent; None for retain latents"""
    own: int | None = None
    """the first so many latents show what their prompts say, the others their anchors; None: all do"""
    noise: Tensor | None = None
    """the noise that each latent is to be seen under, same shape; None: drawn anew at each use"""
    t: Tensor | None = None
    """training timesteps that go with it, shape (n,), int64"""
    each: int = 1
    """so many rows, one after the other, are points of one image"""

    def __len__(self) -> int:
        return len(self.latents)

    def concept_rows(self) -> Tensor:
        """One row of each image that shows what its prompt says; of points, one of every stretch of the trajectories in turn."""
        images = torch.arange((len(self) if self.own is None else self.own) // self.each)
        return images * self.each + images % self.each

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Latents of these rows: a posterior sample each, where they come from images."""
        mean = self.latents[rows]
        if self.std is None:
            return mean
        return mean + self.std[rows] * torch.randn(mean.shape, generator=generator)

    def draw_noise(self, rows: Tensor, timesteps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Timestep and noise for these rows: their own, or drawn from `timesteps` and the normal distribution."""
        if self.t is not None and self.noise is not None:
            return self.t[rows], self.noise[rows]
        shape = (len(rows), *self.latents.shape[1:])
        return torch.randint(timesteps, (len(rows),), generator=generator), torch.randn(shape, generator=generator)

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        tensors = {name: value for name in TENSORS if (value := getattr(self, name)) is not None}
        texts = {name: json.dumps(getattr(self, name)) for name in TEXTS}
        save_tensors(path, tensors, {**metadata, **texts, "format": "latents", "sha256": _digest(tensors)})

    @classmethod
    def load(cls, path: Path, made_from: str | None = None) -> LatentSet:
        """Read a set.

        Args:
            path: of the file.
            made_from: digest of what it must have been made from; None: whatever it was.

        Raises:
            ErasureError: a missing, damaged or foreign file, texts that do not fit the latents, or a
                set that was made from something else.
        """
        tensors, metadata = load_tensors(path, "latents")
        if metadata.get("sha256") != _digest(tensors):
            raise ErasureError(f"{path} is damaged (its checksum differs); delete it to make it again")
        if made_from is not None and metadata.get("made_from") != made_from:
            raise ErasureError(f"{path} holds latents that were made from something else; delete it to make them again")
        with errors_named(path, "delete it to make it again"):
            prompts, anchors, own, each = (json.loads(metadata[key]) for key in TEXTS)
            latents, t = tensors["latents"], tensors.get("t")
            texts = [prompts] if anchors is None else [prompts, anchors]
            if any(not isinstance(column, list) or len(column) != len(latents) for column in texts):
                raise ErasureError(f"{path}: {len(prompts)} prompts for {len(latents)} latents; delete it to make it again")
            words = all(isinstance(text, str) for column in texts for text in column)
            images = [tensor for name, tensor in tensors.items() if name != "t"]
            floats = all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in images)
            shaped = latents.dim() == 4 and all(tensor.shape == latents.shape for tensor in images)
            timed = ("noise" in tensors) == (t is not None) and (
                t is None or (t.dtype, t.shape) == (torch.int64, latents.shape[:1])
            )
            counted = (own is None or own in range(len(latents) + 1)) and each in range(1, len(latents) + 1)
            if not (words and floats and shaped and timed and counted):
                raise ErasureError(f"{path} does not hold prompts and latents of shape (n, c, h, w); delete it to make it again")
        anchors = None if anchors is None else tuple(anchors)
        return cls(latents, tensors.get("std"), tuple(prompts), anchors, own, tensors.get("noise"), t, each)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Checksum of a set's values: flipped bits may well leave them finite."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def epoch_rows(n: int, start: int, count: int, seed: int, shuffle: bool = True) -> Tensor:
    """Rows `start .. start + count` of an endless stream in which every epoch holds each of `n` rows exactly once.

    A function of its arguments alone, so that a resumed run goes on in the same order.
    """
    rows = []
    for epoch in range(start // n, (start + count - 1) // n + 1):
        order = (
            torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)) if shuffle else torch.arange(n)
        )
        rows.append(order[max(start - epoch * n, 0) : start + count - epoch * n])
    return torch.cat(rows)


class PromptCache:
    """Embeddings of every distinct prompt, computed once; the text encoder does not run inside the training loop."""

    def __init__(self, model: DiffusionModel, prompts: Sequence[str]) -> None:
        distinct = list(dict.fromkeys(prompts))
        self._row = {prompt: i for i, prompt in enumerate(distinct)}
        self._cond = model.encode(distinct)

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """Embeddings of these prompts, in order."""
        return self._cond[torch.tensor([self._row[prompt] for prompt in prompts])]


@dataclass(frozen=True)
class Plan:
    """The forget and retain latents of an erasure; each set is made when it is asked for.

    Sets come from the model itself or from folders of images. Where there is a cache, finished ones are found there again.
    """

    model: DiffusionModel
    concepts: list[ConceptSpec]
    """their pairs are used in turn, each concept equally often"""
    config: LatentConfig
    seed: int
    """picks the prompts and seeds the images"""
    cache: Path | None = None

    def forget(self, anchor_share: float = 0.0) -> LatentSet:
        """Forget latents.

        Args:
            anchor_share: fraction that is sampled from the anchor prompts instead (none, where images are given).

        Raises:
            ErasureError: more steps than timesteps, images or captions that cannot be taken, or a concept of which no forget latent is left.
        """
        pairs, images = self._forget_rows(random.Random(self.seed))
        own = len(pairs) if images else len(pairs) - round(anchor_share * len(pairs))
        if own < len(self.concepts):
            raise ErasureError(
                f"{own} of {len(pairs)} forget latents show what is to be forgotten, which is {len(self.concepts)} concepts; "
                "raise latents.n_forget or lower anchor_latents"
            )
        prompts, anchors = (tuple(column) for column in zip(*pairs, strict=True))
        return self._made("forget", prompts, anchors, own, images, self._first)

    def retain(self) -> LatentSet:
        """Retain latents.

        Raises:
            ErasureError: more steps than timesteps, no retain prompts, or images or captions that cannot be taken.
        """
        rng = random.Random(self.seed)
        self._forget_rows(rng)  # whose draws come first
        seed = self._first + 500_000
        prompts, images = _retain_rows(self.concepts, self.config, seed, rng)
        return self._made("retain", tuple(prompts), None, None, images, seed)

    @property
    def _first(self) -> int:
        return self.seed * 1_000_003

    def _forget_rows(self, rng: random.Random) -> tuple[list[tuple[str, str]], list[OwnImage]]:
        return _forget_rows(self.concepts, self.config, self._first, rng)

    def _made(
        self,
        what: str,
        prompts: tuple[str, ...],
        anchors: tuple[str, ...] | None,
        own: int | None,
        images: list[OwnImage],
        seed: int,
    ) -> LatentSet:
        check_ranges(self.config, {"steps": (1, self.model.timesteps)})  # no more than there are noise levels
        look_at(images, self.model.image_size, f"latents.{what}_images")
        files = [image.path for image in images]
        return _cached(self.model, self.config, self.cache, what, prompts, anchors, own, files, seed)


def prepare_latents(
    model: DiffusionModel,
    concepts: list[ConceptSpec],
    config: LatentConfig,
    seed: int,
    cache: Path | None = None,
    anchor_share: float = 0.0,
) -> tuple[LatentSet, LatentSet]:
    """Forget and retain latents of an erasure; see `Plan`."""
    plan = Plan(model, concepts, config, seed, cache)
    return plan.forget(anchor_share), plan.retain()


def _forget_rows(
    concepts: list[ConceptSpec], config: LatentConfig, seed: int, rng: random.Random
) -> tuple[list[tuple[str, str]], list[OwnImage]]:
    """Pairs of prompts, and the images that go with them in turn: none, where they are sampled."""
    if not config.forget_images:
        return _pick_pairs(concepts, config.n_forget, rng), []
    images = read_folder(config.forget_images, config.captions)
    check_named(images, concepts)
    taken = take(config.forget_images, images, config.n_forget, seed, "latents.forget_images")
    check_named(taken, concepts)
    if captioned(taken):
        return forget_pairs(taken, concepts, config.n_forget, rng), taken
    return _pick_pairs(concepts, config.n_forget, rng), taken


def _retain_rows(
    concepts: list[ConceptSpec], config: LatentConfig, seed: int, rng: random.Random
) -> tuple[list[str], list[OwnImage]]:
    """Prompts, and the images that go with them in turn: none, where they are sampled."""
    if not config.retain_images:
        return _pick_retain(concepts, config.n_retain, rng), []
    images = that_stay(read_folder(config.retain_images, config.captions), concepts)
    taken = take(config.retain_images, images, config.n_retain, seed, "latents.retain_images")
    return retain_prompts(taken, config.n_retain) if captioned(taken) else _pick_retain(concepts, config.n_retain, rng), taken


def _pick_pairs(concepts: list[ConceptSpec], n: int, rng: random.Random) -> list[tuple[str, str]]:
    shares = [_cycled(concept.pairs(), -(-n // len(concepts)), rng) for concept in concepts]
    return [pair for row in zip(*shares, strict=True) for pair in row][:n]


def _pick_retain(concepts: list[ConceptSpec], n: int, rng: random.Random) -> list[str]:
    """Retain prompts of all concepts, less those that name any of the concepts."""
    names = [name for concept in concepts for name in concept.names]
    given = list(dict.fromkeys(prompt for concept in concepts for prompt in concept.retain))
    prompts = without(given, names)
    if prompts and len(prompts) < len(given):
        log.info("%d of %d retain prompts name what is to be forgotten and are left out", len(given) - len(prompts), len(given))
    if not prompts:
        raise ErasureError(
            f"no retain prompts are left for {', '.join(c.target for c in concepts)}; give some that do not name the concept"
        )
    return _cycled(list(prompts), n, rng)


def _cycled(items: list[T], n: int, rng: random.Random) -> list[T]:
    """`n` items: whole shuffled rounds, so that each item comes as often as any other, within one."""
    picked: list[T] = []
    while len(picked) < n:
        picked += rng.sample(items, len(items))
    return picked[:n]


def _cached(
    model: DiffusionModel,
    config: LatentConfig,
    cache: Path | None,
    what: str,
    prompts: tuple[str, ...],
    anchors: tuple[str, ...] | None,
    own: int | None,
    files: list[Path],
    seed: int,
) -> LatentSet:
    key = json.dumps([model.fingerprint, prompts, anchors, own, [file_sha256(file) for file in files], seed, asdict(config)])
    digest = hashlib.sha256(key.encode()).hexdigest()
    path = cache / f"{what}-{digest[:16]}.safetensors" if cache else None
    if path and exists_on_all(path):
        kept = LatentSet.load(path, digest)
        if (kept.prompts, kept.anchors) != (_times(prompts, kept.each), anchors and _times(anchors, kept.each)):
            raise ErasureError(f"{path} holds other prompts than this run's; delete it to make it again")
        return kept
    if files:
        mean, std = _encode(model, files, config.batch_size)
        rows = torch.arange(len(prompts)) % len(mean)
        made = LatentSet(mean[rows], std[rows], prompts, anchors, own)
    else:
        shown = prompts[:own] + (anchors[own:] if anchors else ())
        latents, noise, t = sample_points(
            model,
            shown,
            seed,
            steps=config.steps,
            guidance=config.guidance,
            trajectory=config.trajectory,
            precision=config.mixed_precision,
            batch_size=config.batch_size,
            what=what,
        )
        each = len(latents) // len(prompts)
        made = LatentSet(
            latents, None, _times(prompts, each), anchors and _times(anchors, each), own and own * each, noise, t, each
        )
    if path and processes().is_main_process:
        made.save(path, {"base_fingerprint": model.fingerprint, "made_from": digest})
    return made


def _times(texts: tuple[str, ...], each: int) -> tuple[str, ...]:
    return tuple(text for text in texts for _ in range(each))


def _encode(model: DiffusionModel, files: list[Path], batch_size: int) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation of image files, at the model's resolution."""
    size = model.image_size

    def encode(rows: range) -> tuple[Tensor, Tensor]:
        mean, std = model.encode_images(torch.stack([read_image(files[row], size) for row in rows]))
        return mean.float().cpu(), std.float().cpu()

    means, stds = zip(*in_shares(len(files), batch_size, encode, "encoding images", "img"), strict=True)
    return torch.cat(means), torch.cat(stds)
