"""A model in shards while it runs: FSDP2 (`torch.distributed.fsdp.fully_shard`), ZeRO stage 3 or 2.

`fully_shard` changes a module for good. So it is given a twin of the denoiser, which stands in the
pipeline for as long as steps are taken: made without weights, sharded, filled by each process from
its own copy of the original. The original waits, untouched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from erase.models import DiffusionModel
from erase.models.by_block import blocks
from erase.models.pipelines import denoiser
from erase.models.precision import with_precision
from erase.parallel.launch import FullShard, full_shard
from erase.parallel.layout import Layout
from erase.parallel.processes import processes
from erase.prompts.errors import ErasureError

VALUE_BY_VALUE = {
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop",
    "SGD",
}  # fmt: skip
"""optimizers whose step on a value depends on that value alone, so that a shard takes the steps of
the whole"""
BF16 = "param_dtype_override_fn" in getattr(MixedPrecisionPolicy, "__dataclass_fields__", ())
"""whether this torch (2.15) can gather norms in float32 beside matrices in half precision"""
ON_CPUS = hasattr(torch.cpu.Stream, "record_event")
"""whether this torch can shard on a CPU: 2.6 asks its streams for what they do not have"""
WHOLE = "launch with scripts/launch/several-gpus.yaml"
"""how to go on without shards"""


class Settings(Protocol):
    """The settings of a training that shards read (`TrainConfig`)."""

    optimizer: str
    mixed_precision: str
    channels_last: bool
    compile: bool


def sharding() -> FullShard | None:
    """The FSDP that this launch asks for, where there are several processes; None: models stay
    whole."""
    return full_shard() if processes().num_processes > 1 else None


def check_sharded(config: Settings, lora_rank: int = 0) -> FullShard | None:
    """The FSDP that this launch asks for, after a look at what shards cannot do; None: models stay
    whole.

    Raises:
        ErasureError: a setting that shards cannot follow, said before hours are spent on latents.
    """
    asked = sharding()
    if asked is None:
        return None

    half, own = config.mixed_precision, f"FSDP of torch {torch.__version__}"
    if processes().device.type == "cpu" and not ON_CPUS:
        raise ErasureError(
            f"{own} cannot shard on a CPU; take a newer torch (2.14 can), or {WHOLE}"
        )
    if config.optimizer not in VALUE_BY_VALUE:
        raise ErasureError(
            f"optimizer {config.optimizer} looks at more than one value at a time, of which FSDP "
            f"leaves each process some; choose one of {', '.join(sorted(VALUE_BY_VALUE))}, or "
            f"{WHOLE}"
        )
    if half == "fp16":
        raise ErasureError(
            "mixed_precision fp16 scales its loss by what it finds in all gradients, of which "
            f"FSDP leaves each process some; use {'bf16 or no' if BF16 else 'no'}, or {WHOLE}"
        )
    if half != "no" and not BF16:
        raise ErasureError(
            f"{own} cannot gather norms in float32 beside matrices in {half}; take torch 2.15 or "
            f"newer, mixed_precision no, or {WHOLE}"
        )

    whole = {
        "lora_rank": lora_rank,
        "train.channels_last": config.channels_last,
        "train.compile": config.compile,
    }
    for name, wanted in whole.items():
        if wanted:
            raise ErasureError(f"{name} does not go with FSDP; leave it out, or {WHOLE}")
    return asked


def check_parts(names: Iterable[str]) -> None:
    """Refuse to shard what is no denoiser, before hours are spent on latents; nothing where models
    stay whole.

    Args:
        names: of parameters that are to be trained.

    Raises:
        ErasureError: one is a text encoder's.
    """
    if sharding() is None:
        return
    for part in sorted({name.split(".")[0] for name in names}):
        if part.startswith("text_encoder"):
            raise _only_the_denoiser(part)


def _only_the_denoiser(part: str) -> ErasureError:
    return ErasureError(f"FSDP shards the denoiser, not the {part}; {WHOLE}")


class Shards(Layout):
    """Each process holds some rows of every parameter, contiguous and in the order of the
    processes."""

    collective_forward = True

    def __init__(self, twins: Iterable[nn.Module]) -> None:
        self._blocks = [
            block for twin in twins for block in twin.modules() if isinstance(block, FSDPModule)
        ]
        state = processes()
        self._me, self._count = state.process_index, state.num_processes

    def rows(self, count: int) -> slice:
        width = -(-count // self._count)  # as torch.chunk: the last ones may have fewer, or none
        return slice(min(self._me * width, count), min((self._me + 1) * width, count))

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to_local()  # type: ignore[attr-defined, no-any-return]

    def invalidate_gathered(self) -> None:
        """Weights that a pass left gathered would be used again: the teacher's by the student."""
        for block in self._blocks:
            block.reshard()

    def average(self, gradients: Iterable[Tensor]) -> None:
        """They came as means."""

    def add_up(self, sums: Iterable[Tensor]) -> None:
        for total in sums:
            total.mul_(self._count)  # of means

    def norm(self, local: Tensor) -> Tensor:
        return self.total(local.square()).sqrt()

    def total(self, local: Tensor) -> Tensor:
        total = local.clone()
        distributed.all_reduce(total)
        return total

    def local_part(self, whole: Tensor, mine: slice) -> Tensor:
        # a single number, as an optimizer's count of steps, is everyone's
        return whole[mine].clone() if whole.dim() else whole

    def gather(self, part: Tensor) -> Tensor:
        """On the CPU: a device has room for shards alone."""
        lengths = [
            torch.zeros(1, dtype=torch.int64, device=part.device) for _ in range(self._count)
        ]
        distributed.all_gather(lengths, torch.full_like(lengths[0], len(part)))
        padded = part.new_zeros(max(map(int, lengths)), *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in lengths]
        distributed.all_gather(parts, padded)
        return torch.cat(
            [each[:length].cpu() for each, length in zip(parts, map(int, lengths), strict=True)]
        )


@contextmanager
def sharded_twins(
    model: DiffusionModel,
    parts: Iterable[str],
    half: torch.dtype | None,
    asked: FullShard,
    device: torch.device,
) -> Iterator[Shards]:
    """A twin in shards in the place of each of these parts, which wait on the CPU.

    Args:
        model: whose parts they are.
        parts: names of components.
        half: precision of matrix products, in which they are gathered; None: float32.
        asked: what the launch asks for.
        device: of the shards.

    Raises:
        ErasureError: a part other than the denoiser.
    """
    with ExitStack() as stack:
        yield Shards(
            [
                stack.enter_context(_twin_in_place(model, part, half, asked, device))
                for part in parts
            ]
        )


@contextmanager
def _twin_in_place(
    model: DiffusionModel,
    part: str,
    half: torch.dtype | None,
    asked: FullShard,
    device: torch.device,
) -> Iterator[nn.Module]:
    pipeline, original = model.pipeline(), model.component(part)
    if original is not denoiser(pipeline):
        raise _only_the_denoiser(part)
    home = next(original.parameters()).device
    twin = _empty_twin(original)
    _shard(twin, init_device_mesh(device.type, (processes().num_processes,)), half, asked)
    original.to("cpu")
    twin.to_empty(device=device)
    # not by the pipeline's own way, which would write the twin's class into its configuration
    object.__setattr__(pipeline, part, twin)
    layout = Shards([twin])
    try:
        _fill(twin, original, layout)
        yield twin
    finally:
        object.__setattr__(pipeline, part, original)
        for param in twin.parameters():  # whoever still holds them, their room is needed
            layout.local(param).untyped_storage().resize_(0)
        original.to(home)


def _empty_twin(module: nn.Module) -> nn.Module:
    """The same module with parameters that have shapes and no memory."""
    empty: dict[int, Any] = {
        id(param): nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=False)
        for param in module.parameters()
    }
    return deepcopy(module, empty)  # which takes what it finds there for copies made already


def _shard(twin: nn.Module, mesh: DeviceMesh, half: torch.dtype | None, asked: FullShard) -> None:
    """The innermost blocks first: each outer one takes what is left."""
    policy = _policy(twin, half)
    for module in (*blocks(twin), twin):
        fully_shard(
            module, mesh=mesh, reshard_after_forward=asked.reshard_after_forward, mp_policy=policy
        )


def _policy(twin: nn.Module, half: torch.dtype | None) -> MixedPrecisionPolicy:
    """Matrices are gathered as autocast would round them, the rest as it is; activations are
    autocast's affair."""
    if half is None:
        return MixedPrecisionPolicy()
    precision = {id(param): dtype for _, param, dtype in with_precision(twin, half)}
    # mypy knows the installed torch's alone
    options: dict[str, Any] = {"param_dtype_override_fn": lambda param: precision[id(param)]}
    return MixedPrecisionPolicy(
        param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False, **options
    )


@torch.no_grad()
def _fill(twin: nn.Module, original: nn.Module, layout: Shards) -> None:
    """Each process's rows of the parameters, and all of the buffers."""
    for param, whole in zip(twin.parameters(), original.parameters(), strict=True):
        layout.local(param).copy_(whole[layout.rows(len(whole))])
    for buffer, source in zip(twin.buffers(), original.buffers(), strict=True):
        buffer.copy_(source)
