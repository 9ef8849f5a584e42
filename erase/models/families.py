"""The families: which pipeline class is whose, and what is said of their siblings."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from erase.prompts.errors import ErasureError

FAMILIES = {
    "StableDiffusionPipeline": ("erase.models.sd", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("erase.models.sdxl", "StableDiffusionXL"),
    "StableDiffusion3Pipeline": ("erase.models.sd3", "StableDiffusion3"),
    "FluxPipeline": ("erase.models.flux", "Flux"),
    "ZImagePipeline": ("erase.models.z_image", "ZImage"),
    "Flux2KleinPipeline": ("erase.models.flux2", "Klein"),
    "QwenImagePipeline": ("erase.models.qwen_image", "QwenImage"),
}
"""pipeline class in model_index.json -> where its `DiffusionModel` is"""
SIBLINGS = {
    "Edit": "edits images that are given to it",
    "Kontext": "edits images that are given to it",
    "Omni": "edits images that are given to it",
    "Control": "follows an image that is given to it",
    "Inpaint": "fills images that are given to it",
    "Fill": "fills images that are given to it",
    "Img2Img": "starts from an image that is given to it",
    "Layered": "takes images apart into layers",
}
"""word in the name of a pipeline class -> what a model of that kind does"""


def family_of(pipeline: Any, name: str) -> Any:
    """The `DiffusionModel` class for a pipeline.

    Raises:
        ErasureError: a pipeline class that none supports.
    """
    kind = type(pipeline).__name__
    if kind not in FAMILIES:
        raise unsupported(f"{name} is a {kind}", kind)
    module, cls = FAMILIES[kind]
    return getattr(import_module(module), cls)


def unsupported(what: str, kind: str) -> ErasureError:
    """The refusal of a pipeline class; `what` says where it stands."""
    for word, does in SIBLINGS.items():
        if word in kind:
            return ErasureError(
                f"{what}, which {does}; give the text-to-image model of its family; supported: "
                f"{', '.join(FAMILIES)}"
            )
    return ErasureError(f"{what}, which is not supported; supported: {', '.join(FAMILIES)}")
