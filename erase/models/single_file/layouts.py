"""Families whose files hold a transformer, and not the whole of a pipeline: how it lies there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from erase.models.pipelines import Pipeline
from erase.models.single_file import bfl, ldm, mmdit, qwen_image, z_image
from erase.models.single_file.ldm import UNET, Entry, Network
from erase.models.single_file.spec import FLUX, FLUX2, SD3, Z_IMAGE
from erase.models.single_file.tensor_file import TensorFile


@dataclass(frozen=True)
class Beside:
    """A part of a pipeline that a file may hold beside its transformer."""

    component: str
    prefix: str
    """of its keys"""
    table: Callable[[Network], list[Entry]]
    written: bool = False
    """whether a file that is written holds it"""
    stated: Callable[[Network], dict[str, Tensor]] = lambda _: {}
    """weights that no file holds because they are the same for all"""


@dataclass(frozen=True)
class Layout:
    """How a transformer lies in a file."""

    name: str
    """of the family, for people"""
    pipeline: str
    network: str
    """the transformer's class"""
    origin: str
    """the implementation whose names the keys are"""
    holds: Callable[[TensorFile], bool]
    table: Callable[[Network], list[Entry]]
    """of the transformer, its keys bare"""
    prefix: str = ""
    """before them in a file that is written; one that is read may have any of
    `ldm.BEFORE` there"""
    beside: tuple[Beside, ...] = ()
    spare: str = ""
    """a regular expression of keys that no program uses"""
    siblings: tuple[tuple[str, str], ...] = ()
    """pattern of a key that only a sibling of the family has -> which that is"""

    @property
    def written(self) -> tuple[str, ...]:
        """The parts of a pipeline that a file which is written holds."""
        return ("transformer", *(part.component for part in self.beside if part.written))

    @property
    def held(self) -> str:
        """These, in words."""
        return "transformer and VAE" if "vae" in self.written else "transformer alone"

    @property
    def place(self) -> str:
        """Where ComfyUI looks for such a file."""
        return f"models/{'checkpoints' if 'vae' in self.written else 'diffusion_models'}"

    def entries(self, modules: Mapping[str, Network], prefix: str = "") -> list[Entry]:
        """Every tensor of a file with these parts, the transformer's keys behind `prefix`."""
        bare = self.table(modules["transformer"])
        found = [replace(entry, key=prefix + entry.key) for entry in bare]
        for part in self.beside:
            if part.component in modules:
                found += part.table(modules[part.component])
        return found


LAYOUTS = (
    Layout(
        "Stable Diffusion 3",
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        SD3,
        mmdit.is_sd3,
        mmdit.table,
        UNET,
        (
            Beside("vae", ldm.VAE, ldm.vae_table, written=True),
            Beside("text_encoder", mmdit.CLIP_L, mmdit.clip_l, stated=mmdit.projection),
            Beside("text_encoder_2", mmdit.CLIP_G, mmdit.clip_g),
            Beside("text_encoder_3", mmdit.T5, mmdit.t5),
        ),
        mmdit.SPARE,
    ),
    Layout("FLUX.1", "FluxPipeline", "FluxTransformer2DModel", FLUX, bfl.is_flux, bfl.flux),
    Layout(
        "FLUX.2 klein",
        "Flux2KleinPipeline",
        "Flux2Transformer2DModel",
        FLUX2,
        bfl.is_flux2,
        bfl.flux2,
        siblings=bfl.DEV2,
    ),
    Layout(
        "Z-Image",
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        Z_IMAGE,
        z_image.is_z_image,
        z_image.table,
        spare=z_image.SPARE,
    ),
    Layout(
        "Qwen-Image",
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        "diffusers",
        qwen_image.is_qwen_image,
        qwen_image.table,
        siblings=qwen_image.SIBLINGS,
    ),
)


def layout_in(file: TensorFile) -> Layout | None:
    """The layout of a file that holds a transformer of one of these families."""
    return next((layout for layout in LAYOUTS if layout.holds(file)), None)


def layout_of(pipeline: Pipeline) -> Layout | None:
    """The layout in which a pipeline's transformer is published."""
    kind = type(pipeline).__name__
    return next((layout for layout in LAYOUTS if layout.pipeline == kind), None)
