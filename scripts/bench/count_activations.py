"""What autograd keeps for the backward pass of one row, by arithmetic: no weights, no GPU, seconds.

  python scripts/bench/count_activations.py
      SD 1.x at 512 pixels, bf16, by a GPU's autocast rules
  python scripts/bench/count_activations.py --model sdxl --rules cpu
      SDXL at 1024 pixels, by a CPU's, where norms stay in bf16
  python scripts/bench/count_activations.py --model flux1-dev
      FLUX.1 dev at 1024 pixels, 512 tokens

The real denoiser runs on tensors without data (`FakeTensorMode`), and the memory that its graph
holds on to is added up, weights left out: all of it, with `selective_recompute`, and with
`gradient_checkpointing`, which besides holds one block at a time while it makes that again. All
weights of the denoiser ask for gradients; attention is taken to be the fused kernel's.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from erase.models import PRECISIONS
from erase.models.by_block import innermost
from erase.models.precision import with_precision
from erase.scripts.bench.plain import plain_parser
from erase.scripts.bench.published import MODELS, Published
from erase.training.recompute import SavedActivations, recomputing
from erase.training.running import checkpointed

WAYS = ("all", "selective_recompute", "gradient_checkpointing")


class Counted(SavedActivations):
    """Adds up the storages that are kept, each once."""

    def __init__(self, module: nn.Module, selective: bool) -> None:
        super().__init__()
        self._weights = {_storage(param) for param in module.parameters()}
        self._selective = selective
        self._kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(self, tensor: Tensor) -> Any:
        """What is kept of a tensor, counted."""
        packed = super().pack(tensor) if self._selective else tensor
        if torch.is_tensor(packed) and _storage(packed) not in self._weights:
            self._kept[_storage(packed)] = packed.untyped_storage()
        return packed

    @property
    def bytes(self) -> int:
        """So far."""
        return sum(storage.nbytes() for storage in self._kept.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def without_data(network: nn.Module, device: str, half: torch.dtype | None) -> nn.Module:
    """The network with weights as `stand_ins` has them, and buffers."""
    for name, meta in list(network.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = torch.empty(meta.shape, device=device)
        setattr(network.get_submodule(owner), leaf, nn.Parameter(value))
    for name, buffer in list(network.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        network.get_submodule(owner).register_buffer(leaf, torch.empty(buffer.shape, device=device))
    for _, param, dtype in with_precision(network, half):
        param.data = param.data.to(dtype)
    return network.eval()


def count(model: Published, device: str, half: torch.dtype | None, way: str) -> tuple[int, int]:
    """Bytes kept at the end of a forward pass of one row, and the most that one block of it
    adds."""
    network = model.network()
    with FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as stack:
        network = without_data(network, device, half)
        counted, added = Counted(network, way == WAYS[1]), [0]
        for block in innermost(network):
            before: list[int] = []
            block.register_forward_pre_hook(lambda *_, before=before: before.append(counted.bytes))
            block.register_forward_hook(
                lambda *_, before=before: added.append(counted.bytes - before.pop())
            )
        given = model.row(partial(torch.randn, device=device), torch.zeros(1, device=device))
        stack.enter_context(checkpointed(network, way == WAYS[2]))
        stack.enter_context(
            recomputing([network], counted)
            if way == WAYS[1]
            else saved_tensors_hooks(counted.pack, counted.unpack)
        )
        stack.enter_context(
            patch.object(functional, "scaled_dot_product_attention", _fused(device))
        )
        stack.callback(torch.set_autocast_enabled, device, False)
        torch.set_autocast_dtype(device, half or torch.bfloat16)
        # the context manager would look for a GPU
        torch.set_autocast_enabled(device, half is not None)
        out = network(**given).sample
        assert (out[0] if isinstance(out, list) else out).requires_grad
        return counted.bytes, max(added)


def _fused(device: str) -> Any:
    """The kernel that a GPU would take; torch chooses by looking at the GPU."""
    if device == "cpu":
        return functional.scaled_dot_product_attention
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    return lambda query, key, value, **_: kernel(query, key, value)[0]


def main() -> None:
    """One row of a table for each way."""
    parser = plain_parser(__doc__)
    parser.add_argument("--model", default="sd1", choices=list(MODELS))
    parser.add_argument("--precision", default="bf16", choices=list(PRECISIONS))
    parser.add_argument(
        "--rules",
        default="cuda",
        choices=["cuda", "cpu"],
        help="of autocast: on a GPU norms run in float32",
    )
    args = parser.parse_args()
    print(f"{args.model}, {args.precision}, autocast of {args.rules}: GB a row")
    half = PRECISIONS[args.precision]
    counts = {way: count(MODELS[args.model](), args.rules, half, way) for way in WAYS}
    for way, (kept, _) in counts.items():
        print(f"{way:24}{kept / 1e9:>8.3f}")
    print(f"{'the largest block':24}{counts['all'][1] / 1e9:>8.3f}")


if __name__ == "__main__":
    main()
