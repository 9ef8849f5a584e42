"""A GPU that is not there: tensors without data that say they lie on one, and refuse to be mixed
with those that lie elsewhere (`FakeTensorMode`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from erase.models.pipelines import modules

GPU = torch.device("cuda", 0)
PLAIN = Tensor.data


def _take_over(self: FakeTensor, other: FakeTensor) -> None:
    PLAIN.__set__(self, other)
    self.fake_device = other.fake_device


def _apply(self: nn.Module, change: Any, recurse: bool = True) -> nn.Module:
    for child in self.children():
        child._apply(change)
    for param in self.parameters(recurse=False):
        param.data = change(param.data)
    for name, buffer in self.named_buffers(recurse=False):
        self._buffers[name] = change(buffer)
    return self


@contextmanager
def fake_gpu(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Within the block the pipeline's weights have no data; its parts move as real ones do. What
    asks for a value of a tensor is told that it is true."""
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeTensor, "data", property(PLAIN.__get__, _take_over), raising=False)
        patch.setattr(FakeTensor, "__bool__", lambda self: True, raising=False)
        patch.setattr(nn.Module, "_apply", _apply)
        for part in modules(pipeline).values():
            for module in part.modules():
                for name, param in module.named_parameters(recurse=False):
                    fake = nn.Parameter(mode.from_tensor(param.data), requires_grad=False)
                    module._parameters[name] = fake
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = mode.from_tensor(buffer)
        with mode:
            yield


class NoLevels:
    """A scheduler that asks for no value of a tensor."""

    order, init_noise_sigma = 1, 1.0

    def __init__(self, config: Any) -> None:
        self.config = config

    def set_timesteps(
        self, count: int | None = None, device: Any = None, sigmas: Any = None, mu: float = 0.0
    ) -> None:
        self.timesteps = torch.full((count or len(sigmas),), 5.0, device=device)

    def set_begin_index(self, index: int = 0) -> None:
        """Nothing begins anywhere."""

    def scale_model_input(self, latents: Tensor, t: Tensor) -> Tensor:
        return latents

    def step(self, out: Tensor, t: Tensor, latents: Tensor, **_: Any) -> tuple[Tensor]:
        return (latents - out,)


def _possible() -> bool:
    try:
        with FakeTensorMode():
            there = torch.ones(2, device=GPU)
            return bool(there[torch.zeros(1, dtype=torch.int64, device=GPU)].device == GPU)
    except RuntimeError:
        return False


needs_fake_gpu = pytest.mark.skipif(
    not _possible(), reason=f"torch {torch.__version__} asks the driver even where there is no data"
)
