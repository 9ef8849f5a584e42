"""The denoiser while it trains: settings that save time or memory in a step, undone after the last
one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from erase.models import PRECISIONS, DiffusionModel, check_precision
from erase.models.by_block import streamed_to
from erase.models.half_precision import stand_ins
from erase.models.pipelines import denoiser, modules
from erase.models.waiting import waiting
from erase.parallel.fsdp import check_sharded, sharded_twins, sharding
from erase.parallel.layout import ActiveWeights
from erase.prompts.errors import ErasureError, unknown
from erase.training.config import TrainConfig
from erase.training.recompute import SavedActivations, recomputing

ATTENTION = ("auto", "sdpa", "xformers", "sliced")
# latent positions up to which a CPU trains with plain attention; at 32 * 32 it is no quicker, and
# takes 2 GB more
PLAIN_TOKENS = 16 * 16
INSTALL_XFORMERS = 'pip install "concept-erasure-toolkit[xformers]"'


@contextmanager
def running(
    model: DiffusionModel, params: Mapping[str, nn.Parameter], config: TrainConfig
) -> Iterator[ActiveWeights]:
    """The model as `config` and the launch want it run; afterwards it is as it was found.

    Yields:
        What stands in the place of `params` meanwhile.

    Raises:
        ErasureError: an unknown attention, a library or a compiler that is not installed, or what
            FSDP cannot do.
    """
    check_precision(config.mixed_precision)
    pipeline, device = model.pipeline(), model.device
    names = {name.split(".")[0] for name in params}
    parts = {  # every step runs the denoiser, of a text encoder that trains too
        name: part
        for name, part in modules(pipeline).items()
        if name in names or part is denoiser(pipeline)
    }
    with ExitStack() as stack:
        if moved := waiting(pipeline):
            stack.enter_context(moved.held(parts.values()))
        elif config.offload:
            stack.enter_context(idle_on_cpu(model, set(parts)))
        active = stack.enter_context(_active(model, params, parts, config, device))
        by_block = any(map(streamed_to, parts.values()))  # which makes blocks again by itself
        for part in map(model.component, parts):
            again = config.gradient_checkpointing and not by_block
            stack.enter_context(checkpointed(part, again))
            stack.enter_context(compiled(part, config.compile))
        memory = SavedActivations() if config.selective_recompute and not by_block else None
        stack.enter_context(recomputing(modules(pipeline).values(), memory))
        stack.enter_context(attention(model, config.attention))
        yield active


def check_by_block(config: TrainConfig) -> None:
    """Refuse what does not go with `load.offload blocks`, before anything is loaded.

    Raises:
        ErasureError: such a setting or launch.
    """
    refused = {
        "train.compile": config.compile,
        "train.mixed_precision fp16": config.mixed_precision == "fp16",
        f"train.optimizer {config.optimizer}": config.optimizer.endswith("8bit"),
        "FSDP": sharding() is not None,
    }
    for name, asked in refused.items():
        if asked:
            raise ErasureError(
                f"{name} does not go with load.offload blocks, where what trains stays in main "
                "memory; leave one of them out (load.offload true moves whole parts)"
            )


@contextmanager
def _active(
    model: DiffusionModel,
    params: Mapping[str, nn.Parameter],
    parts: Mapping[str, nn.Module],
    config: TrainConfig,
    device: torch.device,
) -> Iterator[ActiveWeights]:
    """Weights in the layout that the launch asks for, in the precision of the steps."""
    half = PRECISIONS[config.mixed_precision]
    if asked := check_sharded(config):
        with sharded_twins(model, parts, half, asked, device) as layout:
            parameters = model.parameters()
            yield ActiveWeights({name: parameters[name] for name in params}, layout=layout)
    else:
        with stand_ins(parts, half, device, config.channels_last, config.offload) as own:
            yield ActiveWeights(params, own)


@contextmanager
def checkpointed(module: Any, on: bool) -> Iterator[None]:
    """Gradient checkpointing where asked for.

    transformers checkpoints only in train mode, so the layers that it checkpoints are put there,
    and they alone: dropouts stay off. Its own switch would leave a hook on the embeddings.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not on:
        yield
        return
    for layer in module.modules():
        layer.training = isinstance(layer, GradientCheckpointingLayer)
    again = partial(checkpoint, use_reentrant=False)
    # the one method that diffusers and transformers call alike
    module._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=again)
    try:
        yield
    finally:
        module.eval()
        module._set_gradient_checkpointing(enable=False)


@contextmanager
def attention(model: DiffusionModel, kind: str) -> Iterator[None]:
    """The denoiser's attention by this kernel.

    `auto` is the plain one (all scores, then softmax) for small latents on a CPU: the backward pass
    of the fused one took a third of a step there. Elsewhere it is the fused one, which does not
    keep the scores (SD 1.x at 512 pixels: 0.5 GB a layer).
    """
    check_attention(kind, model.device)
    module = denoiser(model.pipeline())
    plain = (
        kind == "auto"
        and model.device.type == "cpu"
        and model.latent_shape[1] * model.latent_shape[2] <= PLAIN_TOKENS
    )
    processors = dict(getattr(module, "attn_processors", {}))
    if not processors and kind not in ("auto", "sdpa"):
        raise ErasureError(
            f"diffusers has no {kind} attention for a {type(module).__name__}; use attention auto "
            "or sdpa"
        )
    try:
        if plain and processors:
            ours = {
                name: AttnProcessor() if type(one) is AttnProcessor2_0 else one
                for name, one in processors.items()
            }
            module.set_attn_processor(ours)
        elif kind == "sliced":
            _sliced(module)
        elif kind == "xformers":
            _xformers(module)
        with _kernel(plain):
            yield
    finally:
        if processors:
            module.set_attn_processor(dict(processors))  # it empties the dict that it is given


def _kernel(plain: bool) -> AbstractContextManager[None]:
    """For processors that have no plain sibling (joint attention), torch's own."""
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()  # type: ignore[return-value]


def _sliced(module: Any) -> None:
    if not hasattr(module, "set_attention_slice"):
        raise ErasureError(
            f"diffusers has no sliced attention for a {type(module).__name__}; use attention auto "
            "or sdpa"
        )
    module.set_attention_slice("auto")


def check_attention(kind: str, device: torch.device) -> None:
    """Refuse, before hours are spent on latents, a kernel that is unknown or that a device has not.

    Raises:
        ErasureError: such a kernel.
    """
    if kind not in ATTENTION:
        raise unknown("attention", kind, ATTENTION)
    if kind != "xformers":
        return
    if device.type != "cuda":
        raise ErasureError(
            f"attention xformers needs a GPU (and, there, {INSTALL_XFORMERS}), but this trains on "
            f"the {device.type}; use attention sdpa"
        )
    if find_spec("xformers") is None:
        raise ErasureError(
            f"attention xformers needs xformers, which is not installed; {INSTALL_XFORMERS}, or "
            "use attention sdpa"
        )


def _xformers(module: Any) -> None:
    try:
        module.enable_xformers_memory_efficient_attention()
    except (
        ImportError,
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # another torch's build; no kernel for this GPU
        reason = str(error).strip().split("\n")[0]
        raise ErasureError(
            f"attention xformers cannot be used: {reason}; use attention sdpa"
        ) from error


@contextmanager
def compiled(module: nn.Module, on: bool) -> Iterator[None]:
    """`torch.compile` of the forward pass (and with it of the backward pass)."""
    if not on:
        yield
        return
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "c++", "clang++")):
        raise ErasureError(
            "compile needs a C++ compiler, and none is installed; install g++, or train without "
            "compile"
        )
    module.compile()
    try:
        yield
    finally:
        module._compiled_call_impl = None  # torch has a way in and none back


@contextmanager
def idle_on_cpu(model: DiffusionModel, used: set[str]) -> Iterator[None]:
    """The parts of the pipeline that no step runs (text encoders, VAE: latents and embeddings are
    cached) wait on the CPU."""
    pipeline = model.pipeline()
    idle = [part for name, part in modules(pipeline).items() if name not in used]
    homes = [(part, next(part.parameters()).device) for part in idle]
    for part, _ in homes:
        part.to("cpu")
    try:
        yield
    finally:
        for part, home in homes:
            part.to(home)
