"""Case: one model under evaluation, as an evaluator sees it.

Everything is made when it is first asked for, and kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from erase.delta import ErasedDelta
from erase.eval.images import ImageSet
from erase.eval.judgements import Judgement, as_extra
from erase.models import DiffusionModel
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.prompts.names import same

Images = ImageSet | Callable[[], ImageSet]


class Case:
    """A base, or what an erasure made of it.

    Several processes hold the same case, and each asks it for the same things in the same order.
    """

    def __init__(
        self,
        images: Images,
        concepts: Sequence[ConceptSpec] = (),
        *,
        base_images: Images | None = None,
        base: DiffusionModel | None = None,
        delta: ErasedDelta | None = None,
        folder: Path | None = None,
        shared: Path | None = None,
    ) -> None:
        """
        Args:
            images: of the model under evaluation, or how they are made.
            concepts: what was forgotten; none where a base is judged by itself.
            base_images: those of the base, from the same prompts and seeds; None: `images` are.
            base: the base model; None: there are only images.
            delta: what was erased from it; None: the base itself is under evaluation.
            folder: an evaluator may keep long work there, to go on when stopped; None: nowhere.
            shared: the same for what is of the base alone, whatever was erased from it.
        """
        self.concepts = list(concepts)
        self.delta = delta
        self.folder, self.shared = folder, shared
        self.extras: dict[str, Any] = {}
        """findings that are no scores, by name; see `add_extra`"""
        self._images = images
        self._base_images = base_images
        self._base = base
        self._lent = False

    @cached_property
    def images(self) -> ImageSet:
        """Images of the model under evaluation; while a case is checked, only their rows are
        there."""
        return self._images() if callable(self._images) else self._images

    @cached_property
    def base_images(self) -> ImageSet:
        """Images of the base, from the same prompts and seeds, in the same order."""
        if self._base_images is None:
            return self.images
        return self._base_images() if callable(self._base_images) else self._base_images

    @cached_property
    def labels(self) -> dict[str, list[str]]:
        """kind -> that label of each image, in row order, as `called` gives it; empty text where a
        row has none."""
        rows = self.images.rows
        kinds = dict.fromkeys(chain.from_iterable(row.labels for row in rows))
        labels = {}
        for kind in kinds:
            labels[kind] = self.called(kind, [row.labels.get(kind, "") for row in rows])
        return labels

    def called(self, kind: str, names: Iterable[str]) -> list[str]:
        """Names of a kind, each thing under one of its own: a concept under its target for any of
        its names, anything else as it is first spelled (`erase.prompts.names.same`)."""
        known: dict[str, str] = {}
        for concept in self.concepts:
            if concept.kind in (kind, None):
                known |= {same(name): concept.target for name in concept.names}
        return [known.setdefault(same(name), name) for name in names]

    def narrowed(
        self, numbers: Collection[int], concepts: Sequence[ConceptSpec], name: str
    ) -> Case:
        """The same model on some of its images, with findings of its own.

        Args:
            numbers: the case numbers of the images.
            concepts: what of the forgotten they are judged on.
            name: of the folder for its long work, within this one's.
        """

        def some(images: ImageSet) -> ImageSet:
            return replace(images, rows=[row for row in images.rows if row.case in numbers])

        return Case(
            lambda: some(self.images),
            concepts,
            base_images=lambda: some(self.base_images),
            base=self._base,
            delta=self.delta,
            folder=self.folder / name if self.folder else None,
            shared=self.shared / name if self.shared else None,
        )

    @contextmanager
    def model(self) -> Iterator[DiffusionModel]:
        """The model under evaluation, within the block.

        After the block, whatever happened there, the base holds its own weights again, bit for bit.

        Raises:
            ErasureError: there are only images, or another block has the model.
        """
        with self.base_model() as base:
            if self.delta is None:
                yield base
                return
            with self.delta.applied(base) as erased:
                yield erased

    @contextmanager
    def base_model(self) -> Iterator[DiffusionModel]:
        """The base, within the block.

        It is one object with the erased model, so there is one block at a time.

        Raises:
            ErasureError: there are only images, or another block has the model.
        """
        if self._base is None:
            raise ErasureError(
                "this evaluator needs the model, and only images were given; evaluate a delta on "
                "its base"
            )
        if self._lent:
            raise ErasureError(
                "the base and the erased model are one object; leave one block before the next "
                "begins"
            )
        self._lent = True
        try:
            yield self._base
        finally:
            self._lent = False

    def add_extra(self, name: str, value: Any) -> None:
        """Put a finding that is no score into the report, under `extras`, for this model.

        Args:
            name: under which the report keeps it; the page shows those that it knows
                (`EvalReport`).
            value: JSON-ready.

        Raises:
            ErasureError: the name is taken, or JSON cannot hold the value.
        """
        if name in self.extras:
            raise ErasureError(f"two evaluators give an extra {name!r}; leave one of them out")
        try:
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ErasureError(
                f"the extra {name!r} is not for JSON ({error}); give plain finite values"
            ) from error
        self.extras[name] = value

    def add_judgements(self, judge: str, judgements: Mapping[int, Judgement]) -> None:
        """Put a judge's word on each image below its picture; the report keeps them under
        `extras`, in `judged`.

        Args:
            judge: as the page names it, once in a case.
            judgements: by case number.
        """
        judged = self.extras.pop("judged", {})
        if judge in judged:
            raise ErasureError(f"two evaluators judge as {judge!r}; leave one of them out")
        self.add_extra("judged", judged | {judge: as_extra(judgements)})
