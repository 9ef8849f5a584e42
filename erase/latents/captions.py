"""Prompts for a user's own images: their captions, or the names of their folders.

An image to forget needs a caption that names a concept: the anchor prompt is the caption with the
anchor in the concept's place. A folder's name stands for a thing, so it goes into templates: those
of the concept that it names, or the general ones.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence

from erase.latents.image_folders import OwnImage
from erase.prompts.concepts import TEMPLATES, ConceptSpec
from erase.prompts.errors import ErasureError
from erase.prompts.names import Names
from erase.prompts.several import Together

log = logging.getLogger("erase")


def captioned(images: Sequence[OwnImage]) -> bool:
    """Whether they bring words of their own; all of a folder do, or none."""
    return images[0].words is not None


def check_named(images: Sequence[OwnImage], concepts: Sequence[ConceptSpec]) -> None:
    """Refuse forget images that do not say which of the concepts they show.

    Raises:
        ErasureError: captions that name none, a concept that none names, or no captions beside
            several concepts.
    """
    if not captioned(images):
        if len(concepts) > 1:
            raise ErasureError(
                f"{len(concepts)} concepts, and nothing says which of them each image of "
                "latents.forget_images shows; name the folders after the concepts and set "
                "latents.captions to folder, or write a .txt beside each image"
            )
        return
    named = Names(name for concept in concepts for name in concept.names)
    names_in = {image: named.found(image.words or "") for image in images}
    if unnamed := [image for image, names in names_in.items() if not names]:
        raise ErasureError(
            f"{len(unnamed)} of {len(images)} captions of latents.forget_images do not name what "
            f"is to be forgotten ({unnamed[0].path}: {unnamed[0].words!r}); name "
            f"{_titles(concepts)} there, add a synonym to the concept, or set latents.captions to "
            "none"
        )
    for concept in concepts:
        if not any(set(concept.names) & set(names) for names in names_in.values()):
            raise ErasureError(
                f"no caption of the {len(images)} images of latents.forget_images names "
                f"{concept.target!r}; give it some, or raise latents.n_forget"
            )


def forget_pairs(
    images: Sequence[OwnImage], concepts: Sequence[ConceptSpec], n: int, rng: random.Random
) -> list[tuple[str, str]]:
    """`n` pairs of forget and anchor prompt, for captioned images in turn."""
    owner = {name: concept for concept in concepts for name in concept.names}
    named, together = Names(owner), Together(concepts)
    turns = {
        concept.target: _turns(concept.pairs(together.anchor_templates(concept)), rng)
        for concept in concepts
    }
    pairs = []
    for image in (images[i % len(images)] for i in range(n)):
        if image.caption is not None:
            pairs.append((image.caption, together.anchored(image.caption)))
        else:
            pairs.append(next(turns[owner[named.found(image.words or "")[0]].target]))
    return pairs


def that_stay(images: Sequence[OwnImage], concepts: Sequence[ConceptSpec]) -> list[OwnImage]:
    """The retain images whose captions name none of the concepts; how many others there were is
    said.

    Raises:
        ErasureError: none is left.
    """
    if not captioned(images):
        return list(images)
    named = Names(name for concept in concepts for name in concept.names)
    remaining = [image for image in images if not named.found(image.words or "")]
    if not remaining:
        raise ErasureError(
            f"the captions of all {len(images)} images of latents.retain_images name "
            f"{_titles(concepts)}; give images of other things"
        )
    if len(remaining) < len(images):
        left_out = len(images) - len(remaining)
        log.info(
            "latents.retain_images: %d of %d images are left out, whose captions name what is to "
            "go",
            left_out,
            len(images),
        )
    return remaining


def retain_prompts(images: Sequence[OwnImage], n: int) -> list[str]:
    """`n` prompts, for captioned images in turn."""
    turns = ((i, images[i % len(images)]) for i in range(n))
    return [
        image.caption
        or TEMPLATES[(i + i // len(images)) % len(TEMPLATES)].replace("{}", image.subject or "")
        for i, image in turns
    ]


def _turns(pairs: list[tuple[str, str]], rng: random.Random) -> Iterator[tuple[str, str]]:
    """Endless shuffled rounds."""
    while True:
        yield from rng.sample(pairs, len(pairs))


def _titles(concepts: Sequence[ConceptSpec]) -> str:
    return " or ".join(repr(concept.target) for concept in concepts)
