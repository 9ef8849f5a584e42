"""The training data of an erasure: latents of forget and retain images, with the embeddings of
their prompts."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from erase.files import file_sha256
from erase.latents.captions import captioned, check_named, forget_pairs, retain_prompts, that_stay
from erase.latents.config import LatentConfig
from erase.latents.image_files import read_image
from erase.latents.image_folders import OwnImage, look_at, read_folder, take
from erase.latents.latent_set import LatentSet
from erase.latents.picking import pick, pick_in_turn
from erase.latents.sampling import sample_points
from erase.models import DiffusionModel
from erase.models.pipelines import frozen_facts
from erase.parallel.processes import exists_on_all, in_shares, processes
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError, check_ranges
from erase.prompts.several import anchored_pairs, earlier_prompts, retained_prompts

log = logging.getLogger("erase")


@dataclass(frozen=True)
class Plan:
    """The forget and retain latents of an erasure; each set is made when it is asked for.

    Sets come from the model itself or from folders of images. Where there is a cache, finished ones
    are found there again.
    """

    model: DiffusionModel
    concepts: list[ConceptSpec]
    """their pairs are used in turn, each concept equally often"""
    config: LatentConfig
    seed: int
    """picks the prompts and seeds the images"""
    cache: Path | None = None
    earlier: Sequence[ConceptSpec] = ()
    """concepts that the model has forgotten before; their prompts are used in turn, too"""

    def forget(self, anchor_share: float = 0.0, power: float = 1.0) -> LatentSet:
        """Forget latents.

        Args:
            anchor_share: fraction that is sampled from the anchor prompts instead (none, where
                images are given).
            power: of the noisy states of trajectories, as in `LatentSet.draw_noise`.

        Raises:
            ErasureError: more steps than timesteps, images or captions that cannot be taken, or a
                concept of which no forget latent is left.
        """
        pairs, images, _ = self._forget_rows
        own = len(pairs) - (0 if images else round(anchor_share * len(pairs)))
        if own < len(self.concepts):
            raise ErasureError(
                f"{own} of {len(pairs)} forget latents show what is to be forgotten, which is "
                f"{len(self.concepts)} concepts; raise latents.n_forget or lower anchor_latents"
            )
        if self.config.retain_images or any(concept.retain for concept in self.concepts):
            _ = self._retain_rows  # what cannot be taken is refused before anything is sampled
        prompts, anchors = (tuple(column) for column in zip(*pairs, strict=True))
        return self._made(self.config, "forget", prompts, anchors, own, images, self._first, power)

    def retain(self, power: float = 1.0) -> LatentSet:
        """Retain latents.

        Args:
            power: see `forget`.

        Raises:
            ErasureError: more steps than timesteps, no retain prompts, or images or captions that
                cannot be taken.
        """
        prompts, images = self._retain_rows
        config, seed = self.config, self._first + 500_000
        if config.retain_guidance is not None:
            config = replace(config, guidance=config.retain_guidance)
        return self._made(config, "retain", tuple(prompts), None, None, images, seed, power)

    @property
    def _first(self) -> int:
        return self.seed * 1_000_003

    @cached_property
    def _forget_rows(self) -> tuple[list[tuple[str, str]], list[OwnImage], random.Random]:
        """Pairs, images, and the random stream behind the draws of these."""
        rng = random.Random(self.seed)
        pairs, images = _forget_rows(self.concepts, self.config, self._first, rng)
        look_at(images, self.model.image_size, "latents.forget_images")
        return pairs, images, rng

    @cached_property
    def _retain_rows(self) -> tuple[list[str], list[OwnImage]]:
        *_, rng = self._forget_rows  # whose draws come first
        prompts, images = _retain_rows(self.concepts, self.config, self._first + 500_000, rng)
        kept = earlier_prompts(self.earlier, self.concepts) if self.config.earlier else []
        if kept and images:
            raise ErasureError(
                "latents.retain_images shows nothing of what was forgotten before, whose prompts "
                "latents.earlier keeps; set latents.earlier 0, or leave latents.retain_images out"
            )
        if kept:
            count = round(self.config.earlier * len(prompts))
            of_earlier = pick_in_turn(kept, count, rng, self.config.pick, str)
            prompts = prompts[: len(prompts) - len(of_earlier)] + of_earlier
        look_at(images, self.model.image_size, "latents.retain_images")
        return prompts, images

    def _made(
        self,
        config: LatentConfig,
        what: str,
        prompts: tuple[str, ...],
        anchors: tuple[str, ...] | None,
        own: int | None,
        images: list[OwnImage],
        seed: int,
        power: float,
    ) -> LatentSet:
        # no more than there are noise levels
        check_ranges(self.config, {"steps": (1, self.model.timesteps)}, "latents")
        files = [image.path for image in images]
        return _cached(
            self.model, config, self.cache, what, prompts, anchors, own, files, seed, power
        )


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
        return _pick_pairs(concepts, config, rng), []
    images = read_folder(config.forget_images, config.captions)
    check_named(images, concepts)
    taken = take(config.forget_images, images, config.n_forget, seed, "latents.forget_images")
    check_named(taken, concepts)
    if captioned(taken):
        return forget_pairs(taken, concepts, config.n_forget, rng), taken
    return _pick_pairs(concepts, config, rng), taken


def _retain_rows(
    concepts: list[ConceptSpec], config: LatentConfig, seed: int, rng: random.Random
) -> tuple[list[str], list[OwnImage]]:
    """Prompts, and the images that go with them in turn: none, where they are sampled."""
    if not config.retain_images:
        return _pick_retain(concepts, config, rng), []
    images = that_stay(read_folder(config.retain_images, config.captions), concepts)
    taken = take(config.retain_images, images, config.n_retain, seed, "latents.retain_images")
    return retain_prompts(taken, config.n_retain) if captioned(taken) else _pick_retain(
        concepts, config, rng
    ), taken


def _pick_pairs(
    concepts: list[ConceptSpec], config: LatentConfig, rng: random.Random
) -> list[tuple[str, str]]:
    pairs = anchored_pairs(concepts)
    return pick_in_turn(pairs, config.n_forget, rng, config.pick, itemgetter(0))


def _pick_retain(
    concepts: list[ConceptSpec], config: LatentConfig, rng: random.Random
) -> list[str]:
    """Retain prompts of all concepts, less those that name any of the concepts."""
    listed = {prompt for concept in concepts for prompt in concept.retain}
    prompts = retained_prompts(concepts)
    if prompts and len(prompts) < len(listed):
        log.info(
            "%d of %d retain prompts name what is to be forgotten and are left out",
            len(listed) - len(prompts),
            len(listed),
        )
    if not prompts:
        raise ErasureError(
            f"no retain prompts are left for {', '.join(c.target for c in concepts)}; give some "
            "that do not name the concept"
        )
    return pick(prompts, config.n_retain, rng, config.pick, str)


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
    power: float,
) -> LatentSet:
    """The set of these prompts, of which the first `own` show what they say, found in the cache or
    made."""
    digests = [file_sha256(file) for file in files]
    # the prompts tell of `earlier`, and `guidance` is by now this set's own
    told = {"earlier", "retain_guidance"}
    facts = {name: value for name, value in config.facts.items() if name not in told}
    if config.trajectory and power != 1:
        facts["power"] = power
    frozen = frozen_facts(model.pipeline())
    key = json.dumps([model.fingerprint, frozen, prompts, anchors, own, digests, seed, facts])
    digest = hashlib.sha256(key.encode()).hexdigest()
    path = cache / f"{what}-{digest[:16]}.safetensors" if cache else None
    if path and exists_on_all(path):
        cached = LatentSet.load(path, digest)
        points = len(cached) // len(prompts)
        if (cached.prompts, cached.anchors) != (
            _times(prompts, points),
            anchors and _times(anchors, points),
        ):
            raise ErasureError(
                f"{path} holds other prompts than this run's; delete it to make it again"
            )
        return cached

    if files:
        mean, std = _encode(model, files, config.batch_size)
        rows = torch.arange(len(prompts)) % len(mean)
        latents = LatentSet(mean[rows], std[rows], prompts, anchors)
    else:
        latents = _sampled(model, config, what, prompts, anchors, own, seed, power)
    if path and processes().is_main_process:
        latents.save(path, {"base_fingerprint": model.fingerprint, "made_from": digest})
    return latents


def _sampled(
    model: DiffusionModel,
    config: LatentConfig,
    what: str,
    prompts: tuple[str, ...],
    anchors: tuple[str, ...] | None,
    own: int | None,
    seed: int,
    power: float,
) -> LatentSet:
    """Latents that the model makes of these prompts, and of the anchors in the place of all but the
    first `own`."""
    latents, noise, t = sample_points(
        model,
        prompts[:own] + (anchors[own:] if anchors else ()),
        seed,
        steps=config.steps,
        guidance=config.guidance,
        trajectory=config.trajectory,
        precision=config.mixed_precision,
        batch_size=config.batch_size,
        what=what,
        power=power,
    )
    points = len(latents) // len(prompts)
    image = torch.arange(len(latents)) // points
    return LatentSet(
        latents,
        None,
        _times(prompts, points),
        anchors and _times(anchors, points),
        None if own in (None, len(prompts)) else image >= own,
        None if t is None else image,
        noise,
        t,
    )


def _times(texts: tuple[str, ...], each: int) -> tuple[str, ...]:
    return tuple(text for text in texts for _ in range(each))


def _encode(model: DiffusionModel, files: list[Path], batch_size: int) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation of image files, at the model's resolution."""
    size = model.image_size

    def encode(rows: range) -> tuple[Tensor, Tensor]:
        mean, std = model.encode_images(torch.stack([read_image(files[row], size) for row in rows]))
        return mean.float().cpu(), std.float().cpu()

    means, stds = zip(
        *in_shares(len(files), batch_size, encode, "encoding images", "img"), strict=True
    )
    return torch.cat(means), torch.cat(stds)
