"""Reports of several kinds for the tests of their page: of the embedded world with failures,
attacks and relearning; of prompts without labels, judged by NudeNet alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from erase.eval.images import ImageRow, ImageSet, save_image, write_manifest, write_settings
from erase.eval.judgements import Judgement, as_extra
from erase.eval.report import EvalReport, count_score, proportion
from erase.eval.report.page import render_html
from erase.eval.report.setting import Setting
from erase.files import file_sha256
from tests.report_fixtures import CONCEPT, image_set, scores

CURVES = {"loss": [1 / (1 + i) for i in range(60)]}
DENSITY = {"conv_in.weight": 0.25, "down_blocks.0.conv1.weight": 0.5}
STILL, HARMED = (1, 2, 9), (20, 25)
"""cases of the failing erasure: that still show the heart, and whose star is gone"""


def judged(images: ImageSet, seen: set[int], wrong: set[int]) -> dict[str, Any]:
    """A classifier's words on images of hearts and stars."""
    said = {}
    for row in images.rows:
        other = "ring 51 %" if row.case in wrong else "star 99 %"
        word = "heart 97 %" if row.case in seen else other
        said[row.case] = Judgement(word, row.case in seen, row.case not in seen | wrong)
    return {"classifier": as_extra(said)}


def failing_report(before: ImageSet, after: ImageSet) -> EvalReport:
    """Hearts that are still seen, stars that are harmed, an attack that works, and relearning."""
    hearts = {row.case for row in before.rows if row.labels["object"] == "heart"}
    table = {"kind": "object", "labels": ["heart", "star"], "counts": [[3, 13], [0, 16]]}
    styles = {"kind": "style", "labels": ["Flat", "Neon"], "counts": [[8, 0], [0, 8]]}
    attack = {
        "has": "the weights", "paper": "https://arxiv.org/abs/0000.00000", "budget": {}, "n": 8,
        "alone": 7, "tries": [{"restart": 0, "shown": 7, "texts": ["red <heart>"]}],
    }  # fmt: skip
    pictures = [{"file": "embeds-00001.png", "prompt": "A heart", "case": 1, "shown": True}]
    curve = {"kind": "full", "images": 4, "lr": 1e-3, "steps": [0, 10, 50], "n": 16}
    rows = {"base": scores(1, 2147, 4240), "erased": scores(180, 1900, 4100)}
    rates = {"base": (15, 15, 1), "erased": (0, 12, 2)}
    for row, (pre, asr, left) in rates.items():
        rows[row] += [
            proportion("pre-ASR", pre, 16, higher_is_better=False),
            proportion("ASR embeds", asr, 16, higher_is_better=False),
            proportion("UA after 10 steps (full, 4 images)", 8, 16),
            proportion("UA after 50 steps (full, 4 images)", left, 16),
        ]
    extras = {
        "judged": {
            "base": judged(before, hearts, set()),
            "erased": judged(after, set(STILL), set(HARMED)),
        },
        "confusion": {"base": [table, styles], "erased": [table, styles]},
        "attacks": {
            "base": {"embeds": attack}, "erased": {"embeds": attack | {"pictures": pictures}},
        },
        "relearning": {
            "base": [curve | {"forgotten": [0, 2, 1]}],
            "erased": [curve | {"forgotten": [16, 8, 2]}],
        },
        "compared": {"ESD": {"UA": [80.0, 70.0, 88.0], "retention": [90.0, 85.0, 94.0]}},
    }  # fmt: skip
    return EvalReport(CONCEPT, rows, {"commands": ["erase it"], "config": {"a": 1}}, extras)


def failing_page(folder: Path, sensitive: bool = False) -> str:
    """The page of `failing_report`, with a picture of its attack; `sensitive`: the sets' mark."""
    before, after = (image_set(folder / name, swap=name == "after") for name in ("before", "after"))
    before.settings["sensitive"] = sensitive
    (folder / "attack").mkdir()
    (folder / "attack" / "embeds-00001.png").write_bytes(before.path(before.rows[1]).read_bytes())
    setting = Setting(
        {"evaluated": "2026-01-02 03:04 UTC", "duration": "5 s", "machine": "a GPU"},
        {"run.yaml": "method: salun\n"},
        {"erased": folder},
    )
    report = failing_report(before, after)
    return render_html(report, before, after, CURVES, DENSITY, setting=setting)


def nudity_images(folder: Path, tint: int, size: int = 256) -> ImageSet:
    """Plain coloured squares for prompts with I2P's columns, and none that name nudity."""
    folder.mkdir()
    rows = []
    for case in range(24):
        pixels = Image.new("RGB", (size, size), (tint, 10 * case, 128))
        pixels.paste((240, 230, 80), (case * 4, 40, case * 4 + 90, 200))
        save_image(folder / f"{case}.png", np.asarray(pixels), {})
        digest = file_sha256(folder / f"{case}.png") or ""
        labels = {"categories": "sexual", "nudity_percentage": "50"}
        rows.append(ImageRow(f"{case}.png", case, f"a portrait, {case}", 7, 7.5, labels, digest))
    write_settings(folder, {"images": len(rows), "prompt_set": "i2p"})
    write_manifest(folder, rows)
    return ImageSet.open(folder)


def nudity_report(images: ImageSet, base: int, erased: int) -> EvalReport:
    """NudeNet's scores and words alone; so many of 24 images of each have a box."""
    rows, told = {}, {}
    for row, count in {"base": base, "erased": erased}.items():
        rows[row] = [
            proportion(
                "NudeNet image rate", count, 24, higher_is_better=False, evaluator="nudenet",
                outcomes=[(case, case < count) for case in range(24)],
            ),
            count_score("NudeNet boxes", 2 * count, 24, evaluator="nudenet"),
        ]  # fmt: skip
        said = {}
        for one in images.rows:
            word = "belly exposed 0.81, +1" if one.case < count else "no box"
            said[one.case] = Judgement(word, one.case < count)
        told[row] = {"NudeNet": as_extra(said)}
    concept = {"target": "nudity", "anchor": "a person wearing clothes", "synonyms": ["naked"]}
    return EvalReport(concept, rows, {"commands": []}, {"judged": told})


def nudity_page(folder: Path, base: int = 15, erased: int = 4) -> str:
    """The page of `nudity_report`."""
    before, after = nudity_images(folder / "b", 40), nudity_images(folder / "a", 200)
    return render_html(nudity_report(before, base, erased), before, after, {}, {})
