"""Noise schedules: the schedulers of diffusers that a model can be trained and sampled by."""

from __future__ import annotations

from inspect import signature
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin

from erase.prompts.errors import ErasureError, reason

BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""schedules of beta that all samplers know"""


def scheduler_class(name: object) -> Any:
    """diffusers' scheduler of this name, or None."""
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    return kind if isinstance(kind, type) and issubclass(kind, SchedulerMixin) else None


def knows_zero_snr(kind: Any) -> bool:
    """Whether a scheduler can end in pure noise (zero terminal signal-to-noise ratio)."""
    return "rescale_betas_zero_snr" in signature(kind.__init__).parameters


def check_diffusion(own: Any, name: str) -> None:
    """Refuse a scheduler that does not say at which noise levels an epsilon or v model was trained.

    Raises:
        ErasureError: names the scheduler, or what its configuration says.
    """
    kind, config = type(own).__name__, own.config
    if (
        kind.startswith("FlowMatch")
        or config.get("use_flow_sigmas")
        or config.get("prediction_type") == "flow_prediction"
    ):
        raise ErasureError(
            f"{name}: its scheduler ({kind}) is one of flow matching, which Stable Diffusion 1, 2 "
            "and XL are not trained by"
        )
    alphas = getattr(own, "alphas_cumprod", None)
    if kind.startswith("EDM") or not torch.is_tensor(alphas):
        raise ErasureError(
            f"{name}: its scheduler ({kind}) has another noise schedule than Stable Diffusion's, "
            "and is not supported"
        )
    if config.get("trained_betas") is None and config.get("beta_schedule") not in BETAS:
        raise ErasureError(
            f"{name}: its noise schedule (beta_schedule {config.get('beta_schedule')!r}) is not "
            f"supported; supported: {', '.join(BETAS)}"
        )
    if len(alphas) != config.num_train_timesteps or not bool(((alphas >= 0) & (alphas <= 1)).all()):
        raise ErasureError(
            f"{name}: its scheduler gives {len(alphas)} noise levels, not "
            f"{config.num_train_timesteps} between 0 and 1"
        )
    if config.get("rescale_betas_zero_snr") and not knows_zero_snr(type(own)):
        raise ErasureError(
            f"{name}: a {kind} does not know rescale_betas_zero_snr, which its configuration asks "
            "for; name DDIMScheduler in scheduler/scheduler_config.json and model_index.json"
        )


def check_flow(own: Any, name: str, by_size: bool = False, stretched: bool = False) -> None:
    """Refuse a scheduler of rectified flow whose noise levels are not the shifted linear ones.

    Args:
        own: the model's own scheduler.
        name: what errors call the model.
        by_size: whether the shift may depend on the image's size.
        stretched: whether the sampler's levels may be stretched (`shift_terminal`).

    Raises:
        ErasureError: names the scheduler, or what its configuration says.
    """
    if not isinstance(own, FlowMatchEulerDiscreteScheduler):
        raise ErasureError(
            f"{name}: its scheduler is a {type(own).__name__}; a FlowMatchEulerDiscreteScheduler "
            "is needed"
        )
    config: Any = own.config  # type: ignore[attr-defined]  # made at run time
    if config.get("use_dynamic_shifting") and not by_size:
        raise ErasureError(
            f"{name}: a schedule whose shift depends on the image's size is not supported"
        )
    for option in ("invert_sigmas",) if stretched else ("shift_terminal", "invert_sigmas"):
        if config.get(option):
            raise ErasureError(f"{name}: a schedule with {option} is not supported")


def sampler(own: Any, kind: Any, name: str, options: dict[str, Any] | None = None) -> Any:
    """A scheduler of another class over the noise levels of a model's own.

    Args:
        own: the model's own scheduler.
        kind: the class wanted.
        name: what errors call it.
        options: what its name promises, and the own one's configuration may not say.

    Raises:
        ErasureError: that class cannot be built over this configuration, or would sample on other
            noise levels.
    """
    try:
        scheduler = kind.from_config(own.config, **(options or {}))
    except Exception as error:  # a value in the configuration can upset it anywhere
        raise ErasureError(
            f"scheduler {name} cannot take this model's noise schedule: {reason(error)}; use "
            "another"
        ) from error
    mine, theirs = getattr(own, "alphas_cumprod", None), getattr(scheduler, "alphas_cumprod", None)
    if torch.is_tensor(mine) and not isinstance(own, FlowMatchEulerDiscreteScheduler):
        if (
            not torch.is_tensor(theirs)
            or mine.shape != theirs.shape
            or not torch.allclose(mine, theirs, atol=1e-6)
        ):
            why = " (it ends in pure noise)" if own.config.get("rescale_betas_zero_snr") else ""
            raise ErasureError(
                f"scheduler {name} would sample on another noise schedule than this model's{why}; "
                "use ddim, dpm++ or euler"
            )
    return scheduler
