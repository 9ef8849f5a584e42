"""What the tests of round trips share: a family's base, erased in two steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import diffusers
import numpy as np
from diffusers import DiffusionPipeline

from erase.latents.config import LatentConfig
from erase.methods.salun import SalUnConfig
from erase.models import LoadConfig, load_model
from erase.models.single_file import write_single_file
from erase.prompts.concepts import ConceptSpec
from erase.run import EraseConfig, erase_concept
from erase.training.config import MaskConfig, TrainConfig

CONCEPT = ConceptSpec("heart", "star", retain=("a red house", "a blue moon"))
QUICK = EraseConfig(latents=LatentConfig(n_forget=4, n_retain=4, steps=2))
METHOD = SalUnConfig(
    mask=MaskConfig(batch_size=4), train=TrainConfig(steps=2, batch_size=2, lr=1e-3)
)
Image = Callable[[DiffusionPipeline], np.ndarray]


class Made:
    """A family's base folder, its delta, and the erased model's image in memory."""

    def __init__(self, make: Callable[[], DiffusionPipeline], image: Image, folder) -> None:
        self.base, self.make = folder / "base", make
        pipeline = make()
        self.kind = type(pipeline).__name__
        pipeline.save_pretrained(self.base)
        model = load_model(self.base)
        self.plain = image(model.pipeline())
        self.delta = erase_concept(CONCEPT, QUICK, METHOD, model=model, out=folder / "run")
        self.image = image(self.delta.apply(model).pipeline())

    def stock(self, path) -> DiffusionPipeline:
        """A single file of a whole pipeline through stock diffusers, its configs from the base's
        folder."""
        return getattr(diffusers, self.kind).from_single_file(
            path, config=str(self.base), local_files_only=True
        )

    def from_one_file(self, path, out):
        """The delta of the same erasure with the base in one file."""
        config = EraseConfig(
            model=str(path), latents=QUICK.latents, load=LoadConfig(config=str(self.base))
        )
        return erase_concept(CONCEPT, config, METHOD, out=out)

    def write_base(self, path):
        """The base in one file."""
        return write_single_file(self.make(), path)


def maker(
    families: Mapping[str, Callable[[], DiffusionPipeline]], image: Image, tmp_path_factory
) -> Callable[[str], Made]:
    """Makes a family's once, when it is first asked for."""
    found: dict[str, Made] = {}

    def make(family: str) -> Made:
        if family not in found:
            found[family] = Made(families[family], image, tmp_path_factory.mktemp(family))
        return found[family]

    return make
