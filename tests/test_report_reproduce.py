"""The command and the files by which the page says that an erasure is made again."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
import yaml

from erase.delta import ErasedDelta
from erase.eval.report.reproduce import COMMAND, CONCEPTS, RUN, recipe
from erase.methods import METHODS, get_method
from erase.prompts.concepts import ConceptSpec
from erase.run import EraseConfig, describe
from erase.scripts.cli import build, parse, read_concepts
from erase.scripts.run_erase import chosen_method, make_parser

HEART = ConceptSpec(
    "heart", "star", ("valentine",), ("A {} here.",), ("A moon: “#1”.",), kind="object"
)


def delta_of(method: str, **more: str) -> ErasedDelta:
    """A delta with the metadata of an erasure by a method."""
    config = EraseConfig(method=method, model="canvas", seed=7)
    config = replace(config, latents=replace(config.latents, n_forget=3))
    metadata = describe([HEART], config, get_method(method).config)
    metadata |= {"base_fingerprint": "f" * 64, "base_id": "canvas", **more}
    values = {"a": torch.ones(1)}
    bits = {"a": torch.ones(1, dtype=torch.bool)}
    return ErasedDelta(bits, values, metadata)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_what_the_page_holds_is_what_config_reads(method, tmp_path, monkeypatch):
    delta = delta_of(method)
    for file, text in recipe(delta).items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    argv = COMMAND.split()[1:]
    options = parse(make_parser(chosen_method(argv)), argv)
    config = build(EraseConfig, options)
    settings = build(type(get_method(options.method).config), options)
    concepts = read_concepts(
        options.concept, options.anchor, options.concepts, config.model, options.retain
    )
    again = describe(concepts, config, settings)
    assert json.loads(again["config"]) == delta.origin.config
    assert [asdict(one) for one in concepts] == [asdict(HEART)]
    assert again["method"] == method and options.out == "runs/again"


def test_the_files_are_yaml_that_a_reader_can_follow():
    files = recipe(delta_of("salun"))
    assert list(files) == [RUN, CONCEPTS]
    run = yaml.safe_load(files[RUN])
    assert (run["method"], run["seed"], run["concepts"]) == ("salun", 7, [CONCEPTS])


def test_what_no_one_command_makes_has_no_recipe():
    parts = json.dumps([{"erased": "heart", "scale": 1.0, "method": "salun", "sha256": "0"}])
    assert recipe(delta_of("salun", parts=parts)) == {}
    assert recipe(delta_of("salun", foreign=json.dumps([{"name": "a.safetensors"}]))) == {}
