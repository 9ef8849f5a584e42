"""The request of a launch, as `accelerate launch` leaves it in the environment: FSDP, or something
that is refused."""

from __future__ import annotations

import os
from dataclasses import dataclass

from accelerate.utils import parse_flag_from_env

from erase.prompts.errors import ErasureError

WRAPPERS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
"""what Accelerate sets in the environment -> the ways to launch that take a model apart as no step
here could follow"""
FSDP = "ACCELERATE_USE_FSDP"
UNFIT = {
    "FSDP_OFFLOAD_PARAMS": (
        "shards stay where the steps are; take more GPUs, or a narrower scope or mask"
    ),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (
        "every process reads the checkpoint itself, and some libraries would then read none of it"
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": "the recipe says it, with train.gradient_checkpointing",
}
"""switches of an FSDP config that must be off -> why, or what to use instead"""
CONFIGS = "scripts/launch/fsdp.yaml (or fsdp-zero2.yaml, which keeps the weights gathered)"


@dataclass(frozen=True)
class FullShard:
    """An FSDP launch of version 2: weights, gradients and optimizer state in shards, one per
    process."""

    reshard_after_forward: bool
    """drop a block's gathered weights after its forward pass (ZeRO stage 3), or keep them for the
    backward pass (stage 2)"""


def check_launch() -> None:
    """Refuse a launch that this project cannot follow.

    Raises:
        ErasureError: DeepSpeed or the like, or FSDP of version 1 or with a switch of `UNFIT`.
    """
    for variable, name in WRAPPERS.items():
        if parse_flag_from_env(variable):
            raise ErasureError(
                f"this launch asks for {name}, which takes the model apart in its own way, while "
                "masked training holds its weights outside of it; launch with "
                f"scripts/launch/several-gpus.yaml, or, to split the model, with {CONFIGS}"
            )
    full_shard()


def full_shard() -> FullShard | None:
    """The FSDP that this launch asks for; None: none.

    Raises:
        ErasureError: as `check_launch`.
    """
    if not parse_flag_from_env(FSDP):
        return None
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ErasureError(
            f"this launch asks for FSDP version {version}, which takes the model apart and keeps "
            f"it so; use version 2 with {CONFIGS}, or whole models with "
            "scripts/launch/several-gpus.yaml"
        )
    for variable, reason in UNFIT.items():
        if parse_flag_from_env(variable):
            raise ErasureError(
                f"this launch sets {variable.lower()}, but {reason}; set it to false, as in "
                f"{CONFIGS}"
            )
    try:
        return FullShard(parse_flag_from_env("FSDP_RESHARD_AFTER_FORWARD", True))
    except ValueError as error:
        raise ErasureError(
            "fsdp_reshard_after_forward is true or false under FSDP version 2, not "
            f"{os.environ['FSDP_RESHARD_AFTER_FORWARD']}; see {CONFIGS}"
        ) from error
