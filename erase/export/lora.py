"""A delta as a LoRA: low-rank factors of the change, in a file that stock
`pipeline.load_lora_weights` reads, and most programs beside it.

A LoRA is an approximation: it holds the nearest matrices of low rank (Eckart and Young, 1936), and
nothing of biases and norms. What that loses is measured layer by layer and kept with it.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erase.delta import ErasedDelta
from erase.delta.origin import config_of
from erase.export.diffusers_layout import adapter_config, diffusers_tensors, silent_factors
from erase.export.kohya import OUTSIDE, kohya_entries, kohya_tensors, lora_header
from erase.export.published import published
from erase.models import DiffusionModel
from erase.models.naming import named_layers
from erase.models.single_file.ldm import Entry
from erase.prompts.errors import ErasureError, unknown
from erase.tensor_files import save_tensors

RANK = 16
LAYOUTS = {
    "kohya": (
        "names as sd-scripts gives them, which ComfyUI, A1111, Forge, sd-scripts, "
        "stable-diffusion.cpp and diffusers read"
    ),
    "diffusers": (
        "names of diffusers, which it reads whole, for transformers; ComfyUI has those of SD 3's "
        "and FLUX.1's too"
    ),
}


@dataclass(frozen=True)
class LayerFit:
    """How well one layer's change is held."""

    name: str
    rank: int
    full_rank: int
    """the smaller side of the layer's matrix: at this rank nothing is lost"""
    norm: float
    """Frobenius norm of the change"""
    error: float
    """||change - up @ down|| / ||change||, 0 to 1"""


@dataclass(frozen=True)
class LoRA:
    """Factors of the changed linear and convolutional layers: change = up @ down, at scale 1."""

    down: dict[str, Tensor]
    """`component.module` -> the module's weight shape with `rank` outputs, float32"""
    up: dict[str, Tensor]
    """`component.module` -> (outputs, rank), of a convolution (outputs, rank, 1, 1), float32"""
    layers: list[LayerFit]
    left_out: dict[str, float]
    """parameter that no LoRA holds (bias, norm, embedding, projection of pooled text) -> norm of
    its change"""
    metadata: dict[str, str] = field(default_factory=dict)
    """the delta's"""
    kohya: tuple[Entry, ...] = ()
    """what a file in the kohya layout holds; empty for a family that has none"""
    header: dict[str, str] = field(default_factory=dict)
    """what tells programs the base's family: ModelSpec's keys and sd-scripts'"""
    silent: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """down and up factors of zero that a file holds, too: see `silent_factors`"""

    @property
    def layout(self) -> str:
        """The layout that most programs read: kohya, for transformers diffusers."""
        of_transformer = any(name.startswith("transformer.") for name in self.down)
        return "kohya" if self.kohya and not of_transformer else "diffusers"

    @property
    def outside(self) -> dict[str, float]:
        """Layers outside of the blocks, which sd-scripts and stable-diffusion.cpp pass over -> norm
        of their change."""
        return {fit.name: fit.norm for fit in self.layers if OUTSIDE.fullmatch(fit.name)}

    @property
    def outside_share(self) -> float:
        """Share of the squared norm of the change that lies in these layers."""
        return sum(norm**2 for norm in self.outside.values()) / self._total

    @property
    def error(self) -> float:
        """||whole change - what the LoRA holds|| / ||whole change||, with what is left out counted
        as lost."""
        lost = sum((fit.error * fit.norm) ** 2 for fit in self.layers) + sum(
            norm**2 for norm in self.left_out.values()
        )
        return math.sqrt(lost / self._total)

    @property
    def left_out_share(self) -> float:
        """Share of the squared norm of the change that lies in parameters which no LoRA holds."""
        return sum(norm**2 for norm in self.left_out.values()) / self._total

    @property
    def _total(self) -> float:
        norms = [*(fit.norm for fit in self.layers), *self.left_out.values()]
        return sum(norm**2 for norm in norms)

    @property
    def ranks(self) -> dict[str, int]:
        """`component.module` -> rank."""
        return {name: down.shape[0] for name, down in self.down.items()}

    def plain(self) -> dict[str, Any]:
        """The fit as JSON has it."""
        numbers = {
            "error": self.error,
            "left_out_share": self.left_out_share,
            "left_out": self.left_out,
        }
        numbers |= {"outside_share": self.outside_share, "outside": self.outside}
        return numbers | {"layers": [asdict(fit) for fit in self.layers]}

    def save(
        self, path: str | Path, dtype: torch.dtype = torch.float32, layout: str | None = None
    ) -> None:
        """Write one safetensors file, whole or not at all.

        Args:
            path: `pytorch_lora_weights.safetensors` is the name that `load_lora_weights(folder)`
                looks for.
            dtype: of the factors in the file.
            layout: one of `LAYOUTS`; by default `self.layout`.

        Raises:
            ErasureError: another layout, or kohya for a family that it has no names for.
        """
        layout = layout or self.layout
        if layout not in LAYOUTS:
            raise unknown("LoRA layout", layout, LAYOUTS)
        if layout == "kohya" and not self.kohya:
            raise ErasureError(
                "the kohya layout has no names for this family; leave the layout out, or take "
                "diffusers"
            )
        metadata = {**published(self.metadata), **self.header, "format": "pt"}
        down = self.down | {name: pair[0] for name, pair in self.silent.items()}
        up = self.up | {name: pair[1] for name, pair in self.silent.items()}
        if layout == "kohya":
            tensors = kohya_tensors(self.kohya, down, up, dtype)
        else:
            tensors = diffusers_tensors(down, up, dtype)
            ranks = {name: len(factor) for name, factor in down.items()}
            metadata["lora_adapter_metadata"] = json.dumps(adapter_config(ranks))
        save_tensors(path, tensors, metadata)

    def as_delta(self, base: DiffusionModel) -> ErasedDelta:
        """Base + LoRA as a delta, so that it can be evaluated beside the delta that it was taken
        from; `base` stays as it is.

        Raises:
            ErasureError: another base.
        """
        own = self.metadata.get("base_fingerprint", "")
        if base.fingerprint != own:
            raise ErasureError(
                f"this LoRA was made for the base {own[:12]}, but {base.name} has "
                f"{base.fingerprint[:12]}"
            )
        params = base.parameters()
        old = {f"{name}.weight": params[f"{name}.weight"].detach().cpu() for name in self.down}
        new = {
            f"{name}.weight": merged(old[f"{name}.weight"], self.up[name], self.down[name])
            for name in self.down
        }
        config = config_of(self.metadata, "the delta of this LoRA") | {"lora_ranks": self.ranks}
        return ErasedDelta.between(
            old, new, {**self.metadata, "config": json.dumps(config, sort_keys=True)}
        )


def extract_lora(
    delta: ErasedDelta, base: DiffusionModel, rank: int | None = None, energy: float | None = None
) -> LoRA:
    """The best low-rank factors of a delta, layer by layer.

    Args:
        delta: what changed.
        base: the model that it was made from; it stays as it is.
        rank: of every layer, at most its full rank; 16 if neither this nor `energy` is given.
        energy: keep this fraction of each layer's squared change, in (0, 1], with the smallest rank
            that does; `rank` then caps it.

    Raises:
        ErasureError: a rank below one, an energy outside (0, 1], another base, or a delta that
            changes no layer which a LoRA can hold.
    """
    if energy is not None and not 0 < energy <= 1:
        raise ErasureError(
            f"energy must be in (0, 1], not {energy}; 0.9 keeps 90 % of each layer's squared change"
        )
    rank = RANK if rank is None and energy is None else rank
    if rank is not None and rank < 1:
        raise ErasureError(f"the rank of a LoRA must be at least 1, not {rank}")
    delta.check(base)
    params, holders = base.parameters(), _holders(base, delta.components)
    down, up, layers, left_out = {}, {}, [], {}
    for name in delta.values:
        change = delta.change(name, params[name])
        if not change.any():  # from 0.0 to -0.0 alone
            continue
        if name not in holders:
            left_out[name] = change.norm().item()
            continue
        module = name.removesuffix(".weight")
        a, b, fit = _fit(module, change.flatten(1).to(base.device), rank, energy)
        down[module] = a.reshape(-1, *change.shape[1:]).contiguous()
        up[module] = b.reshape(*b.shape, *(1,) * (change.ndim - 2)).contiguous()
        layers.append(fit)
    if not layers:
        raise ErasureError(
            f"{delta.source} changes no linear or convolutional layer, so no LoRA can hold any of "
            "it"
        )
    pipeline, ranks = base.pipeline(), {fit.rank for fit in layers}
    silent = silent_factors(base, down)
    kohya = kohya_entries(pipeline, [*down, *silent])
    header = lora_header(pipeline, delta.name, ranks)
    return LoRA(down, up, layers, left_out, dict(delta.metadata), kohya, header, silent)


def _holders(model: DiffusionModel, components: list[str]) -> set[str]:
    """Names of the weights that a LoRA can hold: those of linear and of ungrouped two-dimensional
    convolutional layers.

    A text encoder's projection is none of them: no program but diffusers has a place for it, and
    that one cannot load it in all ranks. Nor are those of a T5, which diffusers loads no LoRA of.
    """
    loaded = model.pipeline()._lora_loadable_modules
    return {
        f"{component}.{name}.weight"
        for component in components
        if component in loaded
        for name, module in named_layers(model.component(component))
        if name != "text_projection"
        and (
            isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        )
    }


def _fit(
    name: str, change: Tensor, rank: int | None, energy: float | None
) -> tuple[Tensor, Tensor, LayerFit]:
    """Down and up factor of one change (float64, outputs x inputs), and their error."""
    down, up = _factors(change, rank, energy)
    norm = change.norm().item()
    error = (change - up.double() @ down.double()).norm().item() / norm
    return down.cpu(), up.cpu(), LayerFit(name, len(down), min(change.shape), norm, error)


def _factors(change: Tensor, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor]:
    """The truncated SVD with each singular value shared equally between both factors.

    By the eigenvectors of the smaller Gram matrix in float64: exact to float32, the whole spectrum
    included, and several times quicker than an SVD of the wide matrices of convolutions.
    """
    wide = change.shape[0] <= change.shape[1]
    power, vectors = torch.linalg.eigh(change @ change.T if wide else change.T @ change)
    # squared singular values, largest first
    power = power.flip(0).clamp(min=0)
    vectors = vectors.flip(1)
    size = int((power > power[0] * 1e-14).sum())  # what is below is rounding
    if energy is not None:
        size = min(size, int((power.cumsum(0) < energy * power.sum()).sum()) + 1)
    size = min(size, rank or size)
    basis, root = vectors[:, :size], power[:size].sqrt().sqrt()
    if wide:
        return ((basis.T @ change) / root[:, None]).float(), (basis * root).float()
    return (basis * root).T.float(), ((change @ basis) / root).float()


def merged(base: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A layer's weight with up @ down added: in float64, rounded once to the base's dtype."""
    change = up.flatten(1).double() @ down.flatten(1).double()
    return (base.double() + change.reshape(base.shape)).to(base.dtype)
