"""Finished images of an erased model, from wherever they came, evaluated beside the base's.

There is no model then, so what needs one (attacks, relearning) is refused by its evaluator. The
base's images are made of the same prompts and seeds, or are finished ones too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from erase.eval.case import Case
from erase.eval.generate import GenerateConfig, generate, planned, settings_for
from erase.eval.images import MANIFEST, SETTINGS, ImageRow, ImageSet, opened
from erase.eval.report.report import BASE, ERASED, EvalReport
from erase.eval.reporting import about_concepts, chosen_of, parts_of, report_on, versions_of
from erase.eval.run import EvaluateConfig, made_by
from erase.files import file_sha256
from erase.foreign.files import PARTS
from erase.models import DiffusionModel
from erase.models.pipelines import FROZEN
from erase.models.single_file.tensor_file import SINGLE_FILES
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import PromptRow, PromptSet, apart, mark_of

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
FILE = "file"
"""the column of a CSV that names a row's image"""
SAME = ("scheduler", "steps", "resolution", "mixed_precision", "dtype")
"""settings by which two sets of images must have been made, where both tell them; guidance is each
row's own"""


def holds_images(folder: str | Path) -> bool:
    """Whether a folder is of finished images: ours, or images or a CSV without any weights."""
    folder = Path(folder)
    if not folder.is_dir():
        return False
    if (folder / MANIFEST).is_file() or (folder / SETTINGS).is_file():
        return True
    endings = {file.suffix.lower() for file in folder.iterdir() if file.is_file()}
    weights = endings & set(SINGLE_FILES) or any((folder / part).is_dir() for part in PARTS)
    return not weights and bool(endings & {*ENDINGS, ".csv"})


def finished_images(folder: str | Path, prompts: PromptSet | None = None) -> ImageSet:
    """The images of a folder, every one of them there and whole.

    Args:
        folder: one that `erase-generate` or an evaluation has written; or images with a CSV of
            their prompts, in the field's columns. A row's image is the one that its `file` column
            names, or else `CASE.png`, `CASE_0.png` (as ESD's, UCE's and SalUn's scripts call it) or
            `00CASE.png`; .jpg, .jpeg and .webp are images too, and so is .PNG.
        prompts: of the images, whose labels go before a manifest's; by default the manifest's, or
            the one CSV in the folder.

    Raises:
        ErasureError: no prompts, or several CSV files; an image that is missing, is none, or that
            no row names; a manifest of other prompts.
    """
    folder = Path(folder)
    if (folder / SETTINGS).is_file() or (folder / MANIFEST).is_file():
        images = ImageSet.open(folder)
        return _of_prompts(images, _plain(prompts)) if prompts else images
    prompts = prompts or _prompts_in(folder)
    files = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in ENDINGS)
    by_stem: dict[str, list[str]] = {}
    for name in files:
        by_stem.setdefault(Path(name).stem, []).append(name)
    names = [_file_of(row, folder, by_stem) for row in prompts.rows]
    if left := sorted({*files} - {*names}):
        raise ErasureError(
            f"{folder} holds {len(left)} images that no row of {prompts.name} names, the first is "
            f"{left[0]}; take them out, or give each a row of its own, with a column {FILE}"
        )
    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(_row, prompts.rows, [folder / name for name in names]))
    settings = {
        "images": len(rows),
        "prompt_set": prompts.name,
        "prompt_set_sha256": _plain(prompts).sha256,
        **prompts.marks,
        "made_by": "another program",
    }
    return ImageSet(folder, sorted(rows, key=lambda row: row.case), settings)


def prompts_of(images: ImageSet) -> PromptSet:
    """The prompts and seeds that images were made of."""
    usual = images.settings.get("guidance")  # of rows that bring none of their own
    rows = []
    for row in images.rows:
        own = None if math.isnan(row.guidance) or row.guidance == usual else row.guidance
        rows.append(PromptRow(row.case, row.prompt, row.seed, own, row.labels))
    name = str(images.settings.get("prompt_set", images.folder.name))
    return PromptSet(name, tuple(rows), images.settings.get("sensitive"))


def _prompts_in(folder: Path) -> PromptSet:
    tables = sorted(folder.glob("*.csv"))
    if len(tables) != 1:
        found = ", ".join(table.name for table in tables) or "none"
        raise ErasureError(
            f"{folder} must hold one CSV file that says which prompt and seed each image is of; "
            f"there is {found}; name it with --prompts"
        )
    return PromptSet.load(tables[0])


def _plain(prompts: PromptSet) -> PromptSet:
    """The prompts without the names of files, which are no labels."""
    rows = []
    for row in prompts.rows:
        labels = {key: text for key, text in row.labels.items() if key != FILE}
        rows.append(replace(row, labels=labels))
    return replace(prompts, rows=tuple(rows))


def _file_of(row: PromptRow, folder: Path, by_stem: Mapping[str, Sequence[str]]) -> str:
    """The name of a row's image; `by_stem`: names of the images there, by what stands before their
    ending."""
    if named := row.labels.get(FILE):
        if named in by_stem.get(Path(named).stem, ()):
            return named
        raise ErasureError(f"{folder / named} is missing (case {row.case}); make it again")
    stems = dict.fromkeys((f"{row.case:05d}", str(row.case), f"{row.case}_0"))
    found = [name for stem in stems for name in by_stem.get(stem, ())]
    if len(found) == 1:
        return found[0]
    if found:
        raise ErasureError(
            f"{folder} holds several images of case {row.case}: {', '.join(found)}; take out all "
            "but one"
        )
    raise ErasureError(
        f"{folder} holds no image of case {row.case} ({row.prompt!r}): "
        f"{' or '.join(stem + '.png' for stem in stems)} is missing; make it again, or name it in "
        f"a column {FILE}"
    )


def _row(row: PromptRow, path: Path) -> ImageRow:
    with opened(path, str(path)) as image:
        image.verify()  # of a PNG, the checksums
    with opened(path, str(path)) as image:
        image.load()
    guidance = math.nan if row.guidance is None else float(row.guidance)
    labels = {key: text for key, text in row.labels.items() if key != FILE}
    return ImageRow(
        path.name, row.case, row.prompt, row.seed, guidance, labels, file_sha256(path) or ""
    )


def _of_prompts(images: ImageSet, prompts: PromptSet) -> ImageSet:
    """The images with the labels of these prompts.

    Raises:
        ErasureError: they are of other prompts or seeds.
    """
    theirs = {row.case: (row.prompt, row.seed) for row in images.rows}
    ours = {row.case: (row.prompt, row.seed) for row in prompts.rows}
    for case in sorted(theirs.keys() | ours.keys()):
        if theirs.get(case) != ours.get(case):
            raise ErasureError(
                f"{images.folder} is not of the prompts {prompts.name}: case {case} is "
                f"{theirs.get(case)} there and {ours.get(case)} in the prompts; give those that it "
                "was made of, or leave --prompts out"
            )
    labels = {row.case: row.labels for row in prompts.rows}
    return replace(images, rows=[replace(row, labels=labels[row.case]) for row in images.rows])


def evaluate_images(
    erased: str | Path,
    concepts: Sequence[ConceptSpec],
    base: str | Path | Callable[[], DiffusionModel],
    out: str | Path,
    config: EvaluateConfig | None = None,
    *,
    base_images: str | Path | None = None,
    prompts: Sequence[PromptSet] = (),
    commands: list[str] | None = None,
) -> EvalReport:
    """Score finished images of an erased model beside the base's, and write the report as
    `erase.eval.run.evaluate` does.

    Args:
        erased: their folder, as `finished_images` reads it.
        concepts: what was forgotten.
        base: the folder of the base's images, likewise; or what loads the base, by which they are
            made of the prompts.
        out: folder of the report.
        config: evaluators, and how the base's images are made.
        base_images: folder for images that are made, as of `erase.eval.run.evaluate`.
        prompts: sets that the images are of, each scored by itself, their case numbers counted on;
            by default what the images say.
        commands: for the report.

    Raises:
        ErasureError: as `finished_images`; or base images of other prompts or settings.
    """
    config, out = config or EvaluateConfig(), Path(out)
    sets = apart(prompts) if prompts else []
    whole = _together(sets) if sets else None
    after = finished_images(erased, whole)
    sets = [_plain(one) for one in sets] or [prompts_of(after)]

    def foresee(one: PromptSet, asked: list[ConceptSpec]) -> Case:
        numbers = {row.case for row in one.rows}
        return Case(replace(after, rows=[r for r in after.rows if r.case in numbers]), asked)

    parts = parts_of(sets, concepts, foresee, config.chosen)
    asked = _together(sets)
    if callable(base):
        before = _drawn(base(), asked, Path(base_images or out / "base"), config.generate, after)
    else:
        before = _of_prompts(finished_images(base, whole), asked)
        _check_alike(after, before)
    cases = {
        BASE: Case(before, concepts, folder=out / "work" / BASE),
        ERASED: Case(after, concepts, base_images=before, folder=out / "work" / ERASED),
    }
    provenance: dict[str, Any] = {
        "method": "finished images",
        "erased_images": dict(_about(after)),
        "base_images": dict(_about(before)),
        "evaluation": {"evaluators": list(chosen_of(parts))}
        | {one.name: asdict(settings) for one, settings in chosen_of(parts).values()},
        "versions": versions_of(parts),
        "commands": commands or [],
    }
    return report_on(cases, parts, about_concepts(concepts, anchored=False), provenance, out)


def _together(sets: Sequence[PromptSet]) -> PromptSet:
    """The rows of sets that are numbered apart already."""
    rows = tuple(row for one in sets for row in one.rows)
    return PromptSet("+".join(one.name for one in sets), rows, mark_of(sets))


def _about(images: ImageSet) -> Mapping[str, str]:
    return {"folder": images.folder.name, "images": str(len(images.rows))}


def _drawn(
    model: DiffusionModel,
    prompts: PromptSet,
    folder: Path,
    config: GenerateConfig,
    erased: ImageSet,
) -> ImageSet:
    """The base's images, made if the erased model's say nothing against it."""
    pipe, about = model.pipeline(), made_by(model)
    settings = settings_for(pipe, prompts, config, about)
    _check_alike(erased, replace(planned(prompts, folder, config), settings=settings), drawn=True)
    return generate(pipe, prompts, folder, config, about)


def _check_alike(erased: ImageSet, base: ImageSet, drawn: bool = False) -> None:
    """Refuse images of the base that are made in another way than the erased model's; `drawn`: they
    are not made yet."""
    for key, theirs, ours in _differences(erased, base):
        if not drawn:
            rest = f"{base.folder} with {ours}; make both by the same settings"
        elif key in asdict(GenerateConfig()):
            rest = f"the base's images would be with {ours}; add --generate.{key} {theirs}"
        else:
            rest = f"the base's images would be with {ours}; load the base as it was loaded there"
        raise ErasureError(f"{erased.folder} was made with {key} {theirs}, and {rest}")


def _differences(erased: ImageSet, base: ImageSet) -> Iterator[tuple[str, Any, Any]]:
    """(setting, of the erased model's images, of the base's), where both tell it."""
    one, other = erased.settings, base.settings
    told = [key for key in SAME if key in one and key in other]
    told += FROZEN if "vae" in one and "vae" in other else ()
    for key in told:
        if one.get(key) != other.get(key):
            yield key, one.get(key), other.get(key)
    guidance = {row.case: row.guidance for row in base.rows}
    for row in erased.rows:
        pair = row.guidance, guidance[row.case]
        if pair[0] != pair[1] and not any(map(math.isnan, pair)):
            yield "guidance", *pair
