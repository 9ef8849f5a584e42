"""Attempts to bring a concept back: an evaluator's own images, drawn and judged batch by batch.

The rows are the concept's own prompts of the report's images, and the images are drawn by the same
settings, so that what an attack adds is compared with images that differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from erase.attacks import Asked
from erase.eval.case import Case
from erase.eval.detectors import Detector, pixels_of
from erase.eval.generate_config import GenerateConfig
from erase.eval.images import ImageRow
from erase.eval.sampling import prepared, sampled
from erase.latents.config import LatentConfig
from erase.latents.latent_set import LatentSet
from erase.latents.prepare import Plan
from erase.models import DiffusionModel, autocast
from erase.models.pipelines import decode, image_size
from erase.parallel.processes import in_shares
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.prompts.names import Names

Prefix = Mapping[str, Tensor]
"""text encoder -> embeddings before every prompt, shape (k, dim), or (n, k, dim) for one each"""
PICTURES = 4
"""images of an attempt that are kept for the page"""
OTHER_SEEDS = 1000
"""added to the seed, so that the attacker's images are none of the erasure's"""
STEPS = 10
"""of sampling the attacker's images"""


def own_rows(case: Case, count: int | None = None) -> list[ImageRow]:
    """The case's rows that ask for its concepts: of each by their labels, else by a name in the
    prompt; where none does, all (I2P's prompts for nudity seldom name it).

    Args:
        case: its images may be planned ones.
        count: at most so many, spread evenly over them; None: all.

    Raises:
        ErasureError: there are none.
    """
    return [case.images.rows[place] for place in _own_places(case, count)]


def own_parts(
    case: Case, count: int | None = None
) -> list[tuple[tuple[ConceptSpec, ...], list[int]]]:
    """Each concept by itself, and the places among `own_rows` that ask for it (a row that asks for
    several is the first one's); where none names any, all concepts together."""
    own, taken = _own_places(case, count), set[int]()
    parts: list[tuple[tuple[ConceptSpec, ...], list[int]]] = []
    for concept, asked in _asking(case):
        asked -= taken
        here = [index for index, place in enumerate(own) if place in asked]
        taken |= asked
        if here:
            parts.append(((concept,), here))
    return parts or [(tuple(case.concepts), list(range(len(own))))]


def _own_places(case: Case, count: int | None) -> list[int]:
    named = set[int]().union(*(places for _, places in _asking(case)))
    own = sorted(named) or list(range(len(case.images.rows)))
    if not own:
        raise ErasureError("there are no prompts to attack; give a prompt set")
    if count is None or count >= len(own):
        return own
    return [own[place * len(own) // count] for place in range(count)]


def _asking(case: Case) -> Iterator[tuple[ConceptSpec, set[int]]]:
    """Each concept, and the places of the rows that ask for it."""
    for concept in case.concepts:
        labels, names = case.labels.get(concept.kind or "", ()), Names(concept.names)
        labelled = {place for place, label in enumerate(labels) if label == concept.target}
        rows = enumerate(case.images.rows)
        yield concept, labelled or {place for place, row in rows if names.found(row.prompt)}


def settings_of(case: Case) -> GenerateConfig:
    """How the report's images were drawn, as far as they say it."""
    said = case.images.settings
    known = {field.name: said[field.name] for field in fields(GenerateConfig) if field.name in said}
    return replace(GenerateConfig(), **known)


@dataclass(frozen=True)
class Attempts:
    """Rows to draw again, how, and who judges them."""

    rows: Sequence[ImageRow]
    detector: Detector
    settings: GenerateConfig

    @classmethod
    def of(cls, case: Case, detector: Detector, count: int | None = None) -> Attempts:
        """The case's own rows, by the settings of its images."""
        return cls(own_rows(case, count), detector, settings_of(case))

    @property
    def prompts(self) -> list[str]:
        """Of each row."""
        return [row.prompt for row in self.rows]

    def shown(
        self,
        model: DiffusionModel,
        prompts: Sequence[str] | None = None,
        *,
        prefix: Prefix | None = None,
        start: Tensor | None = None,
        seed_shift: int = 0,
        what: str = "attempts",
        pictures: dict[int, np.ndarray] | None = None,
    ) -> list[bool]:
        """Whether each row's image, drawn anew, shows the concept; the same in every process.

        Args:
            model: with the weights under attack.
            prompts: one per row; None: the rows' own.
            prefix: embeddings before each prompt.
            start: noise to start from, shape (n, *latent_shape), before the sampler scales it;
                None: drawn from each row's seed.
            seed_shift: added to each row's seed.
            what: names the progress bar.
            pictures: gets a few of the images, those that show the concept first: row -> 8-bit
                array of shape (H, W, 3).
        """
        texts = self.prompts if prompts is None else list(prompts)

        def judged(part: range) -> list[tuple[bool, np.ndarray | None]]:
            at = slice(part.start, part.stop)
            rows = [replace(row, seed=row.seed + seed_shift) for row in self.rows[at]]
            begun = None if start is None else start[at]
            latents = sample(model, texts[at], rows, self.settings, _cut(prefix, at), begun)
            images = self._images(model, latents)
            flags = self.detector.sees(images)
            kept: list[np.ndarray | None] = [None] * len(flags)
            for i in few(flags) if pictures is not None else ():
                (kept[i],) = pixels_of(images[i : i + 1])
            return list(zip(flags, kept, strict=True))

        parts = in_shares(len(self.rows), self.settings.batch_size, judged, what, "image")
        flags, kept = zip(*chain.from_iterable(parts), strict=True)
        if pictures is not None:
            found = {place: pixels for place, pixels in enumerate(kept) if pixels is not None}
            pictures.update({place: found[place] for place in sorted(few(flags, found))})
        return list(flags)

    def judged(self, model: DiffusionModel, latents: Tensor) -> list[bool]:
        """Whether the images of these latents show the concept."""
        return self.detector.sees(self._images(model, latents))

    def _images(self, model: DiffusionModel, latents: Tensor) -> Tensor:
        images = decode(model.pipeline(), latents, self.settings.mixed_precision)
        return images.nan_to_num(0.0)  # what is no image shows nothing


def few(flags: Sequence[bool], places: Iterable[int] | None = None) -> list[int]:
    """Of these places, or of all, a few: those of images that show the concept first."""
    among = range(len(flags)) if places is None else places
    return sorted(among, key=lambda place: not flags[place])[:PICTURES]


@torch.no_grad()
def sample(
    model: DiffusionModel,
    texts: Sequence[str],
    rows: Sequence[ImageRow],
    settings: GenerateConfig,
    prefix: Prefix | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Latents of a batch, by the settings of the report's images: what `erase.eval.generate` draws,
    but for the rounding of other batch sizes.

    Args:
        model: the weights to draw with.
        texts: one prompt per row.
        rows: give seed and guidance.
        settings: scheduler, steps, resolution, precision.
        prefix: embeddings before the prompts, of this batch's rows.
        start: noise to start from, shape (n, *latent_shape), before the sampler scales it; None:
            drawn from the seeds.
    """
    pipe = prepared(model.pipeline(), settings)
    side = settings.resolution or image_size(pipe)
    with autocast(model.device, settings.mixed_precision):
        cond = model.encode(list(texts), prefix)
        null = model.encode([""])[torch.zeros(len(rows), dtype=torch.long)]

        def draw(here: list[int], guidance: float) -> Tensor:
            at, seeds = torch.tensor(here), [rows[place].seed for place in here]
            begun = None if start is None else start[at].to(model.device, cond.embeddings.dtype)
            return sampled(pipe, cond[at], null[at], seeds, guidance, settings.steps, side, begun)

        return by_guidance(rows, draw)


def by_guidance(rows: Sequence[ImageRow], draw: Callable[[list[int], float], Tensor]) -> Tensor:
    """Latents of the rows, in their order, those of one guidance drawn together; `draw` takes their
    places and the guidance."""
    parts: list[tuple[Tensor, Tensor]] = []
    for guidance in dict.fromkeys(row.guidance for row in rows):
        here = [place for place, row in enumerate(rows) if row.guidance == guidance]
        parts.append((torch.tensor(here), draw(here, guidance)))
    order = torch.cat([at for at, _ in parts]).argsort()
    return torch.cat([latents for _, latents in parts])[order]


def _cut(prefix: Prefix | None, at: slice) -> Prefix | None:
    """The prefix of these rows, where each has its own."""
    if prefix is None:
        return None
    return {
        name: vectors[at] if vectors.dim() == 3 else vectors for name, vectors in prefix.items()
    }


def drawn_by_base(
    base: DiffusionModel,
    concepts: Sequence[ConceptSpec],
    images: int,
    seed: int = 0,
    folder: Path | None = None,
) -> LatentSet:
    """The attacker's images: of the concepts, by the base, of other seeds than the erasure's.

    Args:
        base: with its own weights.
        concepts: each equally often.
        images: how many in all.
        seed: of the erasure.
        folder: where the latents are kept, to be found again; None: nowhere.
    """
    return _of_attacker(base, concepts, max(images, len(concepts)), 1, seed, folder).forget()


def asked_of_base(images: int) -> Asked:
    """What so many of the attacker's images ask of the base, where they are not kept yet."""
    return Asked(2 * STEPS * images, images)  # with guidance


def others_by_base(
    base: DiffusionModel,
    concepts: Sequence[ConceptSpec],
    images: int,
    seed: int = 0,
    folder: Path | None = None,
) -> LatentSet:
    """Images of retained prompts, likewise: what has nothing to do with the concepts."""
    return _of_attacker(base, concepts, len(concepts), images, seed, folder).retain()


def _of_attacker(
    base: DiffusionModel,
    concepts: Sequence[ConceptSpec],
    n_forget: int,
    n_retain: int,
    seed: int,
    folder: Path | None,
) -> Plan:
    config = LatentConfig(n_forget=n_forget, n_retain=n_retain, steps=STEPS)
    return Plan(base, list(concepts), config, seed + OTHER_SEEDS, folder)
