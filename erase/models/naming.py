"""Names of weights and layers, the same under every version of transformers.

transformers 5.6 took the module `text_model` out of `CLIPTextModel`, and out of no other class. A
name is as the newest version has it.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from erase.models.base import DiffusionModel, fingerprint

NESTED = "text_model"


def named_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter by its name, in the order of the architecture."""
    prefix = former_prefix(module)
    for name, param in module.named_parameters():
        yield name.removeprefix(prefix), param


def named_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each module that lies in this one by its name."""
    prefix = former_prefix(module)
    for name, layer in module.named_modules():
        yield name.removeprefix(prefix), layer


def former_prefix(module: nn.Module) -> str:
    """What the names of this version begin with, and those of the newest do not."""
    return f"{NESTED}." if [name for name, _ in module.named_children()] == [NESTED] else ""


def former_fingerprint(model: DiffusionModel) -> str:
    """The fingerprint that the model had under transformers before 5.6, when it was taken over the
    names of that version."""
    from transformers import CLIPTextModel

    former = []
    for name, param in model.parameters().items():
        part, _, own = name.partition(".")
        is_clip = isinstance(model.component(part), CLIPTextModel)
        former.append((f"{part}.{NESTED}.{own}" if is_clip else name, param))
    return fingerprint(former)
