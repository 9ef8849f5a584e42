"""Several deltas of one base: added, scaled, subtracted; and how far they are in each other's
way."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, permutations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from erase.compose.ties import KEEP, Part, change_of, check_keep, elected, trimmed
from erase.delta import ErasedDelta, difference
from erase.delta.origin import config_of, foreign_of, held
from erase.models import DiffusionModel
from erase.prompts.errors import ErasureError, unknown
from erase.tensors import all_finite, indices

if TYPE_CHECKING:
    from rich.table import Table

ON_CONFLICT = ("sum", "first", "last", "ties", "error")


def compose(
    base: DiffusionModel,
    parts: Sequence[tuple[ErasedDelta, float]],
    on_conflict: str = "sum",
    keep: float = KEEP,
) -> ErasedDelta:
    """One delta of several: base + sum of scale * (erased - base), computed in float64 and rounded
    once.

    Where a single part of scale 1 changes a weight, its own value is taken, bit for bit. Scale 0
    leaves a part out, a negative scale adds its concept instead of erasing it.

    Args:
        base: the model that all of them were made from; it stays as it is.
        parts: deltas with their scales.
        on_conflict: for weights that several parts change: sum of the changes; the change of the
            first or the last part; ties, the mean of those in the direction of their sum, of what
            `keep` leaves of each part (`erase.compose.ties`); or error.
        keep: of ties alone: fraction of each part's changes, the largest, that count.

    Raises:
        ErasureError: parts of different bases, a scale or a result that is not finite, or a
            conflict where `error` was asked for.
    """
    if on_conflict not in ON_CONFLICT:
        raise unknown("on_conflict", on_conflict, ON_CONFLICT)
    if bad := [scale for _, scale in parts if not math.isfinite(scale)]:
        raise ErasureError(f"a delta cannot be scaled by {bad[0]}; give a finite number, e.g. 1.0")
    deltas = [delta for delta, _ in parts]
    _check_bases(base, deltas)
    check_keep(keep)
    live = [(delta, scale) for delta, scale in parts if scale]
    if on_conflict == "ties":
        live = [(trimmed(base.parameters(), delta, keep), scale) for delta, scale in live]
    if on_conflict == "error":
        _check_apart([delta for delta, _ in live])
    values, bits = {}, {}
    for name, old in _changed_tensors(base, [delta for delta, _ in live]):
        touching = [
            (delta.places(name), delta.values[name], scale)
            for delta, scale in live
            if name in delta.values
        ]
        new = _combined(name, old.flatten(), touching, on_conflict).reshape(old.shape)
        if change := difference(old, new):
            values[name], bits[name] = change
    how: dict[str, str | float] = {"on_conflict": on_conflict}
    if on_conflict == "ties":
        how["keep"] = keep
    return ErasedDelta(values, bits, _describe(parts, how))


def check_distinct(deltas: Sequence[ErasedDelta]) -> None:
    """Refuse to add one erasure twice.

    Raises:
        ErasureError: two of the deltas are one, or one holds another, as a part or a request.
    """
    for first, second in permutations(deltas, 2):
        if first.sha256 == second.sha256:
            raise ErasureError(
                f"{first.source} and {second.source} are the same delta; give it once, and for "
                "more of it --scale"
            )
        if second.sha256 in held(first.metadata, first.source):
            raise ErasureError(
                f"{first.source} holds what {second.source} changes; leave {second.source} out"
            )


def _check_bases(base: DiffusionModel, deltas: Sequence[ErasedDelta]) -> None:
    if not deltas:
        raise ErasureError("there is no delta to compose; give at least one")
    first = deltas[0]
    for delta in deltas[1:]:
        ours, theirs = (d.metadata.get("base_fingerprint", "") for d in (first, delta))
        if ours != theirs:
            raise ErasureError(
                f"{first.source} ({first.title}) was made from base "
                f"{first.metadata.get('base_id', '?')} (fingerprint {ours[:12]}), {delta.source} "
                f"({delta.title}) from {delta.metadata.get('base_id', '?')} ({theirs[:12]}); only "
                "deltas of one base can be composed"
            )
    for delta in deltas:
        delta.check(base)


def _check_apart(deltas: Sequence[ErasedDelta]) -> None:
    """Refuse weights that several of the deltas change."""
    shared = {}
    for name in dict.fromkeys(name for delta in deltas for name in delta.values):
        places = [delta.places(name) for delta in deltas if name in delta.values]
        several = torch.cat(places).unique(return_counts=True)[1] > 1
        shared[name] = int(several.sum())
    if total := sum(shared.values()):
        first = next(name for name, count in shared.items() if count)
        raise ErasureError(
            f"{total:,} weights are changed by several deltas, the first of {first}; give "
            "--on_conflict sum, first, last or ties to say what they become"
        )


def _changed_tensors(
    base: DiffusionModel, deltas: Sequence[ErasedDelta]
) -> Iterator[tuple[str, Tensor]]:
    """Name and base value (on the CPU) of every parameter that any of the deltas changes."""
    for name, param in base.parameters().items():
        if any(name in delta.values for delta in deltas):
            yield name, param.detach().cpu()


def _combined(name: str, base: Tensor, parts: list[Part], on_conflict: str) -> Tensor:
    """The new values of one tensor; `base` is flat."""
    if on_conflict in ("first", "last"):
        parts = _disjoint(base, parts if on_conflict == "first" else parts[::-1])
    if on_conflict == "ties":
        parts = elected(base, parts)
    changes = torch.zeros(base.shape, dtype=torch.int32)
    for where, _, _ in parts:
        changes.scatter_add_(0, where, torch.ones(where.shape, dtype=torch.int32))
    total = base.double()
    for part in parts:
        where, change = part[0], change_of(base, part)
        if on_conflict == "ties":  # the mean of those that are left
            change /= changes.index_select(0, where)
        total.scatter_add_(0, where, change)
    new = total.to(base.dtype)
    if not all_finite(new):
        raise ErasureError(
            f"the composed values of {name} are not finite in {base.dtype}; use smaller scales"
        )
    for where, values, scale in parts:
        # its own value where it is alone: base + (value - base) may round, and loses the sign of
        # zero
        if scale == 1:
            alone = indices(changes.index_select(0, where) == 1)
            new.scatter_(
                0, where.index_select(0, alone), values.index_select(0, alone).to(base.dtype)
            )
    return new


def _disjoint(base: Tensor, parts: list[Part]) -> list[Part]:
    """The same parts, each without the weights of those before it."""
    taken, disjoint = torch.zeros(base.shape, dtype=torch.bool), []
    for where, values, scale in parts:
        free = indices(~taken.index_select(0, where))
        disjoint.append((where.index_select(0, free), values.index_select(0, free), scale))
        taken.index_fill_(0, where, True)
    return disjoint


def _describe(
    parts: Sequence[tuple[ErasedDelta, float]], how: Mapping[str, str | float]
) -> dict[str, str]:
    """Metadata of a composed delta: `concepts` are those that it erases; `parts` tells of each with
    its scale."""
    first = parts[0][0].metadata
    entries: list[dict[str, Any]] = [
        {
            "erased": delta.title,
            "scale": scale,
            "method": delta.metadata.get("method", "?"),
            "sha256": delta.sha256,
        }
        for delta, scale in parts
    ]
    configs = [config_of(delta.metadata, delta.source) for delta, _ in parts]
    concepts: list[dict[str, Any]] = []  # each once, however many of the parts erase it
    foreign: list[dict[str, Any]] = []
    for delta, scale in parts:
        if scale > 0:
            concepts += [concept for concept in delta.concepts if concept not in concepts]
            foreign += foreign_of(delta.metadata, delta.source)
    return {
        **{
            key: first[key]
            for key in ("base_fingerprint", "base_id", "created_with", "license")
            if key in first
        },
        "method": "+".join(dict.fromkeys(part["method"] for part in entries)),
        "config": json.dumps({**how, "parts": configs}, sort_keys=True),
        "concepts": json.dumps(concepts),
        "parts": json.dumps(entries),
        **({"foreign": json.dumps(foreign, ensure_ascii=False)} if foreign else {}),
    }


@dataclass(frozen=True)
class Overlap:
    """How far two deltas change the same weights of one component (or of all), and in the same
    direction."""

    a: str
    b: str
    component: str
    """e.g. unet; `all` for all together, where there are several"""
    count_a: int
    count_b: int
    shared: int
    """weights that both change"""
    expected: float
    """weights that both would change if each had chosen as many at random, tensor by tensor"""
    cosine: float
    """of the two changes over the shared weights: 1 same direction, -1 opposite, near 0 unrelated;
    0 where none is shared"""

    @property
    def jaccard(self) -> float:
        """Shared weights as a fraction of those that either changes."""
        return self.shared / max(self.count_a + self.count_b - self.shared, 1)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"jaccard": self.jaccard}


def conflicts(base: DiffusionModel, deltas: Sequence[ErasedDelta]) -> list[Overlap]:
    """Every pair of deltas compared, component by component and then all together.

    Raises:
        ErasureError: they belong to different bases.
    """
    _check_bases(base, deltas)
    titles = [delta.title for delta in deltas]
    names = [
        title if titles.count(title) == 1 else f"{title} ({i + 1})"
        for i, title in enumerate(titles)
    ]
    pairs: dict[tuple[str, str], dict[str, Tensor]] = {pair: {} for pair in combinations(names, 2)}
    for tensor, old in _changed_tensors(base, deltas):
        changes = dict(zip(names, (_change(tensor, old, delta) for delta in deltas), strict=True))
        for (a, b), sums in pairs.items():
            component = tensor.split(".")[0]
            sums[component] = sums.get(component, 0) + _compare(changes[a], changes[b])
    for sums in pairs.values():
        if len(sums) > 1:
            sums["all"] = torch.stack(list(sums.values())).sum(0)
    return [
        _overlap(a, b, component, total)
        for (a, b), sums in pairs.items()
        for component, total in sums.items()
    ]


def _change(name: str, base: Tensor, delta: ErasedDelta) -> tuple[Tensor, Tensor]:
    """Where a delta changes a tensor (1, else 0), and by how much (0 elsewhere); flat, float64."""
    if name not in delta.values:
        nowhere = torch.zeros(base.numel(), dtype=torch.float64)
        return nowhere, nowhere
    return delta.where(name, (base.numel(),)).double(), delta.change(name, base.flatten())


def _compare(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """Of one tensor: weights of a, of b, of both, expected of both; dot product and squared norms
    of the changes over both."""
    (in_a, x), (in_b, y) = a, b
    count_a, count_b = in_a.sum(), in_b.sum()
    return torch.stack(
        [
            count_a,
            count_b,
            in_a @ in_b,
            count_a * count_b / len(x),
            x @ y,
            x.square() @ in_b,
            y.square() @ in_a,
        ]
    )


def _overlap(a: str, b: str, component: str, sums: Tensor) -> Overlap:
    count_a, count_b, shared, expected, dot, xx, yy = sums.tolist()
    cosine = dot / math.sqrt(xx * yy) if xx and yy else 0.0
    return Overlap(a, b, component, int(count_a), int(count_b), int(shared), expected, cosine)


def conflict_table(overlaps: Sequence[Overlap]) -> Table:
    """A console table of `conflicts`."""
    from rich.table import Table

    table = Table(title="weights that several deltas change")
    for heading in (
        "deltas",
        "component",
        "weights of each",
        "shared",
        "at random",
        "Jaccard",
        "cosine",
    ):
        table.add_column(heading, justify="left" if heading in ("deltas", "component") else "right")
    for one in overlaps:
        counts = f"{one.count_a:,} / {one.count_b:,}"
        numbers = (
            f"{one.shared:,}",
            f"{one.expected:,.0f}",
            f"{one.jaccard:.3f}",
            f"{one.cosine:+.3f}",
        )
        table.add_row(f"{one.a} / {one.b}", one.component, counts, *numbers)
    return table
