"""One foreign source read: its difference to the base, and what is said of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from erase.delta import ErasedDelta
from erase.foreign.files import Source
from erase.foreign.lora import is_lora, read_lora
from erase.foreign.names import Places, layers, weights_of
from erase.foreign.weights import Changes, nowhere, read_weights
from erase.models import DiffusionModel
from erase.models.pipelines import modules
from erase.models.single_file.layouts import layout_of
from erase.models.single_file.ldm import TEXTS, spare_keys
from erase.models.single_file.recognise import FOREIGN, modern
from erase.models.single_file.spec import family_name
from erase.models.single_file.tensor_file import TensorFile, open_tensors
from erase.prompts.errors import ErasureError

METHOD = "foreign"
"""of a delta that was read from another program's file; also its metadata's key for the files"""
log = logging.getLogger("erase")


@dataclass(frozen=True)
class Read:
    """A source as a delta."""

    delta: ErasedDelta
    adds: bool
    """whether it is a change, a LoRA or a delta, which adds to weights that others give"""
    told: dict[str, Any]
    """file (its name alone), format, dtype, sha256; left_out, where something was"""


def read_source(model: DiffusionModel, source: Source, known: Places) -> Read:
    """The difference of one source to the base; errors as `erase.foreign.read_erased`."""
    if source.kind == "delta":
        delta = ErasedDelta.load(source.path)
        delta.check(model)
        told = {"file": source.path.name, "format": "delta", "sha256": delta.sha256}
        return Read(delta, True, told)
    _check_kind(model, source)
    base = {name: param.detach().cpu() for name, param in model.parameters().items()}
    fixed = _fixed(model, base)
    changes = Changes()
    strange: list[str] = []
    kinds = set()
    for path, prefix in source.files.items():
        with open_tensors(path, nested=True) as opened:
            file = modern(opened)
            kinds.add("LoRA" if is_lora(file) else "weights")
            if is_lora(file):
                left = read_lora(file, layers(model, known), base, changes)
            else:
                left = read_weights(file, known, base, fixed, changes, prefix)
            if len(left) == len(file.shapes):
                raise nowhere(file, known, _what(file))
        strange += left
    changes.left_out += _left_out(model, strange)
    _tell(model, source, changes)
    delta = ErasedDelta(
        changes.values,
        changes.bits,
        {"base_fingerprint": model.fingerprint, "base_id": model.name, "method": METHOD},
        str(source.path),
    )
    return Read(delta, "LoRA" in kinds, _told(source, " and ".join(sorted(kinds)), changes))


def _told(source: Source, kind: str, changes: Changes) -> dict[str, Any]:
    told: dict[str, Any] = {
        "file": source.path.name,
        "format": f"{kind}, {source.path.suffix.lstrip('.') or 'folder'}",
        "dtype": ", ".join(sorted(changes.dtypes)),
        "sha256": source.sha256,
    }
    return told | ({"left_out": changes.left_out} if changes.left_out else {})


def _fixed(model: DiffusionModel, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the pipeline that no delta changes: the VAE's."""
    fixed = {}
    for part, module in modules(model.pipeline()).items():
        for name, param in weights_of(module):
            if f"{part}.{name}" not in base:
                fixed[f"{part}.{name}"] = param.detach().cpu()
    return fixed


def _check_kind(model: DiffusionModel, source: Source) -> None:
    """Refuse a pipeline of another class, or one that predicts something else."""
    own = type(model.pipeline()).__name__
    stated = model.pipeline().scheduler.config.get("prediction_type", "epsilon")
    for theirs, ours in ((source.pipeline, own), (source.prediction, stated)):
        if theirs not in (None, ours):
            raise ErasureError(
                f"{source.path} is not of this base: {theirs!r} there, {ours!r} in {model.name}; "
                "name the checkpoint that it was made from with --model"
            )


def _what(file: TensorFile) -> str | None:
    """What a file is whose tensors are none of the base's."""
    for pattern, what in FOREIGN:
        if not what.startswith(("a bare", "a LoRA")) and any(
            re.search(pattern, key) for key in file.shapes
        ):
            return what
    return None


def _left_out(model: DiffusionModel, strange: Iterable[str]) -> list[str]:
    """The keys of a source that are no weight of the base, in words; those that hold no weight of
    any pipeline (noise schedule, positions, counts) are not worth one."""
    family, layout = family_name(model.pipeline()), layout_of(model.pipeline())
    spare = r"(.*\.)?(position_ids|logit_scale|pos_embed|num_batches_tracked)"
    spare += f"|{layout.spare}" if layout and layout.spare else ""
    if family in TEXTS:
        spare += "|" + spare_keys(family, modules(model.pipeline())).pattern
    averaged = [key for key in strange if key.startswith("model_ema.")]
    others = [key for key in strange if not re.fullmatch(spare, key)]
    said = []
    if averaged:
        said.append(
            f"its moving average ({len(averaged)} tensors); the last weights are taken, as A1111 "
            "and ComfyUI take them"
        )
    if others:
        few = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        said.append(f"{len(others)} that are no weights of this base: {few}")
    return said


def _tell(model: DiffusionModel, source: Source, changes: Changes) -> None:
    """Say what was read, and what was not.

    Raises:
        ErasureError: nothing that differs.
    """
    counts = []
    for component in dict.fromkeys(name.split(".")[0] for name in changes.given):
        given = sum(name.startswith(f"{component}.") for name in changes.given)
        counts.append(f"{given} of the {len(model.parameters(component))} tensors of {component}")
    read = " and ".join(counts) or "nothing but a VAE"
    moved = sum(value.numel() for value in changes.values.values())
    by_rounding = (
        f" ({changes.rounded:,} differ by rounding to {', '.join(sorted(changes.dtypes))} alone)"
        if changes.rounded
        else ""
    )
    if not moved:
        raise ErasureError(
            f"{source.path} holds {read}, of which no value differs from {model.name}"
            f"{by_rounding}; this is the base: name the erased checkpoint"
        )
    log.info(
        "%s: %s; %s values differ from %s%s",
        source.path,
        read,
        f"{moved:,}",
        model.name,
        by_rounding,
    )
    for left in changes.left_out:
        log.warning("%s: left out: %s", source.path, left)
