"""Erased weights in the formats of others. Every export appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from erase.delta import ErasedDelta
from erase.delta.base import load_base
from erase.export.folders import save_part, save_pipeline
from erase.export.formats import FILES
from erase.export.lora import LoRA, extract_lora
from erase.export.published import published
from erase.export.whole import is_file, new_file, new_folder
from erase.models import DiffusionModel
from erase.models.naming import named_weights
from erase.models.pipelines import modules
from erase.models.single_file.layouts import layout_of
from erase.prompts.errors import ErasureError
from erase.tensors import all_finite


def export_diffusers(
    delta: ErasedDelta,
    base: str | Path | DiffusionModel,
    out: str | Path,
    card: str = "",
    dtype: torch.dtype = torch.float32,
    picture: str | Path | None = None,
    *,
    keep: bool = True,
) -> Path:
    """Write base + delta as a diffusers folder that stock `DiffusionPipeline.from_pretrained`
    loads.

    Args:
        delta: what changed.
        base: the checkpoint that it was made from, as for `load_model`; or that model, loaded.
        out: a folder that does not exist yet; it appears whole or not at all.
        card: text of its README.md, the model card.
        dtype: of the weights in the files. float32 holds the erased weights exactly, whatever the
            base was stored as.
        picture: before_after.png of an evaluation, to lie beside the card.
        keep: a base that is given loaded stays as it is. False: it is used up, which saves the room
            of its weights beside their casts.

    Raises:
        ErasureError: another base, an existing folder, or one that cannot be written to.
    """
    with new_folder(out, card, picture) as aside, _erased(delta, base, dtype, keep) as pipeline:
        save_pipeline(pipeline, aside)
    return Path(out)


def export_components(
    delta: ErasedDelta,
    base: str | Path | DiffusionModel,
    out: str | Path,
    card: str = "",
    dtype: torch.dtype = torch.float32,
    picture: str | Path | None = None,
    *,
    keep: bool = True,
) -> Path:
    """Write only the components that changed, each a folder (`unet/`) that its own class loads.
    Arguments as `export_diffusers`."""
    with new_folder(out, card, picture) as aside, _erased(delta, base, dtype, keep) as pipeline:
        for component in delta.components:
            save_part(getattr(pipeline, component), aside / component)
    return Path(out)


def export_single_file(
    delta: ErasedDelta,
    base: str | Path | DiffusionModel,
    out: str | Path,
    card: str = "",
    dtype: torch.dtype = torch.float32,
    picture: str | Path | None = None,
    *,
    keep: bool = True,
) -> Path:
    """Write one checkpoint file in the layout that the family was published in: of SD 3 the
    transformer and the VAE, of the other flow transformers the transformer alone. Arguments as
    `export_diffusers`.

    If `out` ends in .safetensors it is that file, without a card; else a folder with
    `model.safetensors`.
    """
    from erase.models.single_file import write_single_file

    with new_file(out, card, picture, FILES["single-file"]) as aside:
        with _erased(delta, base, dtype, keep) as pipeline:
            _check_held(delta, pipeline)
            words = {
                "concepts": delta.metadata.get("concepts", "[]"),
                "modelspec.title": delta.name,
            }
            write_single_file(pipeline, aside, dtype, words)
    return Path(out)


def _check_held(delta: ErasedDelta, pipeline: Any) -> None:
    """Refuse a single file that would not hold what changed.

    Raises:
        ErasureError: names the part.
    """
    layout = layout_of(pipeline)
    others = [part for part in delta.components if part not in layout.written] if layout else []
    if layout and others:
        raise ErasureError(
            f"a single file of {layout.name} holds its {layout.held}, and {delta.source} "
            f"changes {others[0]}; take --format diffusers or components"
        )


def export_lora(
    lora: LoRA,
    out: str | Path,
    card: str = "",
    dtype: torch.dtype = torch.float32,
    layout: str | None = None,
    picture: str | Path | None = None,
) -> Path:
    """Write a LoRA, as a file or (with `lora.json`, what it misses layer by layer) as a folder.

    `layout` is one of `erase.export.lora.LAYOUTS`, by default the one that most programs read; the
    other arguments as `export_single_file`.
    """
    with new_file(out, card, picture, FILES["lora"]) as aside:
        lora.save(aside, dtype, layout)
        if not is_file(out):
            (aside.parent / "lora.json").write_text(
                json.dumps(lora.plain(), indent=1), encoding="utf-8"
            )
    return Path(out)


def export_delta(
    delta: ErasedDelta,
    out: str | Path,
    card: str = "",
    dtype: torch.dtype = torch.float32,
    picture: str | Path | None = None,
) -> Path:
    """Write the delta, as a file or as a folder with a card, which does not say where its base lies
    on this disk. Arguments as `export_single_file`."""
    written = delta if dtype == torch.float32 else delta.rounded(dtype)
    if not is_file(out):
        written = replace(written, metadata=published(written.metadata))
    with new_file(out, card, picture, FILES["delta"]) as aside:
        written.save(aside)
    return Path(out)


def write_export(
    format: str,
    delta: ErasedDelta,
    base: str | Path | DiffusionModel,
    out: str | Path,
    card: str = "",
    dtype: torch.dtype = torch.float32,
    *,
    lora: LoRA | None = None,
    layout: str | None = None,
    picture: str | Path | None = None,
    keep: bool = True,
) -> Path:
    """Write one of `erase.export.formats.FORMATS`; arguments as its own function's above."""
    if format == "lora":
        fitted = lora or extract_lora(delta, _loaded(delta, base))
        return export_lora(fitted, out, card, dtype, layout, picture)
    if format == "delta":
        return export_delta(delta, out, card, dtype, picture)
    writers = {
        "diffusers": export_diffusers,
        "components": export_components,
        "single-file": export_single_file,
    }
    return writers[format](delta, base, out, card, dtype, picture, keep=keep)


@contextmanager
def _erased(
    delta: ErasedDelta, base: str | Path | DiffusionModel, dtype: torch.dtype, keep: bool
) -> Iterator[Any]:
    """The stock pipeline of base + delta. A base that the caller holds is afterwards as it was
    found, if it is to be kept.

    Raises:
        ErasureError: another base, or a weight beyond the dtype's range.
    """
    model = _loaded(delta, base)
    with _as_found(model, delta) if keep and model is base else nullcontext():
        pipeline = delta.apply(model).pipeline()
        for name, part in modules(pipeline).items():
            for tensor in (*part.parameters(), *part.buffers()):
                tensor.data = tensor.data.to(dtype) if tensor.is_floating_point() else tensor.data
            if beyond := [key for key, weight in named_weights(part) if not all_finite(weight)]:
                raise ErasureError(
                    f"{name}.{beyond[0]} has values beyond the range of {dtype}; use bfloat16 or "
                    "float32"
                )
        yield pipeline


def _loaded(delta: ErasedDelta, base: str | Path | DiffusionModel) -> DiffusionModel:
    return load_base(delta, base) if isinstance(base, str | Path) else base


@contextmanager
def _as_found(model: DiffusionModel, delta: ErasedDelta) -> Iterator[None]:
    """Give a model its weights back, and its configurations, into which saving writes.

    Only the weights that the delta changes are copied, since they are changed in place; the others
    are only exchanged for their casts.
    """
    pipeline, fingerprint = model.pipeline(), model.fingerprint
    parts = modules(pipeline)
    tensors = [
        (tensor, tensor.data)
        for part in parts.values()
        for tensor in (*part.parameters(), *part.buffers())
    ]
    configs = [
        (vars(part.config), dict(vars(part.config)))
        for part in parts.values()
        if hasattr(part.config, "dtype")
    ]
    holders = [
        one for one in (pipeline, *pipeline.components.values()) if hasattr(one, "_internal_dict")
    ]
    # diffusers' own configurations
    frozen = [(one, type(one._internal_dict)(one._internal_dict)) for one in holders]
    params = model.parameters()
    try:
        for name in delta.values.keys() & params.keys():
            params[name].data = params[name].data.clone()
        yield
    finally:
        for tensor, data in tensors:
            tensor.data = data
        for config, old in configs:
            config.clear()
            config.update(old)
        for one, old in frozen:
            one._internal_dict = old
        model.fingerprint = fingerprint
