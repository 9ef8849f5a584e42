"""How a model's weights lie while it runs: whole in every process, or, under FSDP, in shards
(`erase.parallel.fsdp.Shards`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from erase.parallel.processes import reduce_all


class Layout:
    """Every process holds every weight; gradients are exchanged after the backward pass. Shards
    override the methods that differ."""

    collective_forward = False
    """whether each pass through the model is a joint one, so that all processes must take as
    many"""

    def rows(self, count: int) -> slice:
        """The rows, out of a parameter's `count`, that this process holds."""
        return slice(0, count)

    def local(self, tensor: Tensor) -> Tensor:
        """This process's rows of a parameter or of its gradient, to be read and written."""
        return tensor.data

    def invalidate_gathered(self) -> None:
        """Called after rows were written: gathered copies of the old ones are void."""

    def average(self, gradients: Iterable[Tensor]) -> None:
        """Make them the mean over processes, in place."""
        reduce_all(gradients, "mean")

    def add_up(self, sums: Iterable[Tensor]) -> None:
        """Add up sums over the batches of each process, in place, so that they are over those of
        all."""
        reduce_all(sums, "sum")

    def norm(self, local: Tensor) -> Tensor:
        """The norm of all values, given that of the values in this process."""
        return local

    def total(self, local: Tensor) -> Tensor:
        """The sum over all values, given that over the values in this process."""
        return local

    def local_part(self, whole: Tensor, mine: slice) -> Tensor:
        """The part of a gathered tensor that `mine` selects."""
        return whole

    def gather(self, part: Tensor) -> Tensor:
        """All rows, given those of this process; every process must ask."""
        return part


@dataclass(frozen=True)
class ActiveWeights:
    """The weights in the model while it runs."""

    params: Mapping[str, nn.Parameter]
    """the parameters in question, by the names of those whose place they take"""
    own: Mapping[str, Tensor] = field(default_factory=dict)
    """`part.parameter` name -> the model's own weights, where copies in another precision stand in
    for them"""
    layout: Layout = field(default_factory=Layout)
