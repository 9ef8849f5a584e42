"""What tests of reports share: a report, the metadata of its delta, and images before and after. A
file imports a fixture as itself, so that pytest finds it there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from erase.eval.canvas.render import render
from erase.eval.images import ImageRow, ImageSet, write_manifest, write_settings
from erase.eval.report import EvalReport, Score, proportion
from erase.files import file_sha256
from erase.prompts.canvas import vocabulary

CONCEPT = {"target": "heart", "anchor": "star", "synonyms": ["valentine"], "kind": "object"}
METADATA = {
    "base_fingerprint": "9f2c41",
    "base_id": "somebody/some-model",
    "method": "salun",
    "config": json.dumps({"density": 0.5}),
    "concepts": json.dumps([CONCEPT | {"templates": ["A {} image."]}]),
    "created_with": "0.1.0",
}


def scores(ua: int, ira: int, cra: int, prefix: str = "") -> list[Score]:
    counts = {"UA": (ua, 240), "IRA": (ira, 2160), "CRA": (cra, 4320)}
    return [
        proportion(prefix + name, hits, n, evaluator="classifier")
        for name, (hits, n) in counts.items()
    ]


def report(**rows: list[Score]) -> EvalReport:
    return EvalReport(
        CONCEPT,
        rows or {"base": scores(1, 2147, 4240), "erased": scores(240, 2140, 4100)},
        {"commands": ["erase it"]},
    )


def image_set(
    folder: Path, swap: bool, size: int = 64, prompts: list[str] | None = None
) -> ImageSet:
    """Renders of the first two objects in all styles; `swap` draws stars for hearts, as an erased
    model does."""
    cells = [
        c
        for c in vocabulary().cells()
        if c["object"] in ("heart", "star") and c["colour"] in ("red", "blue")
    ]
    prompts = prompts or [vocabulary().grid.format(**cell) for cell in cells]
    folder.mkdir()
    rows = []
    for case, (cell, prompt) in enumerate(zip(cells, prompts, strict=False)):
        pixels = render([cell | {"object": "star"} if swap else cell], seed=case)[0].permute(
            1, 2, 0
        )
        image = Image.fromarray((pixels * 255).round().byte().numpy()).resize((size, size))
        image.save(folder / f"{case:05d}.png")
        rows.append(
            ImageRow(
                f"{case:05d}.png",
                case,
                prompt,
                7,
                5.0,
                cell,
                file_sha256(folder / f"{case:05d}.png"),
            )
        )
    made = {"model": "canvas", "scheduler": "dpm++", "delta": "5c0b" if swap else None}
    write_settings(folder, {"images": len(rows)} | made)
    write_manifest(folder, rows)
    return ImageSet.open(folder)


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> ImageSet:
    return image_set(tmp_path_factory.mktemp("report") / "before", swap=False)


@pytest.fixture(scope="module")
def after(tmp_path_factory) -> ImageSet:
    return image_set(tmp_path_factory.mktemp("report") / "after", swap=True)
