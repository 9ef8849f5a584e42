"""The settings that images are made by, and the schedulers that they choose from."""

from __future__ import annotations

from dataclasses import dataclass
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
    """classifier-free guidance scale, as diffusers counts it (1 is none); a row's own wins"""
    resolution: int | None = None
    """pixels per side, a multiple of 8; default: the model's own"""
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


def scheduler_of(own: Any, name: str) -> Any:
    """A scheduler by name, with the noise levels and prediction type of the checkpoint's own."""
    flow = isinstance(own, FlowMatchEulerDiscreteScheduler)
    choices = FLOW_SCHEDULERS if flow else SCHEDULERS
    if name not in choices:
        raise ErasureError(
            f"scheduler {name} does not know flow matching, which this model was trained by; use "
            f"{' or '.join(choices)}"
        )
    scheduler, options = choices[name]
    shift = {"flow_shift": own.config.shift} if flow else {}
    return sampler(own, scheduler, name, {**options, **shift})
