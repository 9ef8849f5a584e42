"""The weights that training may change, and only they: compact copies that the optimizer sees,
written back into the model.

A mask of density d leaves d * N weights to train. The optimizer holds those alone, so its state,
the gradients and the second copy of the weights shrink with d; and what lies outside the mask
cannot move, whatever the optimizer does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from erase.mask import SaliencyMask
from erase.parallel.layout import ActiveWeights
from erase.prompts.errors import ErasureError
from erase.tensors import all_finite, indices

Base = Callable[[], AbstractContextManager[None]]
"""within its block, the model holds its base weights, and no gradient is recorded"""


class Trainable:
    """Compact copies of some weights of a model, whose gradients they collect and in whose place
    they stand until `close`.

    Of a sharded model, each process has copies of what lies in its own rows; those of all
    processes, one after the other, are the copies of the whole.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        mask: SaliencyMask | None = None,
        active: ActiveWeights | None = None,
    ) -> None:
        """`active`: the stand-ins for `params` meanwhile; None: they themselves."""
        active = active or ActiveWeights(params)
        self._base_params, self._mask, self.layout = params, mask, active.layout
        self._params = {name: active.params[name] for name in params}
        self._mine: dict[str, slice] = {}
        """parameter name -> which of its compact values (of its rows, where it may change as a
        whole) are copied here"""
        self._where: dict[str, Tensor] = {}
        """parameter name -> flat places, int32; a parameter that may change as a whole has none,
        one that may not at all is left out. Boolean masks would be smaller, but selecting by them
        takes 30 times as long (2.7 M weights on a CPU: 21 ms against 0.7)"""
        self._shapes: dict[str, tuple[int, ...]] = {}
        """parameter name -> shape of its compact values in all processes together"""
        self._own = active.own
        self._base: dict[str, Tensor] = {}
        """base values as the parameter holds them, flat where masked; of a parameter that stands in
        for another, once they are asked for"""
        self.values: dict[str, nn.Parameter] = {}
        """trained values in full precision, likewise: what the optimizer steps on"""
        self._taken: list[str] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        with self._closed_on_failure():
            for name, param in self._params.items():
                if self._place(name, param):
                    self._take(name, param)

    @contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        """Too little memory within the block: hooks that stay would take the next training's
        gradients."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    @cached_property
    def mask_sha256(self) -> str:
        """Of the mask, for training states; empty where there is none."""
        return self._mask.sha256 if self._mask else ""

    def _take(self, name: str, param: nn.Parameter) -> None:
        """Copy what may change of a parameter, and collect its gradients from now on."""
        held = self.layout.local(param)
        if name not in self._own:
            self._base[name] = self._read(name, held)
        self.values[name] = nn.Parameter(
            self._read(name, self._own.get(name, held)).to(param.device)
        )
        param.requires_grad_(True)
        self._taken.append(name)
        # the dense gradient of one parameter at a time: the next is not yet there when it is
        # dropped
        self._hooks.append(param.register_post_accumulate_grad_hook(self._collect(name)))

    def _place(self, name: str, param: nn.Parameter) -> bool:
        """Find the weights of a parameter that may change, and those of them in this process;
        False: none in any process."""
        count = len(param) if param.dim() else 1
        rows = self._mine[name] = self.layout.rows(count)
        where = _places(self._mask, name)
        if where is not None:
            width = param.numel() // count
            start, stop = (
                int(i)
                for i in torch.searchsorted(
                    where, torch.tensor([rows.start * width, rows.stop * width])
                )
            )
            self._mine[name] = slice(start, stop)
            self._where[name] = (where[start:stop] - rows.start * width).to(
                param.device, torch.int32
            )
        self._shapes[name] = tuple(param.shape) if where is None else (len(where),)
        return where is None or len(where) > 0

    def _read(self, name: str, dense: Tensor) -> Tensor:
        if name not in self._where:
            return dense.clone(memory_format=torch.contiguous_format)
        return dense.flatten().index_select(0, self._where[name].to(dense.device))

    def _collect(self, name: str) -> Callable[[Tensor], None]:
        """Moves a parameter's gradient to its compact copy, adding to what earlier parts of the
        batch left there."""

        def collect(param: Tensor) -> None:
            if param.grad is None:
                return
            grad = self.layout.local(param.grad)
            # no copy of what is taken whole, unless a block's gradients would live on behind it;
            # and always in the order of the values, for fused optimizers walk through both side by
            # side
            part = name in self._where or grad.untyped_storage().nbytes() > grad.nbytes
            self._add(name, self._read(name, grad) if part else grad.contiguous())
            param.grad = None

        return collect

    def _add(self, name: str, gradient: Tensor) -> None:
        """Add the gradient of a parameter's compact values to what earlier parts of the batch
        left."""
        value = self.values[name]
        value.grad = gradient.to(value.dtype) if value.grad is None else value.grad.add_(gradient)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            _fill(self.layout.local(self._params[name]), self._where.get(name), value.detach())
        # autocast keeps half-precision copies by parameter, not by value: without this the old
        # weights would go on being used
        torch.clear_autocast_cache()
        self.layout.invalidate_gathered()

    def compact(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Compact values by parameter, of what is trained: here the same."""
        return values

    def put(self) -> None:
        """Write the trained values into the model, after an optimizer step."""
        self._write(self.compact(self.values))

    @contextmanager
    def base(self) -> Iterator[None]:
        """Within the block the model holds its base weights, without gradient: a frozen teacher
        that costs no second model."""
        for name in set(self._taken) - self._base.keys():
            param = self._params[name]
            self._base[name] = self._read(name, self._own[name]).to(param.device, param.dtype)
        self._write(self._base)
        try:
            with torch.no_grad():
                yield
        finally:
            self.put()

    def base_values(self, name: str) -> Tensor:
        """The base's compact values of a parameter, in the precision of the trained ones."""
        value = self.values[name]
        base = self._read(name, self._own[name]) if name in self._own else self._base[name]
        return base.to(value)

    def dense(self, name: str, compact: Tensor) -> Tensor:
        """Compact values as rows of their matrix that lie in this process, shape (rows, width); 0
        where nothing may change."""
        width = self._base_params[name].shape[-1]
        if name not in self._where:
            return compact.reshape(-1, width)
        rows = self.layout.rows(len(self._base_params[name]))
        flat = compact.new_zeros((rows.stop - rows.start) * width)
        return flat.scatter_(0, self._where[name].long(), compact).view(-1, width)

    def picked(self, name: str, dense: Tensor) -> Tensor:
        """The inverse of `dense`."""
        return self._read(name, dense)

    @torch.no_grad()
    def start_from(self, values: Mapping[str, Tensor]) -> None:
        """Begin at other values than the base's, given as whole parameters; weights outside the
        mask stay the base's."""
        for name in self._taken:
            if name in values:
                whole = values[name]
                held = whole[self.layout.rows(len(whole))] if whole.dim() else whole
                self._begin(name, self._read(name, held.to(self._params[name].device)))
        self.put()

    def _begin(self, name: str, value: Tensor) -> None:
        self.values[name].copy_(value)

    def close(self) -> None:
        """Give the model its base weights back, bit for bit; stand-ins are left as they are, to be
        thrown away."""
        for hook in self._hooks:
            hook.remove()
        for name in self._taken:
            self._params[name].requires_grad_(False).grad = None
        self._write(self._base)

    def whole_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a trained value in all processes together."""
        return self._shapes[name]

    def local_part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of something that has an entry for each compact value of a parameter;
        the inverse of `layout.gather`."""
        return self.layout.local_part(whole, self._mine[name])

    def result(self, values: Mapping[str, Tensor]) -> Trained:
        """These compact values as whole parameters; every process must ask.

        Raises:
            ErasureError: a value is not finite, which no loss has told yet: of the last step.
        """
        whole = {
            name: self.layout.gather(value.detach()) for name, value in self.compact(values).items()
        }
        if bad := [name for name, value in whole.items() if not all_finite(value)]:
            raise ErasureError(
                f"the trained values of {bad[0]} are not finite; lower the learning rate, set "
                "max_grad_norm, or train in float32"
            )
        return Trained(self._base_params, partial(_places, self._mask), whole)


class Trained(Mapping[str, Tensor]):
    """Parameter name -> new values, of the parameter's shape, put together when asked for: base
    where nothing may change."""

    def __init__(
        self,
        base: Mapping[str, Tensor],
        where: Callable[[str], Tensor | None],
        values: Mapping[str, Tensor],
    ) -> None:
        self._base, self._where, self._values = base, where, values

    def __getitem__(self, name: str) -> Tensor:
        base = self._base[name].detach().clone()
        return _fill(base, self._where(name), self._values[name]) if name in self._values else base

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def _places(mask: SaliencyMask | None, name: str) -> Tensor | None:
    """Flat places in a parameter of what may change, ascending; None: all of it."""
    if mask is None:
        return None
    where = indices(mask[name])
    return where if len(where) < math.prod(mask.shapes[name]) else None


def _fill(dense: Tensor, where: Tensor | None, values: Tensor) -> Tensor:
    """Put values at their flat places (of the shape, whatever the memory format), or everywhere, in
    place; they are rounded to fit."""
    if where is None:
        return dense.copy_(values)
    if not dense.is_contiguous():
        return dense.copy_(_fill(dense.contiguous(), where, values))
    flat, values, where = dense.view(-1), values.to(dense), where.to(dense.device, torch.int64)
    # the same bits as integers: on a CPU three times as fast
    if dense.dtype in (
        torch.bfloat16,
        torch.float16,
    ):
        flat, values = flat.view(torch.int16), values.view(torch.int16)
    flat.scatter_(0, where, values)
    return dense


@contextmanager
def gradients_on(params: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Gradients on for these parameters alone; afterwards off and cleared."""
    for param in params.values():
        param.requires_grad_(True)
    try:
        yield
    finally:
        for param in params.values():
            param.requires_grad_(False)
            param.grad = None
