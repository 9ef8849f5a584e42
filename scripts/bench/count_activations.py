"""What autograd keeps for the backward pass of one row, by arithmetic: no weights, no GPU, seconds.

  python scripts/bench/count_activations.py
      SD 1.x at 512 pixels, bf16, by a GPU's autocast rules
  python scripts/bench/count_activations.py --family sdxl --rules cpu
      SDXL at 1024 pixels, by a CPU's, where norms stay in bf16

The real UNet runs on tensors without data (`FakeTensorMode`), and the memory that its graph holds
on to is added up, weights left out: all of it, with `selective_recompute`, and with
`gradient_checkpointing`, which besides holds one block at a time while it makes that again. All
weights of the UNet ask for gradients; attention is taken to be the fused kernel's.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from erase.models import PRECISIONS
from erase.models.precision import with_precision
from erase.models.single_file.architectures import STOCK, shipped
from erase.training.recompute import SavedActivations, recomputing
from erase.training.running import checkpointed

WAYS = ("all", "selective_recompute", "gradient_checkpointing")
BLOCKS = (ResnetBlock2D, BasicTransformerBlock)
"""what diffusers checkpoints"""


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


def without_data(family: str, device: str, half: torch.dtype | None) -> nn.Module:
    """The UNet with weights as `stand_ins` has them."""
    unet = shipped(family, "epsilon").modules()["unet"]
    for name, meta in list(unet.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(
            unet.get_submodule(owner), leaf, nn.Parameter(torch.empty(meta.shape, device=device))
        )
    for _, param, dtype in with_precision(unet, half):
        param.data = param.data.to(dtype)
    return unet.eval()


def count(family: str, device: str, half: torch.dtype | None, way: str) -> tuple[int, int]:
    """Bytes kept at the end of a forward pass of one row, and the most that one block of it
    adds."""
    with FakeTensorMode(), ExitStack() as stack:
        unet: Any = without_data(family, device, half)
        config, counted, added = unet.config, Counted(unet, way == WAYS[1]), [0]
        for block in (module for module in unet.modules() if isinstance(module, BLOCKS)):
            before: list[int] = []
            block.register_forward_pre_hook(lambda *_, before=before: before.append(counted.bytes))
            block.register_forward_hook(
                lambda *_, before=before: added.append(counted.bytes - before.pop())
            )
        side, width = config.sample_size, config.cross_attention_dim
        x = torch.randn(1, 4, side, side, device=device)
        text = torch.randn(1, 77, width, device=device)
        pooled = {
            "text_embeds": torch.randn(1, 1280, device=device),
            "time_ids": torch.zeros(1, 6, device=device),
        }
        stack.enter_context(checkpointed(unet, way == WAYS[2]))
        stack.enter_context(
            recomputing([unet], counted)
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
        out = unet(
            x, torch.zeros(1, dtype=torch.int64, device=device), text, added_cond_kwargs=pooled
        ).sample
        assert out.requires_grad
        return counted.bytes, max(added)


def _fused(device: str) -> Any:
    """The kernel that a GPU would take; torch chooses by looking at the GPU."""
    if device == "cpu":
        return functional.scaled_dot_product_attention
    return lambda q, k, v, **_: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def main() -> None:
    """One row of a table for each way."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--family", default="sd1", choices=list(STOCK))
    parser.add_argument("--precision", default="bf16", choices=list(PRECISIONS))
    parser.add_argument(
        "--rules",
        default="cuda",
        choices=["cuda", "cpu"],
        help="of autocast: on a GPU norms run in float32",
    )
    args = parser.parse_args()
    print(f"{args.family}, {args.precision}, autocast of {args.rules}: GB a row")
    counts = {way: count(args.family, args.rules, PRECISIONS[args.precision], way) for way in WAYS}
    for way, (kept, _) in counts.items():
        print(f"{way:24}{kept / 1e9:>8.3f}")
    print(f"{'the largest block':24}{counts['all'][1] / 1e9:>8.3f}")


if __name__ == "__main__":
    main()
