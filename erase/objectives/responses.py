"""How the linear layers of a denoiser respond to what it is shown: what passes along each of their
weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from erase.latents.batches import Rows
from erase.latents.latent_set import texts_of
from erase.models.pipelines import denoiser, modules
from erase.prompts.errors import ErasureError
from erase.task import Task

BATCH = 8
"""rows that are predicted at a time"""
TINY = 1e-12


class Moments:
    """Mean and standard deviation of tensors that come one after the other (Welford 1962)."""

    def __init__(self, like: Tensor) -> None:
        self.count = 0
        self.mean = torch.zeros_like(like, dtype=torch.float32)
        self._squares = torch.zeros_like(self.mean)

    def add(self, value: Tensor) -> None:
        self.count += 1
        before = value - self.mean
        self.mean += before / self.count
        self._squares += before * (value - self.mean)

    @property
    def deviation(self) -> Tensor:
        """Of these tensors themselves: the sum of squares is divided by their number."""
        return (self._squares / self.count).sqrt()

    def above(self, other: Moments) -> Tensor:
        """How far the mean lies above the other's and its deviation; 0 where it does not."""
        return (self.mean - other.mean - other.deviation).clamp_min(0)


def linear_layers(task: Task, scope: str) -> dict[str, nn.Linear]:
    """The denoiser's linear layers whose weights lie in a scope, by the weight's name.

    Raises:
        ErasureError: the scope has none.
    """
    pipeline = task.model.pipeline()
    net = denoiser(pipeline)
    part = next(name for name, module in modules(pipeline).items() if module is net)
    linear = {
        f"{part}.{name}.weight": module
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear)
    }
    found = {name: linear[name] for name in task.weights(scope) if name in linear}
    if not found:
        raise ErasureError(
            f"scope {scope!r} holds no weight of a linear layer of the {part}, and the method "
            "compares what passes through those; leave the scope as it is, or take full"
        )
    return found


def response(weight: Tensor, inputs: Tensor) -> Tensor:
    """|W_ij| |X_j| |<X_j, Y_i>| / (|X_j| |Y_i|): weight, input, and the cosine of input and output.

    Args:
        weight: W, shape (out, in).
        inputs: X of one row, shape (positions, in); Y = X W^T.

    Returns:
        Shape (out, in); 0 where there is no output.
    """
    outputs = inputs @ weight.T
    return weight.abs() * (outputs.T @ inputs).abs() / outputs.norm(dim=0)[:, None].clamp_min(TINY)


@torch.no_grad()
def responses(
    task: Task, layers: Mapping[str, nn.Linear], rows: Rows, prompts: Sequence[str]
) -> dict[str, Moments]:
    """Moments of each layer's response over these rows under these prompts, one each."""
    with _watched(layers) as found:
        for part in torch.arange(len(rows)).split(BATCH):
            cond = task.cond(texts_of(prompts, part))
            task.model.predict(rows.noisy[part], rows.t[part], cond)
    return found


@contextmanager
def _watched(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, Moments]]:
    """Within the block, the moments take in what the layers are given, row by row."""
    found = {name: Moments(layer.weight) for name, layer in layers.items()}
    hooks = [
        layer.register_forward_pre_hook(partial(_take, found[name]))
        for name, layer in layers.items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _take(moments: Moments, layer: nn.Linear, given: tuple[Tensor, ...]) -> None:
    """A time embedding has one position, and text states have as many as there are tokens."""
    weight = layer.weight.float()
    for row in given[0].float():
        moments.add(response(weight, row.reshape(-1, layer.in_features)))
