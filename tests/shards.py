"""What tests of shards and their program share: a model, settings, launches, a few steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from erase.mask import SaliencyMask
from erase.models import DiffusionModel
from erase.models.scopes import select
from erase.models.sd import StableDiffusion
from erase.models.waiting import Waiting, waiting
from erase.parallel.fsdp import BF16
from erase.parallel.launch import FSDP
from erase.training.checkpoint import Checkpoint
from erase.training.config import TrainConfig, TunedConfig
from erase.training.loop import Fitted, fit
from erase.training.running import running
from erase.training.trainable import Base
from tests.launching import ROOT

LAUNCH = ROOT / "scripts" / "launch"
LAUNCHES = ("fsdp", "fsdp-zero2")
NO_SHARDS = f"FSDP of torch {torch.__version__} cannot shard on a CPU"
SGD = TrainConfig(
    steps=3,
    batch_size=4,
    lr=0.05,
    optimizer="SGD",
    optimizer_args={"momentum": 0.9, "weight_decay": 0.1},
)
ADAM = replace(
    SGD,
    steps=4,
    lr=1e-3,
    optimizer="AdamW",
    optimizer_args={"weight_decay": 0.1},
    ema=0.9,
    max_grad_norm=0.05,
    accumulation=2,
    schedule="linear",
    checkpoint_every=2,
)
PLAIN, SLOW = TunedConfig(train=SGD), TunedConfig(train=ADAM)
CHECKPOINTING = TunedConfig(train=replace(SGD, gradient_checkpointing=True))
RECOMPUTE = TunedConfig(train=replace(SGD, selective_recompute=True))
HALF = TunedConfig(train=replace(SGD, mixed_precision="bf16"))
OFFLOAD = TunedConfig(train=replace(SGD, offload=True))
SURGERY = TunedConfig(train=replace(SGD, steps=2), combine="surgery", sam=0.05)
SMOOTHING = TunedConfig(
    train=replace(SGD, steps=2),
    smoothing=0.01,
    smoothing_draws=2,
    prox_l1=1e-4,
    prox_l2=0.1,
)
VARIANTS = {
    "sgd": (PLAIN, 0.5, LAUNCHES),
    "sgd-whole": (PLAIN, None, LAUNCHES[:1]),
    "adam": (SLOW, 0.5, LAUNCHES),
    "adam-whole": (SLOW, None, LAUNCHES[1:]),
    "checkpointing": (CHECKPOINTING, 0.5, LAUNCHES[:1]),
    "selective-recompute": (RECOMPUTE, 0.5, LAUNCHES[:1]),
    "bf16": (HALF, 0.5, LAUNCHES),
    "offload": (OFFLOAD, 0.5, LAUNCHES[:1]),
    "surgery": (SURGERY, None, LAUNCHES[1:]),
    "smoothing": (SMOOTHING, 0.5, LAUNCHES[:1]),
}
"""name -> settings, density of the mask (None: no mask), launches that are compared with none"""
POSSIBLE = {name: variant for name, variant in VARIANTS.items() if BF16 or name != "bf16"}


class Gain(nn.Module):
    """One weight: fewer rows than there are processes."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def with_a_lone_weight(pipeline: DiffusionPipeline) -> StableDiffusion:
    """The model of a pico pipeline, with a parameter of which one of two processes has nothing."""
    resnet = pipeline.unet.mid_block.resnets[0]
    resnet.nonlinearity = nn.Sequential(Gain(), nn.SiLU())
    return StableDiffusion(pipeline)


def mask_of(model: DiffusionModel, density: float) -> SaliencyMask:
    params = select(model.parameters(), "full")
    return SaliencyMask.random(params, density, 0, {"base_fingerprint": model.fingerprint})


def batches(step: int) -> tuple[Tensor, Tensor]:
    """Four rows of latents, and their numbers."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 4, 8, 8, generator=generator), torch.arange(4)


def loss_of(
    model: DiffusionModel,
    together: bool = True,
) -> Callable[[tuple[Tensor, Tensor], Base], dict[str, Tensor]]:
    """Away from the base's predictions, and towards the noise: in one pass, or in two."""
    cond = model.encode(["a red heart", "a blue star"] * 2)
    t = torch.tensor([10, 300, 600, 990])

    def loss(batch: tuple[Tensor, Tensor], base: Base) -> dict[str, Tensor]:
        x, rows = batch
        with base():
            taught = model.predict(x, t[rows], cond[rows])
        seen = model.predict(x, t[rows], cond[rows])
        again = seen if together else model.predict(-x, t[rows], cond[rows])
        forgot, kept = seen - taught - 0.5, again - x
        return {"forget": forgot.square().mean(), "retain": 0.1 * kept.square().mean()}

    return loss


def train(
    model: DiffusionModel,
    config: TunedConfig,
    density: float | None = None,
    state: Path | None = None,
    stop: int | None = None,
) -> Fitted:
    """A few steps.

    Args:
        model: whose weights they change.
        config: settings.
        density: of a random mask; None: no mask.
        state: file of the training state.
        stop: the step that ends in a KeyboardInterrupt.
    """
    if config.train.offload and not waiting(model.pipeline()):
        Waiting(model.pipeline(), model.device)
    params, mask = select(model.parameters(), config.scope), density and mask_of(model, density)
    kept = state and Checkpoint(state, {"base_fingerprint": model.fingerprint})

    def until(step: int) -> tuple[Tensor, Tensor]:
        if step == stop:
            raise KeyboardInterrupt
        return batches(step)

    loss = loss_of(model, together=config.combine == "sum")
    with running(model, params, config.train) as active:
        return fit(params, loss, until, config, mask, active=active, checkpoint=kept)


def apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor], model: DiffusionModel) -> float:
    """How far two trainings lie apart, as a fraction of how far the first one went."""
    base = {name: param.detach() for name, param in model.parameters().items()}
    moved = sum(float((one[name] - base[name]).square().sum()) for name in one) ** 0.5
    assert moved > 0
    return sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5 / moved


def environment_of(kind: str) -> dict[str, str]:
    """What `accelerate launch` makes of a shipped config, by its own parser."""
    config = ["--config_file", str(LAUNCH / f"{kind}.yaml"), "script.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(config))
    found = prepare_multi_gpu_env(args)
    return {name: found[name] for name in found if name == FSDP or name.startswith("FSDP_")}


@contextmanager
def launched(environment: Mapping[str, str] | None) -> Iterator[None]:
    """As under a launch with these variables."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environment or {}).items():
            patch.setenv(name, value)
        yield


@contextmanager
def as_found(model: DiffusionModel) -> Iterator[dict[str, bool]]:
    """Yields a dict whose "same" says, after the block, whether the model is as it was before."""
    weights, rest = _everything(model)
    facts: dict[str, bool] = {}
    yield facts
    now, rest_now = _everything(model)
    facts["same"] = rest == rest_now
    for name, was in weights.items():
        same = torch.equal(now[name][0], was[0]) and now[name][1:] == was[1:]
        facts["same"] = facts["same"] and same


def _everything(model: DiffusionModel) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """What training might leave changed."""
    pipeline, unet = model.pipeline(), model.component("unet")
    weights = {
        name: (param.detach().clone(), param.data_ptr(), param.requires_grad, param.grad)
        for name, param in model.parameters().items()
    }
    kinds = {name: type(one) for name, one in unet.attn_processors.items()}
    modes = unet.training, unet.is_gradient_checkpointing
    return weights, (id(unet), type(unet), dict(pipeline.config), kinds, modes)
