"""The recipes: the real parser takes each of them, its concepts are shipped, and what its header
calls published is what it sets."""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path

import pytest
from jsonargparse import Namespace

from erase.delta import ErasedDelta
from erase.methods import METHODS
from erase.prompts.canvas import EMBEDDED
from erase.prompts.concepts import shipped
from erase.prompts.errors import ErasureError
from erase.scripts.cli import parse, read_concepts, run
from erase.scripts.run_erase import chosen_method, main, make_parser

RECIPES = sorted((Path(__file__).parents[1] / "scripts" / "recipes").glob("*.yaml"))
BASES = {
    "canvas-flow": "canvas-flow",
    "canvas": "canvas",
    "sd14": "CompVis/stable-diffusion-v1-4",
    "sd21": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "flux": "black-forest-labs/FLUX.1-dev",
}
recipes = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def options_of(path: Path, *flags: str) -> Namespace:
    argv = ["--config", str(path), *flags]
    return parse(make_parser(chosen_method(argv)), argv)


def header_of(path: Path) -> str:
    return "".join(
        line for line in path.read_text().splitlines(keepends=True) if line.startswith("#")
    )


@recipes
def test_the_parser_takes_a_recipe_and_its_concepts_are_shipped(path: Path) -> None:
    options = options_of(path)
    parts = (path.stem, *path.stem.split("-"))
    base = next(model for key, model in BASES.items() if key in parts)
    assert (options.model, options.out) == (base, f"runs/recipes/{path.stem}")
    assert set(options.concepts) <= set(shipped()) and (
        options.concepts or options.model in EMBEDDED
    )
    concepts = read_concepts(
        options.concept, options.anchor, options.concepts, options.model, options.retain
    )
    assert concepts and all(concept.retain for concept in concepts)
    if "train" in options:  # a closed form takes no step
        assert options.train.batch_size % options.train.accumulation == 0


@recipes
def test_a_recipe_says_where_its_numbers_come_from(path: Path) -> None:
    header = header_of(path)
    assert f"erase-concept --config scripts/recipes/{path.name}" in header
    for word in ("# ours:", "# hardware:", "ime and memory:", "# expected:"):
        assert word in header
    published = re.findall(r"^# published: (\S+) = (\S+) +\S", header, re.MULTILINE)
    assert len(published) == header.count("published: ") and bool(published) == (
        "salun-paper" in path.stem
    )
    options = options_of(path)
    for key, value in published:
        found = reduce(getattr, key.split("."), options)
        assert str(found) == value, (
            f"the header calls {key} = {value} published, the recipe has {found}"
        )


def test_every_method_has_a_recipe_for_the_embedded_model() -> None:
    """The presets of SalUn but `salun-soft` erase it by their defaults."""
    named = {path.stem for path in RECIPES}
    without = {method for method in METHODS if f"canvas-{method}" not in named}
    assert without == {"salun", "salun-text", "salun-twofold", "salun-half", "salun-paper"}


def test_the_published_settings_are_those_of_the_reference() -> None:
    one_class, nudity = (options_of(path) for path in RECIPES if path.stem.endswith("salun-paper"))
    for options in (nudity, one_class):
        assert options.method == "salun-paper"
        assert (options.mask.density, options.mask.guidance, options.mask.batch_size) == (
            0.5,
            7.5,
            8,
        )
        assert options.scope == "full"
        assert (options.train.lr, options.train.batch_size, options.train.optimizer) == (
            1e-5,
            8,
            "Adam",
        )
        assert (options.anchor_from, options.retain_target) == ("current", "noise")
        assert (options.share_latents, options.anchor_latents) == (False, 0)
    assert (nudity.alpha, nudity.train.steps, nudity.latents.n_forget, nudity.latents.n_retain) == (
        0.1,
        100,
        800,
        800,
    )
    assert (one_class.alpha, one_class.train.steps, one_class.latents.n_forget // 8) == (
        0.5,
        5 * 120,
        120,
    )


def test_a_misspelt_key_in_a_recipe_is_named(tmp_path: Path) -> None:
    path = tmp_path / "canvas.yaml"
    path.write_text(RECIPES[0].read_text() + "densty: 0.5\n")
    with pytest.raises(ErasureError, match="did you mean 'mask.density'"):
        options_of(path)


def test_the_canvas_recipe_runs_and_options_after_it_win(tmp_path: Path) -> None:
    canvas = next(path for path in RECIPES if path.stem == "canvas")
    small = [
        "--latents.n_forget",
        "4",
        "--latents.n_retain",
        "4",
        "--latents.steps",
        "2",
        "--latents.batch_size",
        "8",
    ]
    flags = [
        *small,
        "--train.steps",
        "2",
        "--train.batch_size",
        "2",
        "--scope",
        "xattn_kv",
        "--out",
        str(tmp_path),
    ]
    assert run(main, ["--config", str(canvas), *flags]) == 0
    delta = ErasedDelta.load(tmp_path / "delta.safetensors")
    assert delta.count and delta.concepts[0]["target"] == "heart"
    assert all("attn2.to_" in name for name in delta.values)
