"""Weights of a single file, checked against its header and read one by one into modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from erase.models.single_file import ldm
from erase.models.single_file.tensor_file import TensorFile
from erase.prompts.errors import ErasureError
from erase.tensors import all_finite


def check_weights(
    file: TensorFile, table: Sequence[ldm.Entry], modules: Mapping[str, ldm.Network]
) -> None:
    """Every weight is there, in its shape; told from the header, before any is read."""
    shapes = {
        f"{component}.{name}": tuple(tensor.shape)
        for component, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    expected = {entry.key: entry.shape(shapes[entry.names[0]]) for entry in table}
    missing = [key for key in expected if key not in file.shapes]
    if missing:
        raise ErasureError(
            f"{file.path} lacks {len(missing)} of the {len(expected)} weights of this "
            f"architecture, the first is {missing[0]} {list(expected[missing[0]])}; fetch the file "
            "again, or if it is of another size, give its configuration (load.config)"
        )
    for entry in table:
        shape, stored = expected[entry.key], file.shapes[entry.key]
        # some programs write these as linear
        if stored != shape and not (entry.form == "conv1x1" and stored == shape[:2]):
            raise ErasureError(
                f"{file.path}: {entry.key} should have the shape {list(shape)}, but has "
                f"{list(stored)}; if the model is of another size, give its configuration "
                "(load.config)"
            )


def refuse_surplus(file: TensorFile, surplus: Sequence[str], place: str, advice: str) -> None:
    """Nothing is there that would be left out without a word.

    Args:
        file: the file.
        surplus: keys of it that are no weight of the architecture; none is no error.
        place: what has no place for them.
        advice: what to do with `load.config`.
    """
    if surplus:
        first = surplus[0]
        raise ErasureError(
            f"{file.path} holds {len(surplus)} tensors for which {place} has no place, the first "
            f"is {first} {list(file.shapes[first])}; {advice} (load.config); if they do no harm, "
            "leave them out (load.ignore, a regular expression of how their names begin)"
        )


def fill(
    file: TensorFile,
    table: Sequence[ldm.Entry],
    modules: Mapping[str, ldm.Network],
    dtype: torch.dtype,
    stated: Mapping[str, Tensor] | None = None,
) -> None:
    """Read the weights one by one into the modules.

    Args:
        file: an open file.
        table: where each weight is.
        modules: by component, their parameters on the meta device.
        dtype: of the weights in memory. In float16, the layers of T5 that overflow stay in float32,
            as transformers keeps them.
        stated: weights that the file does not hold, by `component.parameter`.
    """
    wide = {part: _wide(module, dtype) for part, module in modules.items()}
    states: dict[str, dict[str, Tensor]] = {component: {} for component in modules}
    for name, tensor in (stated or {}).items():
        component, _, parameter = name.partition(".")
        states[component][parameter] = tensor.to(dtype)
    for entry in table:
        part, *words = entry.names[0].split(".")
        own = dtype if wide[part].isdisjoint(words) else torch.float32
        tensor = converted(file.read(entry.key), own, f"{file.path}: {entry.key}")
        for name, weight in zip(entry.names, entry.unpack(tensor), strict=True):
            component, _, parameter = name.partition(".")
            states[component][parameter] = weight
    for component, module in modules.items():
        module.load_state_dict(states.pop(component), assign=True)
        module.eval()


def _wide(module: ldm.Network, dtype: torch.dtype) -> set[str]:
    """Words in the names of the layers that stay in float32."""
    kept = getattr(module, "_keep_in_fp32_modules", None) or ()
    return set(kept) if dtype == torch.float16 else set()


def converted(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in another precision.

    Raises:
        ErasureError: it is not of floating point, or holds values that are not finite there.
    """
    if tensor.is_floating_point() and tensor.element_size() == 1:
        raise ErasureError(
            f"{name} holds {tensor.dtype}, which is too coarse to train or to compare; fetch it in "
            "float16 or float32"
        )
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        kind = tensor.dtype if tensor.layout == torch.strided else tensor.layout
        raise ErasureError(
            f"{name} holds {kind}, not dense floating point numbers; a quantised or sparse "
            "checkpoint cannot be used"
        )
    cast = tensor.to(dtype)
    if not all_finite(cast):
        if all_finite(tensor.double()):
            raise ErasureError(
                f"{name} holds values up to {tensor.abs().max():.3g}, too large for {dtype}; use "
                "float32 or bfloat16"
            )
        raise ErasureError(
            f"{name} holds NaN or infinite values; the checkpoint is damaged, fetch or train it "
            "again"
        )
    return cast
