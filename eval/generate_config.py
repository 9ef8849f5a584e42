"""The settings that images are made by, and the schedulers that they choose from."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Any

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)

from erase.models import check_precision
from erase.models.schedules import sampler
from erase.prompts.errors import COUNT, FINITE, ErasureError, check_names, check_ranges

# name -> class, and what its name promises but another scheduler's config may not say
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),  # latents are not bounded by 1
    "dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "euler": (EulerDiscreteScheduler, {}),
    "lms": (LMSDiscreteScheduler, {}),
    # PLMS, as Stable Diffusion was released with
    "pndm": (
        PNDMScheduler,
        {"skip_prk_steps": True},
    ),
}
FLOW_SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpm++": (
        DPMSolverMultistepScheduler,
        {
            "algorithm_type": "dpmsolver++",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
        },
    ),
    "euler": (FlowMatchEulerDiscreteScheduler, {}),
}


@dataclass
class GenerateConfig:
    """How images are made of prompts."""

    scheduler: str = "dpm++"
    """ddim, dpm++, euler, lms or pndm"""
    steps: int = 20
    """denoising steps"""
    guidance: float = 5.0
    """classifier-free guidance scale, of which 1 is none, as diffusers mostly counts; a row's own
    wins. FLUX.1 dev embeds it (3.5 is usual there); schnell and a distilled klein have none"""
    resolution: int | None = None
    """pixels per side, a multiple of 8 (flow transformers but SD 3: of 16); default: the model's
    own"""
    batch_size: int = 32
    """images per batch, at most; it is one of the settings that an image depends on, by rounding"""

    mixed_precision: str = "no"
    """no, bf16 or fp16: denoise and decode under autocast; on a CPU that has bf16 1.6 times as fast
    (docs/performance.md)"""

    def __post_init__(self) -> None:
        check_precision(self.mixed_precision)
        check_ranges(self, {"steps": COUNT, "batch_size": COUNT, "guidance": FINITE})
        check_names(self, {"scheduler": SCHEDULERS})
        if self.resolution is not None and (self.resolution < 8 or self.resolution % 8):
            raise ErasureError(
                f"resolution is {self.resolution} pixels; it must be a multiple of 8"
            )


def scheduler_of(own: Any, name: str, told: bool = False) -> Any:
    """A scheduler by name, with the noise levels and prediction type of the checkpoint's own.

    Args:
        own: the checkpoint's.
        name: of `SCHEDULERS`.
        told: whether the pipeline tells its scheduler the shift of its noise levels, as FLUX's
            does.
    """
    flow = isinstance(own, FlowMatchEulerDiscreteScheduler)
    choices = FLOW_SCHEDULERS if flow else SCHEDULERS
    if name not in choices:
        raise ErasureError(
            f"scheduler {name} does not know flow matching, which this model was trained by; use "
            f"{' or '.join(choices)}"
        )
    scheduler, options = choices[name]
    shift = {"flow_shift": own.config.shift} if flow else {}
    found = sampler(own, scheduler, name, {**options, **shift})
    if told and scheduler is not type(own):
        found.register_to_config(**_shift_to_tell(own.config, name))
    return found


def _shift_to_tell(own: Any, name: str) -> dict[str, Any]:
    """The settings of another scheduler by which a pipeline that reckons the shift, as e^mu with mu
    linear in the image's patches, comes to the checkpoint's."""
    shifts = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    if not own.use_dynamic_shifting:
        mu = log(own.shift)
        told = {"base_shift": mu, "max_shift": mu}
    elif own.time_shift_type == "exponential":
        told = {option: own[option] for option in shifts}
    else:
        raise ErasureError(
            f"scheduler {name} does not know this model's time_shift_type "
            f"{own.time_shift_type!r}; use euler"
        )
    return {"use_dynamic_shifting": True, "time_shift_type": "exponential", **told}
