"""Gradient statistics of an erasure, from which any rule cuts a mask at any density.

A statistic is one number per weight of the scope: `forget.sum`, the signed sum of the forget loss's
gradients over batches (SalUn, eq. 3); `objective.sum` and `objective.square`, sum and sum of
squares of the gradients of what training itself will minimise to forget; `retain.square`, the sum
of squares of the gradients of the denoising loss on retain latents (the empirical Fisher
information of a batch).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from erase.files import errors_named, zeros_on_disk
from erase.parallel.layout import Layout
from erase.prompts.errors import ErasureError
from erase.tensor_files import load_tensors, save_tensors
from erase.tensors import all_finite, sha256_of

AGAIN = "delete it to compute it again"
Values = Mapping[str, Tensor]
"""parameter name -> float32, the parameter's shape"""


@dataclass(frozen=True)
class Statistics:
    """Statistics by name, each over the same parameters in the same order."""

    values: Mapping[str, Values]
    metadata: dict[str, str] = field(default_factory=dict)
    """the facts that they depend on: base, concepts, latents, scope, number of batches"""

    def save(self, path: str | Path) -> None:
        """Write safetensors; the order of the parameters goes into the metadata, for ties go by it
        and the file sorts by name."""
        tensors = {
            f"{name}/{param}": value
            for name, values in self.values.items()
            for param, value in values.items()
        }
        order = list(next(iter(self.values.values()), {}))
        metadata = {
            **self.metadata,
            "order": json.dumps(order),
            "statistics": json.dumps(sorted(self.values)),
        }
        checksum = sha256_of({"values": tensors, "metadata": metadata})
        save_tensors(
            path,
            tensors,
            {**dict(sorted(metadata.items())), "format": "saliency", "sha256": checksum},
        )

    def within(self, scope: str, params: Sequence[str], source: str | Path) -> Statistics:
        """Those of a scope's parameters alone.

        Args:
            scope: its name, for the metadata.
            params: its parameters, in order.
            source: what errors call these statistics.

        Raises:
            ErasureError: a parameter that they do not cover.
        """
        held = next(iter(self.values.values()), {})
        if lacking := [name for name in params if name not in held]:
            raise ErasureError(
                f"{source} does not cover {lacking[0]} of scope {scope}; leave mask.saliency out "
                "to compute it over this scope"
            )
        values = {}
        for name, every in self.values.items():
            values[name] = {param: every[param] for param in params}
        return Statistics(values, {**self.metadata, "scope": scope})

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read statistics.

        Raises:
            ErasureError: a missing, damaged or foreign file, or values that are no statistics.
        """
        tensors, metadata = load_tensors(path, "saliency")
        checksum, _ = metadata.pop("sha256", None), metadata.pop("format")
        if checksum != sha256_of({"values": tensors, "metadata": metadata}):
            raise ErasureError(
                f"{path} is damaged: it holds other values than were written; {AGAIN}"
            )

        with errors_named(path, AGAIN):
            order, names = json.loads(metadata.pop("order")), json.loads(metadata.pop("statistics"))
            if sorted(f"{name}/{param}" for name in names for param in order) != sorted(tensors):
                raise ErasureError(
                    f"{path}: its order names other parameters than it holds; {AGAIN}"
                )
            values = {}
            for name in names:
                values[name] = {param: tensors[f"{name}/{param}"] for param in order}
        for name, value in tensors.items():
            square = name.partition("/")[0].endswith(".square")
            if (
                value.dtype != torch.float32
                or not all_finite(value)
                or (square and (value < 0).any())
            ):
                raise ErasureError(
                    f"{path}: {name} is no statistic (float32, finite, squares not negative); "
                    f"{AGAIN}"
                )
        return cls(values, metadata)


Zeros = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""tensors by name -> as many float32 zeros for each, in its shape"""


def beside(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros on the tensors' own device."""
    made = {}
    for name, value in held.items():
        made[name] = torch.zeros_like(
            value, dtype=torch.float32, memory_format=torch.contiguous_format
        )
    return made


def in_memory(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros in main memory."""
    return {name: torch.zeros(value.shape) for name, value in held.items()}


def on_disk(folder: Path | None) -> Zeros:
    """Zeros in a file of this folder; None: where the system has temporary files."""

    def zeros(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sizes = [value.numel() for value in held.values()]
        pieces = zeros_on_disk(sum(sizes), folder).split(sizes)
        pairs = zip(held.items(), pieces, strict=True)
        return {name: piece.view(value.shape) for (name, value), piece in pairs}

    return zeros


class Accumulator:
    """Sums gradients of parameters, signed and in float32, and their squares where asked for."""

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        layout: Layout | None,
        names: tuple[str, ...],
        zeros: Zeros = beside,
    ) -> None:
        """`names`: `sum`, `square` or both. `zeros`: makes the totals; where they are, each
        gradient is carried."""
        self._params, self._layout = dict(params), layout or Layout()
        held = {name: self._layout.local(param) for name, param in self._params.items()}
        self._totals = {name: zeros(held) for name in names}

    def add(self) -> None:
        """Add each parameter's gradient, one batch's, and clear it. A parameter without gradient
        counts as zero."""
        for name in self._params:
            self._add(name)

    def _add(self, name: str) -> None:
        param = self._params[name]
        if param.grad is None:
            return
        gradient = self._layout.local(param.grad)
        for kind, totals in self._totals.items():
            total, gradient = totals[name], gradient.to(totals[name].device)
            if kind == "sum":
                total += gradient
            else:
                total.addcmul_(gradient, gradient)
        param.grad = None

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Within the block, each backward pass adds its gradients as they come: never more than one
        stands beside the totals."""
        hooks = [
            param.register_post_accumulate_grad_hook(lambda _, name=name: self._add(name))  # type: ignore[misc]
            for name, param in self._params.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def finish(self, shared: bool = True) -> dict[str, dict[str, Tensor]]:
        """The totals over all processes, whole in each, on the CPU; the accumulator gives them away
        and is spent.

        Args:
            shared: the processes took batches in turn, so that their totals are to be added up.

        Raises:
            ErasureError: a total is not finite.
        """
        done: dict[str, dict[str, Tensor]] = {}
        for kind, totals in self._totals.items():
            if shared:
                self._layout.add_up(totals.values())
            done[kind] = {}
            for name in list(totals):  # one at a time: no second copy of the model's size
                total = self._layout.gather(totals.pop(name))
                if not all_finite(total):
                    raise ErasureError(
                        f"the saliency of {name} is not finite; use float32 and check the forget "
                        "latents"
                    )
                done[kind][name] = total.cpu()
        return done
