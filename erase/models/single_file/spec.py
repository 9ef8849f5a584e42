"""The header that checkpoint managers read: ModelSpec
(https://github.com/Stability-AI/ModelSpec)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from erase.models.pipelines import Pipeline, image_size, stock
from erase.models.single_file.architectures import sd_family
from erase.models.single_file.recognise import PREDICTIONS
from erase.prompts.errors import unknown

ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2-epsilon": "stable-diffusion-v2-512",
    "sd2-v_prediction": "stable-diffusion-v2-768-v",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sd3": "stable-diffusion-3",
    "flux-dev": "flux-1-dev",
    "flux-schnell": "flux-1-schnell",
    "z-image": "Z-Image",
    "flux-2-klein": "flux-2-klein",
    "qwen-image": "Qwen-Image",
}
"""family -> its name in ModelSpec"""
ORIGINAL = "https://github.com/Stability-AI/generative-models"
"""the implementation whose names the keys are; or one of these, or `diffusers`"""
SD3 = "https://github.com/Stability-AI/sd3.5"
FLUX = "https://github.com/black-forest-labs/flux"
FLUX2 = "https://github.com/black-forest-labs/flux2"
Z_IMAGE = "https://github.com/Tongyi-MAI/Z-Image"


def family_name(pipeline: Pipeline) -> str:
    """`sd1`, `sd2`, `sdxl`, `sd3`, `flux-dev`, ...: those of `ARCHITECTURES`."""
    return stock(pipeline).family or sd_family(pipeline.unet.config)


def prediction(schedule: Mapping[str, Any]) -> str:
    """`epsilon` or `v_prediction`."""
    stated: str = schedule.get("prediction_type", "epsilon")
    if stated not in PREDICTIONS:
        raise unknown("prediction type", stated, PREDICTIONS)
    return stated


def model_spec(
    pipeline: Pipeline, title: str, implementation: str, adapter: str = ""
) -> dict[str, str]:
    """ModelSpec's keys for weights of a pipeline: those that must be there, and the prediction
    type.

    Args:
        pipeline: whose weights they are, or of the base that an adapter is for.
        title: a name for people.
        implementation: whose names the keys are: `ORIGINAL`, `FLUX`, ... or `diffusers`.
        adapter: `lora`, or nothing for a checkpoint.
    """
    family, side = family_name(pipeline), image_size(pipeline)
    stated = (
        {}
        if hasattr(pipeline, "transformer")
        else {"prediction_type": PREDICTIONS[prediction(pipeline.scheduler.config)]}
    )
    architecture = ARCHITECTURES[
        f"sd2-{prediction(pipeline.scheduler.config)}" if family == "sd2" else family
    ]
    spec = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{architecture}/{adapter}" if adapter else architecture,
        "implementation": implementation,
        "title": title,
        "resolution": f"{side}x{side}",
    }
    return {f"modelspec.{key}": value for key, value in (spec | stated).items()}
