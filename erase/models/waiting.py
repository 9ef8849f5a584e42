"""Parts of a pipeline that wait in main memory, and come to the device when they are called."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from erase.models.by_block import CPU, stream, streamed_to
from erase.models.pipelines import Pipeline, denoiser, modules, text_encoders


class Waiting(ModelHook):  # type: ignore[misc]
    """The part that is called comes to the device; those that nobody holds there leave it.

    So the device has room for the largest part, and not for all. diffusers'
    `enable_model_cpu_offload` sends a part away for its successor in a call alone: text encoders
    that are called again would come while the denoiser is still there.
    """

    def __init__(self, pipeline: Pipeline, device: torch.device, by_block: bool = False) -> None:
        """`by_block`: the weights of denoiser and text encoders never come as a whole."""
        self.execution_device = device  # by this name diffusers asks where a call runs
        self._parts = list(modules(pipeline).values())
        self._held: list[nn.Module] = []
        for part in self._parts:
            part.to(CPU)
        for part in (denoiser(pipeline), *text_encoders(pipeline).values()) if by_block else ():
            stream(part, device)
        for part in self._parts:
            add_hook_to_module(part, self)

    def pre_forward(self, module: nn.Module, *args: Any, **keywords: Any) -> Any:
        """Before a call (diffusers says so for a VAE's `encode` and `decode` too)."""
        self._clear([module])
        _move(module, self.execution_device)
        return args, keywords

    def _clear(self, wanted: Collection[nn.Module]) -> None:
        """Send away what is neither wanted nor held."""
        stay = {id(part) for part in (*wanted, *self._held)}
        for part in self._parts:
            if id(part) not in stay:
                _move(part, CPU)

    @contextmanager
    def held(self, parts: Collection[nn.Module]) -> Iterator[None]:
        """Within the block these parts are the caller's to place, and no call moves them."""
        before = self._held
        known = set(map(id, before))
        fresh = [part for part in parts if id(part) not in known]
        self._held = [*before, *fresh]
        self._clear(())
        for part in fresh:
            remove_hook_from_module(part)
            if not streamed_to(part):
                del part.forward  # which accelerate leaves on the module, bound to it
        try:
            yield
        finally:
            self._held = before
            for part in fresh:
                part.to(CPU)
                add_hook_to_module(part, self)


def _move(part: nn.Module, device: torch.device) -> None:
    """A part that is there is not walked through: each call asks. One whose weights come by block
    has no place."""
    if not streamed_to(part) and next(part.parameters()).device.type != device.type:
        part.to(device)


@contextmanager
def denoiser_at_hand(pipeline: Pipeline) -> Iterator[None]:
    """Within the block the denoiser is on the device, whoever is called."""
    moved, part = waiting(pipeline), denoiser(pipeline)
    with moved.held([part]) if moved else nullcontext():
        if moved:
            _move(part, moved.execution_device)
        yield


def waiting(pipeline: Pipeline) -> Waiting | None:
    """What moves the parts of a pipeline; None where they stay on the device."""
    hooks = (getattr(part, "_hf_hook", None) for part in modules(pipeline).values())
    return next((hook for hook in hooks if isinstance(hook, Waiting)), None)


def device_of(pipeline: Pipeline) -> torch.device:
    """Where the denoiser runs.

    diffusers' own property walks through all modules, a millisecond on a small UNet; a step asks
    ten times.
    """
    module = denoiser(pipeline)
    hook = getattr(module, "_hf_hook", None)
    if isinstance(hook, Waiting):
        return hook.execution_device
    return streamed_to(module) or next(module.parameters()).device
