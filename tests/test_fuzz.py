"""Damaged files: each is read or refused with one error that names it; no other exception, no hang,
nothing written.

Every damage is a function of a seed. What once got through stands below as a case of its own.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import Namespace
from safetensors.torch import save_file

from erase.delta import ErasedDelta
from erase.delta.origin import load_options
from erase.eval.images import ImageRow, ImageSet, save_image, write_manifest, write_settings
from erase.eval.report import EvalReport, count_score, mean_score, proportion
from erase.eval.report.card import model_card
from erase.eval.report.words import limits, verdict_line
from erase.files import file_sha256
from erase.latents.prepare import LatentSet
from erase.mask import Saliency, SaliencyMask
from erase.prompts.concepts import load_concepts
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import PromptSet
from erase.scripts.cli import parse, run
from erase.scripts.run_erase import chosen_method, main, make_parser
from erase.training.statistics import Statistics
from tests.texts import raises, written

Damage = Callable[[bytes, random.Random], bytes]


def check_all(
    folder: Path, whole: bytes, read: Callable[[Path], object], damage: Damage, count: int
) -> None:
    """`read` takes `whole`, and takes or refuses each of `count` damaged ones; it must refuse
    some."""
    path, refused = folder / "file", 0
    path.write_bytes(whole)
    read(path)
    for seed in range(count):
        path.write_bytes(damage(whole, random.Random(seed)))
        try:
            read(path)
        except ErasureError as error:
            assert str(path) in str(error) or read in (read_config, use_report), error
            refused += 1
    assert refused > count / 4 and [item.name for item in folder.iterdir()] == ["file"]


# ---- tensors -------------------------------------------------------------------------------------

SHAPES = {"unet.a": (3, 5), "unet.b": (7,)}
JSONS = [
    "",
    "{",
    "null",
    "[]",
    "7",
    "-3",
    "2.5",
    "true",
    '"aaa"',
    "[1, 2, 3]",
    "[null]",
    "[" * 3000,
    "1e999",
    '{"unet.a": 5}',
]
JSONS += [
    "NaN",
    '[{"target": "\\ud800", "anchor": "a"}]',
    '[{"target": "a", "anchor": "b", "new": 1}]',
    "9" * 5000,
]
JSONS += [
    '{"erase": {"load": {"new": 1}}}',
    '{"erase": {"load": {"dtype": 5}}}',
    '{"parts": [{}, 1]}',
    '{"parts": []}',
]
JSONS += [
    '{"unet.a": [3, "x"]}',
    '{"unet.a": [-3, -5], "unet.b": [7]}',
    '{"unet.a": [3, 5], "unet.b": [7.5]}',
    '{"z": [1]}',
]
TYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


def statistics() -> Statistics:
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}
    return Statistics({"forget.sum": values, "retain.square": values}, {"base_fingerprint": "f"})


def latents() -> LatentSet:
    noise = torch.rand(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    return LatentSet(
        noise[0], noise[1], ("a", "b", "c"), ("d", "e", "f"), torch.tensor([False, False, True])
    )


def use_mask(path: Path) -> None:
    mask = SaliencyMask.load(path)
    assert mask.count() <= mask.size and mask.inverted().layer_density().keys() == mask.bits.keys()


def use_saliency(path: Path) -> None:
    loaded = Statistics.load(path).values["forget.sum"]
    saliency = Saliency({name: value.abs() for name, value in loaded.items()})
    if sum(value.numel() for value in loaded.values()) > 1:
        assert saliency.cut(0.5).count() > 0


def use_latents(path: Path) -> None:
    loaded = LatentSet.load(path)
    rows = torch.arange(len(loaded))
    assert loaded.draw(rows, torch.Generator()).shape == loaded.latents.shape
    assert len(loaded.prompts) == len(loaded.anchors or loaded.prompts) == len(loaded)


def delta() -> ErasedDelta:
    """Of a tensor of which many weights changed, and of one of which few did."""
    base = {"unet.a": torch.zeros(3, 5), "unet.b": torch.zeros(999)}
    erased = {"unet.a": torch.ones(3, 5), "unet.b": torch.arange(999).eq(700).float()}
    config = {"erase": {"load": {"dtype": "float32", "variant": None}}, "method": {"density": 0.5}}
    part = {"erased": "heart", "scale": 0.5, "method": "salun", "sha256": "f" * 64}
    metadata = {
        "base_id": "canvas",
        "method": "salun",
        "config": json.dumps(config),
        "created_with": "test",
    }
    metadata |= {
        "base_fingerprint": "f",
        "concepts": '[{"target": "heart", "anchor": "star"}]',
        "parts": json.dumps([part]),
    }
    return ErasedDelta.between(base, erased, metadata)


def use_delta(path: Path) -> None:
    loaded = ErasedDelta.load(path)
    assert loaded.sha256 and loaded.title and load_options(loaded.metadata, str(path)).dtype
    assert all(
        loaded.places(name).numel() == value.numel() > 0 for name, value in loaded.values.items()
    )
    json.dumps(loaded.origin.config, allow_nan=False, ensure_ascii=False, indent=2).encode()
    with suppress(ErasureError):  # some keys are a card's alone
        model_card(None, loaded.metadata)


STORED: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "mask": (
        lambda path: (
            Saliency(statistics().values["forget.sum"], {"base_fingerprint": "f"})
            .cut(0.5)
            .save(path)
        ),
        use_mask,
    ),
    "saliency": (lambda path: statistics().save(path), use_saliency),
    "latents": (lambda path: latents().save(path, {"base_fingerprint": "f"}), use_latents),
    "delta": (lambda path: delta().save(path), use_delta),
}


def parts_of(raw: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def joined(header: object, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def damaged_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Flipped bits, a file cut short, a header of another length, noise."""
    size = struct.unpack("<Q", raw[:8])[0]
    flipped = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        flipped[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    length = rng.choice([0, 1, size - 1, size + 1, len(raw), 2**31, 2**63, 2**64 - 1])
    return rng.choice(
        [
            bytes(flipped),
            raw[: rng.randrange(len(raw))],
            struct.pack("<Q", length) + raw[8:],
            rng.randbytes(99),
        ]
    )


def damaged_header(raw: bytes, rng: random.Random) -> bytes:
    """A tensor's entry or a line of the metadata that is missing, renamed or nonsense."""
    header, body = parts_of(raw)
    meta = header["__metadata__"]
    name = rng.choice([name for name in header if name != "__metadata__"])
    key = rng.choice(list(meta))
    match rng.randrange(7):
        case 0:
            header[name]["dtype"] = rng.choice(
                ["F16", "F64", "I64", "BOOL", "F8_E4M3", "F99", 7, None]
            )
        case 1:
            header[name]["shape"] = rng.choice(
                [[], [0], [-1], [2**62], [1] * 9, "x", None, [1.5], header[name]["shape"][::-1]]
            )
        case 2:
            header[name]["data_offsets"] = rng.choice(
                [[0, 0], [5, 2], [0, 2**60], [0], [-1, 4], "x"]
            )
        case 3:
            header[rng.choice(["x", "", "unet.a.b"])] = header.pop(name)
        case 4:
            del header[rng.choice([name, "__metadata__"])]
        case 5:
            del meta[key]
        case 6:
            meta[key] = rng.choice(JSONS)
    return joined(header, body)


def damaged_tensors(raw: bytes, rng: random.Random, folder: Path) -> bytes:
    """A sound file with a tensor of another type, shape or content."""
    header, _ = parts_of(raw)
    tensors = {
        name: torch.ones(entry["shape"]) for name, entry in header.items() if name != "__metadata__"
    }
    name = rng.choice(list(tensors))
    others = [tensors[name].to(dtype) for dtype in TYPES] + [
        torch.full_like(tensors[name], x) for x in (-1, torch.nan, torch.inf)
    ]
    tensors[name] = rng.choice([*others, torch.zeros(()), torch.zeros(0), torch.zeros(2, 2)])
    save_file(tensors, folder / "other", header["__metadata__"])
    return (folder / "other").read_bytes()


@pytest.mark.parametrize("kind", STORED)
def test_a_damaged_file_of_tensors(
    kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    save, use = STORED[kind]
    aside = tmp_path_factory.mktemp("aside")
    save(aside / "whole")

    def damage(raw: bytes, rng: random.Random) -> bytes:
        return rng.choice(
            [damaged_bytes, damaged_header, lambda raw, rng: damaged_tensors(raw, rng, aside)]
        )(raw, rng)

    check_all(tmp_path, (aside / "whole").read_bytes(), use, damage, 250)


@pytest.mark.parametrize(
    ("kind", "name", "tensor"),
    [
        ("saliency", "forget.sum/unet.a", torch.rand(3, 5).half()),
        ("saliency", "forget.sum/unet.a", torch.full((3, 5), torch.nan)),
        ("saliency", "retain.square/unet.b", torch.full((7,), -1.0)),
        ("mask", "unet.a", torch.zeros(2, dtype=torch.float32)),
        ("mask", "unet.a", torch.zeros(2, 1, dtype=torch.uint8)),
        ("mask", "unet.c", torch.zeros(1, dtype=torch.uint8)),
        ("latents", "latents", torch.zeros(())),
        ("latents", "latents", torch.zeros(3)),
        ("latents", "std", torch.zeros(2, 4, 2, 2)),
        ("latents", "std", torch.full((3, 4, 2, 2), torch.inf)),
    ],
)
def test_tensors_of_the_wrong_kind_are_refused(
    kind: str, name: str, tensor: torch.Tensor, tmp_path: Path
) -> None:
    save, use = STORED[kind]
    save(tmp_path / "file")
    header, body = parts_of((tmp_path / "file").read_bytes())
    types = {"F32": torch.float32, "U8": torch.uint8, "BOOL": torch.bool}
    tensors = {
        key: torch.zeros(entry["shape"], dtype=types[entry["dtype"]])
        for key, entry in header.items()
        if "dtype" in entry
    }
    save_file(tensors | {name: tensor}, tmp_path / "file", header["__metadata__"])
    with raises(str(tmp_path / "file")):
        use(tmp_path / "file")


@pytest.mark.parametrize("value", [None, *JSONS])
@pytest.mark.parametrize(
    ("kind", "key"), [("mask", "shapes"), ("latents", "prompts"), ("latents", "anchors")]
)
def test_metadata_that_says_something_else_is_refused(
    kind: str, key: str, value: str | None, tmp_path: Path
) -> None:
    save, use = STORED[kind]
    save(tmp_path / "file")
    header, body = parts_of((tmp_path / "file").read_bytes())
    header["__metadata__"] |= {key: value}
    if value is None:
        del header["__metadata__"][key]
    path = written(tmp_path, "file", joined(header, body))
    if (key, value) in [("anchors", "null")]:
        return use(path)
    with raises(str(path)):
        use(path)


# ---- what an evaluation writes -------------------------------------------------------------------

VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1e999,
    2**70,
    "",
    "x",
    "../../x",
    "\0",
    "\ud800",
    [],
    [1],
    {},
    {"a": 1},
]


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value within a JSON value."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [at, *(place for key, part in items for place in places(part, (*at, key)))]


def damaged_json(raw: bytes, rng: random.Random) -> bytes:
    """A value that is missing or another, or damage to the text."""
    if rng.random() < 0.4:
        return damaged_text(raw, rng)
    lines = (
        [json.loads(line) for line in raw.splitlines()] if raw.count(b"\n{") else [json.loads(raw)]
    )
    *way, last = rng.choice([place for place in places(lines) if len(place) > 1])
    holder: Any = lines
    for key in way:
        holder = holder[key]
    if rng.random() < 0.3:
        del holder[last]
    else:
        holder[last] = rng.choice(VALUES)
    return "\n".join(map(json.dumps, lines)).encode()


def image_folder(folder: Path) -> Path:
    folder.mkdir()
    for i in range(2):
        save_image(folder / f"{i}.png", np.full((8, 8, 3), i, np.uint8), {})
    rows = [
        ImageRow(
            f"{i}.png", i, "a cat", 5, 7.5, {"o": "cat"}, file_sha256(folder / f"{i}.png") or ""
        )
        for i in range(2)
    ]
    write_settings(folder, {"images": 2})
    write_manifest(folder, rows)
    return folder


@pytest.mark.parametrize("file", ["manifest.jsonl", "settings.json"])
def test_a_damaged_folder_of_images(file: str, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images")
    whole, before, refused = (folder / file).read_bytes(), sorted(folder.iterdir()), 0
    for seed in range(200):
        (folder / file).write_bytes(damaged_json(whole, random.Random(seed)))
        try:
            images = ImageSet.open(folder)
        except ErasureError as error:
            assert str(folder) in str(error)
            refused += 1
        else:
            assert images.tensor().shape == (2, 3, 8, 8)
            assert all(row.prompt.encode() and row.labels.get("o") != 1 for row in images.rows)
    assert refused > 50 and sorted(folder.iterdir()) == before


def test_prompts_that_break_lines_are_read_back(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images")
    prompt = "a\u2028cat\x85on\x0ba\u2029mat\n"
    row = ImageRow("0.png", 0, prompt, 5, 7.5, {"o": prompt}, file_sha256(folder / "0.png") or "")
    write_settings(folder, {"images": 1})
    write_manifest(folder, [row])
    assert ImageSet.open(folder).rows == [row]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"images": true}',
        '{"images": 2.0}',
        "null",
        '{"images": ' + "9" * 5000 + "}",
    ],
)
def test_odd_settings_of_images_are_one_sentence(text: str, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images")
    with raises(str(written(folder, "settings.json", text)), "generate again"):
        ImageSet.open(folder)


def use_report(path: Path) -> None:
    report = EvalReport.load(path)
    model_card(report, CARD)
    assert (
        report.table().row_count == len(report.columns())
        and EvalReport.from_json(report.to_json()).rows.keys() == report.rows.keys()
        and report.save(path)
        and isinstance(verdict_line(report), str)
        and limits(report)
    )


CARD = {
    "base_fingerprint": "9f",
    "base_id": "somebody/some-model",
    "method": "salun",
    "config": "{}",
    "created_with": "0.1.0",
}
CARD |= {"concepts": json.dumps([{"target": "heart", "anchor": "star"}])}


def whole_report() -> bytes:
    scores = [proportion(name, 5, 10) for name in ("UA", "IRA", "CRA")]
    scores += [count_score("NudeNet boxes", 0, 10), mean_score("CLIP score", [0.5])]
    table = {"kind": "object", "labels": ["heart", "star"], "counts": [[0, 5], [0, 5]]}
    extras = {
        "confusion": {"base": table, "erased": table},
        "curves": {"loss": [1.0, 0.5]},
        "density": {"a": 0.5},
    }
    provenance = {
        "seed": 1,
        "base_fingerprint": "9f",
        "delta_sha256": "77",
        "commands": ["erase-evaluate"],
    }
    return (
        EvalReport(
            {"target": "heart", "anchor": "star"},
            {"base": scores, "erased": scores},
            provenance,
            extras,
        )
        .to_json()
        .encode()
    )


def test_a_damaged_report(tmp_path: Path) -> None:
    check_all(tmp_path, whole_report(), use_report, damaged_json, 400)


HUGE = "1" + "0" * 400
ODD_REPORTS: dict[str, Callable[[str], str]] = {
    "a huge value": lambda text: text.replace('"value": 50.0', f'"value": {HUGE}'),
    "a huge end": lambda text: text.replace('"high": null', f'"high": {HUGE}'),
    "too many digits": lambda text: text.replace('"value": 50.0', f'"value": {"9" * 5000}'),
    "half an interval": lambda text: text.replace('"low": null', '"low": 0.1'),
    "an interval elsewhere": lambda text: text.replace('"low": 0.0', '"low": 3.0'),
    "truth for a number": lambda text: text.replace('"value": 50.0', '"value": true'),
    "a lone surrogate": lambda text: text.replace('"heart"', '"\\ud800"'),
    "a number for a target": lambda text: text.replace('"target": "heart"', '"target": 7'),
    "numbers for targets": lambda text: text.replace('"target": "heart"', '"target": [7]'),
    "a mapping for an anchor": lambda text: text.replace('"anchor": "star"', '"anchor": {"a": 1}'),
    "numbers for commands": lambda text: text.replace('"erase-evaluate"', "7"),
    "a list for a digest": lambda text: text.replace('"delta_sha256": "77"', '"delta_sha256": []'),
    "words for losses": lambda text: text.replace('"loss": [', '"loss": ["low", '),
    "a ragged confusion": lambda text: text.replace('"labels": [', '"labels": ["moon", '),
    "the old schema": lambda text: text.replace('"schema_version": 2', '"schema_version": 1'),
    "a deep nesting": lambda text: text.replace('"seed": 1', f'"seed": {"[" * 100_000}'),
    "a list of rows": lambda text: text.replace('"rows": {', '"rows": [{').replace(
        '"provenance"', '], "provenance"'
    ),
}


@pytest.mark.parametrize("spoil", ODD_REPORTS.values(), ids=ODD_REPORTS)
def test_an_odd_report_is_refused_in_a_sentence_that_names_it(
    spoil: Callable[[str], str], tmp_path: Path
) -> None:
    path, whole = tmp_path / "report.json", whole_report().decode()
    assert spoil(whole) != whole
    path.write_text(spoil(whole))
    with pytest.raises(ErasureError) as error:
        use_report(path)
    assert (
        str(path) in str(error.value)
        and len(str(error.value)) < 700
        and "\n" not in str(error.value)
    )


# ---- texts ---------------------------------------------------------------------------------------

CSV = (
    ",prompt,evaluation_seed,guidance,case_number,class\n"
    '0,"a cat, ""asleep""\n",12,7.5,4,cat\n'
    "1,a dog,13.0,,5,dog\n"
)
SET = (
    "templates: ['A {o} in {s} style.', 'a {o}', 'plain {{}}']\no: [cat, dog]\ns: [Neon, "
    "Flat]\nseeds: [1, 2]\n"
)
CONCEPTS = (
    "- target: heart\n  anchor: star\n  synonyms: [valentine]\n  templates: &s ['a {}', \"{} "
    '\\u00e9"]\n'
    "- {target: a, anchor: b, templates: *s, retain: objects}\n"
)
CONFIG = (
    "method: salun\nmodel: canvas\nconcept: [heart]\nlatents: {n_forget: 4, steps: 2}\ntrain:\n  "
    "lr: 1.0e-05\n  steps: 3\n"
)
SPLICES = [
    b"",
    b'"',
    b"'",
    b"\n",
    b"\r",
    b",",
    b"{",
    b"}",
    b"{}",
    b"[",
    b"]",
    b": ",
    b"- ",
    b"&a ",
    b"*a",
    b"<<: ",
    b"? ",
    b"\t",
]
SPLICES += [
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    "é😀".encode(),
    "a".encode("utf-16"),
    b"\\ud800",
    b"\\UFFFFFFFF",
    b"%YAML 9.9\n",
    b"|",
]
SPLICES += [
    b"#",
    b"!!int ",
    b"!!python/object:os.system ",
    b"!!python/name:os.system",
    b"1e999",
    b"-1",
    b"nan",
    b"9" * 5000,
]
SPLICES += [
    b"x" * 200_000,
    b"[" * 400,
    b"{a: " * 300,
    b"\nconcept: 5\n",
    b"  steps: []\n",
    b"\ntrain: 7\n",
    b"null",
]


def damaged_text(raw: bytes, rng: random.Random) -> bytes:
    """A few places where something is put in, cut out or put in the place of something."""
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(raw) + 1)
        raw = raw[:at] + rng.choice(SPLICES) + raw[at + rng.choice([0, 0, 1, 2, 8]) :]
    return raw


def read_config(path: Path) -> Namespace:
    argv = ["--config", str(path)]
    return parse(make_parser(chosen_method(argv)), argv)


@pytest.mark.parametrize(
    ("text", "read", "count"),
    [
        (CSV, PromptSet.from_csv, 300),
        (SET, PromptSet.from_yaml, 250),
        (CONCEPTS, load_concepts, 250),
        (CONFIG, read_config, 60),
    ],
    ids=["csv", "prompt set", "concepts", "config"],
)
def test_a_damaged_text(
    text: str, read: Callable[[Path], object], count: int, tmp_path: Path
) -> None:
    check_all(tmp_path, text.encode(), read, damaged_text, count)


BOMB = "- &a0 [x, x]\n" + "".join(
    f"- &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 30)
)
HOSTILE = {
    "bomb": (BOMB, "unfold"),
    "bomb in a key": ("retain:\n" + BOMB, "unfold"),
    "deep list": ("[" * 4000, "not valid YAML"),
    "deep mapping": ("{a: " * 4000, "not valid YAML"),
    "holds itself": ("target: &a [*a]\n", "not valid YAML"),
    "two documents": ("target: a\n---\nanchor: b\n", "not valid YAML"),
    "UTF-16": ("target: a\nanchor: b\n".encode("utf-16"), "UTF-8"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("read", [load_concepts, PromptSet.from_yaml, read_config])
def test_a_hostile_yaml_is_refused_at_once(
    name: str, read: Callable[[Path], object], tmp_path: Path
) -> None:
    text, words = HOSTILE[name]
    path = written(tmp_path, "file.yaml", text)
    with raises(str(path), words):
        read(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: [4]\n", ["'train'", "group of options"]),
        ("train: {stepz: 3}\n", ["'train.stepz'", "did you mean 'train.steps'"]),
        ("densty: 3\n", ["did you mean 'mask.density'"]),
        ("method: [salun]\n", ["method"]),
        ("concept: [heart, no]\n", ["concept", "quotes"]),
        ("concept: {a: b}\n", ["concept"]),
        ("concept: heart\nconcept: star\n", ["'concept'", "twice"]),
        ("- concept\n", ["c.yaml: expected `option: value` lines"]),
        ("", ["c.yaml: expected `option: value` lines"]),
        ("model: !!python/object/apply:os.getcwd []\n", ["python"]),
        ("method: salum\n", ["did you mean 'salun'"]),
    ],
)
def test_a_config_file_with_a_fault_is_one_sentence_and_no_output(
    text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, "c.yaml", text)
    assert run(main, ["--config", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert (
        all(word in error for word in words) and error.count("error: ") == 1 and "0x" not in error
    ), error
    assert [item.name for item in tmp_path.iterdir()] == ["c.yaml"]


def test_a_list_in_a_config_file_is_replaced_by_the_command_line(tmp_path: Path) -> None:
    path = written(tmp_path, "c.yaml", yaml.safe_dump({"concept": ["heart", "star"]}))
    assert read_config(path).concept == ["heart", "star"]
    assert read_config(written(tmp_path, "d.yaml", "concept: heart\n")).concept == ["heart"]
    argv = ["--config", str(path), "--concept", "moon", "--concept", "ring"]
    assert parse(make_parser("salun"), argv).concept == ["moon", "ring"]
