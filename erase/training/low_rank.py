"""Low-rank parametrisation of the change (LoRA, Hu et al. 2022, https://arxiv.org/abs/2106.09685).

A matrix W becomes W + up @ down; a convolution's kernel counts as the matrix (outputs, inputs *
height * width). The model holds the sum, so nothing in it needs to know. With G the sum's gradient,
d up = G down^T and d down = up^T G.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from erase.mask import SaliencyMask
from erase.parallel.layout import ActiveWeights
from erase.prompts.errors import ErasureError
from erase.training.trainable import Trainable

UP, DOWN = ".up", ".down"


def matrices(params: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """What has factors: matrices and kernels, no vectors.

    Raises:
        ErasureError: there is none.
    """
    found = {name: param for name, param in params.items() if param.dim() > 1}
    if not found:
        raise ErasureError(
            "lora_rank factors matrices, of which the scope has none; widen the scope"
        )
    return found


class LowRank(Trainable):
    """Factors of the changes of matrices; vectors (biases, norms) keep their base values.

    Under a mask the change is up @ down where the mask has a one, and nothing elsewhere.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        mask: SaliencyMask | None,
        active: ActiveWeights,
        rank: int,
        seed: int,
    ) -> None:
        """Start at the base: `up` is zero, `down` uniform in +-1/sqrt(inputs), by the seed."""
        if active.layout.collective_forward:
            raise ErasureError(
                "lora_rank does not go with FSDP; launch with scripts/launch/several-gpus.yaml"
            )
        super().__init__(matrices(params), mask, active)
        with self._closed_on_failure():
            self._factor(rank, torch.Generator().manual_seed(seed))

    def _factor(self, rank: int, generator: torch.Generator) -> None:
        """Put factors in the place of the values, which become where they start."""
        self._start = {name: value.detach() for name, value in self.values.items()}
        self.values = {}
        for name, start in self._start.items():
            param = self._base_params[name]
            outputs, inputs = len(param), param.numel() // len(param)
            width = min(rank, outputs, inputs)
            down = (2 * torch.rand(width, inputs, generator=generator) - 1) / math.sqrt(inputs)
            self.values[name + UP] = nn.Parameter(torch.zeros(outputs, width, device=start.device))
            self.values[name + DOWN] = nn.Parameter(down.to(start.device))

    def compact(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Start plus change, by parameter, at the places that may change."""
        sums = {}
        for name, start in self._start.items():
            change = values[name + UP].detach() @ values[name + DOWN].detach()
            where = self._where.get(name)
            compacted = (
                change.view_as(start) if where is None else change.flatten().index_select(0, where)
            )
            sums[name] = start + compacted
        return sums

    def _begin(self, name: str, value: Tensor) -> None:
        self._start[name] = value

    def whole_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values[name].shape)

    def local_part(self, name: str, whole: Tensor) -> Tensor:
        return whole

    def _add(self, name: str, gradient: Tensor) -> None:
        """Gradients of the factors, from that of the values at the places that may change."""
        up, down = self.values[name + UP], self.values[name + DOWN]
        dense = gradient.float()
        if name in self._where:
            flat = torch.zeros(len(up) * down.shape[1], device=gradient.device)
            dense = flat.scatter_(0, self._where[name].long(), dense)
        dense = dense.reshape(len(up), -1)

        for factor, factor_gradient in (
            (up, dense @ down.detach().T),
            (down, up.detach().T @ dense),
        ):
            factor.grad = (
                factor_gradient if factor.grad is None else factor.grad.add_(factor_gradient)
            )
