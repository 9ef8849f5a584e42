"""Settings of training, which every method that takes gradient steps has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from erase.prompts.errors import BELOW_ONE, COUNT, POSITIVE, ErasureError, check_ranges

MOST_STEPS, MOST_ROWS = 10**7, 2**16
"""bounds against slips of the keyboard: what a run could never finish, and what no memory holds"""


@dataclass
class TrainConfig:
    """How gradient steps are taken."""

    steps: int = 150
    """optimizer steps"""
    lr: float = 1e-4
    """learning rate of the first step"""
    schedule: str = "constant"
    """how it goes on: constant, linear or cosine (both down to zero after the last step)"""
    batch_size: int = 16
    """forget rows per optimizer step, over all processes and accumulated parts; as many retain rows"""
    accumulation: int = 1
    """parts into which each batch is split to save memory; the result is the same to rounding"""
    optimizer: str = "Adam"
    """a class of torch.optim by name (but LBFGS, Muon, SparseAdam); or one of bitsandbytes.optim, where installed: AdamW8bit takes a quarter of the state"""
    optimizer_args: dict[str, Any] = field(default_factory=dict)
    """further arguments of the optimizer, e.g. {weight_decay: 0.01, momentum: 0.9}"""
    max_grad_norm: float | None = None
    """clip the norm of the masked gradient to this; None: no clipping"""
    mixed_precision: str = "no"
    """no, bf16, or fp16 (with loss scaling; needs a GPU); what is trained and the optimizer state stay float32"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    selective_recompute: bool = False
    """recompute only what is cheap (norms, SiLU, GELU, products): about half of the activations' memory, 7 % more time, the same bits"""
    attention: str = "auto"
    """kernel of the denoiser's attention: auto (plain for small latents on a CPU, else sdpa), sdpa, xformers or sliced"""
    channels_last: bool = False
    """convolutions with the channels innermost in memory: for GPUs with tensor cores; slower on a CPU"""
    compile: bool = False
    """torch.compile the denoiser: needs a C++ compiler and minutes before the first step"""
    offload: bool = False
    """keep on the CPU what the steps do not use: VAE, text encoders, and with mixed precision the float32 weights of the base"""
    shard_optimizer: bool = False
    """split the optimizer's state among the processes (ZeRO stage 1): the same result, with less memory on each; stages 2 and 3
    are launches: scripts/launch/fsdp-zero2.yaml, fsdp.yaml"""
    ema: float | None = None
    """decay of an exponential moving average that the result is taken from; None: the last weights"""
    checkpoint_every: int = 50
    """steps between saved training states; a stopped run goes on from the last one"""

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("steps", "batch_size", "accumulation", "checkpoint_every"), COUNT)
        check_ranges(self, {**counts, "lr": POSITIVE, "max_grad_norm": POSITIVE, "ema": BELOW_ONE})
        check_ranges(self, {"steps": (1, MOST_STEPS), "batch_size": (1, MOST_ROWS)})
        if not isinstance(self.optimizer_args, dict) or not all(isinstance(name, str) for name in self.optimizer_args):
            raise ErasureError(
                f"optimizer_args is {self.optimizer_args!r}; it must be names with values, e.g. {{weight_decay: 0.01}}"
            )
        for other in ("gradient_checkpointing", "compile"):
            if self.selective_recompute and getattr(self, other):
                raise ErasureError(f"selective_recompute and {other} both decide what is recomputed; choose one")
