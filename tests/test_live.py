"""The live page: base and erased beside each other, as exact as the commands draw them; served to
this machine alone; used in a browser."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from erase.compose import compose
from erase.delta import ErasedDelta
from erase.eval.canvas.render import render
from erase.eval.evaluators import clip
from erase.eval.generate import GenerateConfig, generate
from erase.eval.images import ImageRow, ImageSet
from erase.models import load_model
from erase.prompts.canvas import KINDS
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import of_prompts
from erase.scripts import run_live
from erase.scripts.cli import run
from erase.scripts.live.finding import find_deltas, named, of_base
from erase.scripts.live.judging import find_judge
from erase.scripts.live.page import answer, layers_html, make_page, serve
from erase.scripts.live.stage import MOST_SEEDS, Stage, Wish, seeds_of
from tests.browser import browser as browser
from tests.browser import faults, find, overflow, requested, resize, wait
from tests.run_fixtures import base as base
from tests.run_fixtures import erased as erased
from tests.test_plugins import told

DRAWING = GenerateConfig(steps=2, batch_size=2)
PROMPT = "A heart in Neon style."
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="gradio, the extra `live`, is not installed"
)


@pytest.fixture(scope="module")
def stage(base, erased):
    """The base, its erasure of `heart`, and a judge that says how bright a picture is."""
    model = load_model(str(base))
    (erasure,) = named([ErasedDelta.load(erased)])
    return Stage(model, [erasure], DRAWING, lambda images: [
        f"brightness {images.tensor([row]).mean():.4f}" for row in images.rows
    ])  # fmt: skip


@pytest.fixture
def wish(stage):
    return Wish(PROMPT, (5, 3), tuple(stage.erasures), 1.0, 2, 5.0)


# ---- what is drawn -------------------------------------------------------------------------------


def drawn(model, prompt, seed, folder):
    """The pixels that erase-generate makes."""
    config = replace(DRAWING, batch_size=1)
    images = generate(model.pipeline(), of_prompts([prompt], seed), folder, config, {})
    return np.asarray(images.image(images.rows[0])).astype(int)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, -1.0])
def test_each_pair_is_what_the_commands_draw_and_the_base_stays(
    stage, wish, strength, base, tmp_path
):
    before = {name: param.clone() for name, param in stage.model.parameters().items()}
    fingerprint = stage.model.fingerprint
    pairs = stage.pairs(replace(wish, strength=strength))
    assert [pair.seed for pair in pairs] == [5, 3]
    assert stage.model.fingerprint == fingerprint
    for name, param in stage.model.parameters().items():
        assert torch.equal(param, before[name]), name

    delta = next(iter(stage.erasures.values())).delta
    model = load_model(str(base))
    compose(model, [(delta, strength)]).apply(model)
    for pair in pairs:
        expected = {
            "before": drawn(stage.model, PROMPT, pair.seed, tmp_path / f"before{pair.seed}"),
            "after": drawn(model, PROMPT, pair.seed, tmp_path / f"after{pair.seed}"),
        }
        for side, pixels in expected.items():
            picture = getattr(pair, side)
            shown = np.asarray(picture.image).astype(int)
            assert abs(shown - pixels).max() <= 1, "batches differ by rounding alone"
            assert picture.word == f"brightness {shown.mean() / 255:.4f}"
        same = np.array_equal(np.asarray(pair.before.image), np.asarray(pair.after.image))
        assert same == (strength == 0)


def test_what_was_drawn_is_not_drawn_again(stage, wish, monkeypatch):
    fresh = Stage(stage.model, list(stage.erasures.values()), DRAWING)
    calls = []

    def counted(*args, **named):
        calls.append(args)
        return generate(*args, **named)

    monkeypatch.setattr("erase.scripts.live.stage.generate", counted)
    first = fresh.pairs(wish)
    assert len(calls) == 2 and fresh.pairs(wish) == first and len(calls) == 2
    fresh.pairs(replace(wish, strength=0.5))
    assert len(calls) == 3, "the base is there already"
    fresh.pairs(replace(wish, steps=1))
    assert len(calls) == 5


def test_the_layers_are_those_that_the_delta_changed_beside_the_mask(stage, erased):
    (name,) = stage.erasures
    layers, delta = stage.layers(name), stage.erasures[name].delta
    sizes = {key: param.numel() for key, param in stage.model.parameters().items()}
    moved = {}
    for block in layers.changed:
        moved |= {key: round(share * sizes[key]) for key, share in block.layers.items()}
    assert {key: count for key, count in moved.items() if count} == {
        key: int(delta.where(key, (sizes[key],)).sum()) for key in delta.values
    }
    assert layers.whole == pytest.approx(delta.count / sum(sizes[key] for key in moved))
    assert layers.allowed.keys() == {block.name for block in layers.changed}
    for block in layers.changed:  # what moved was allowed to
        assert block.density <= layers.allowed[block.name] + 1e-6
    html = layers_html(stage, [name])
    assert html.count("<tr>") == 1 + len(layers.changed) and "<u " in html


# ---- which erasures ------------------------------------------------------------------------------


def test_a_folder_of_runs_gives_those_of_the_base_under_names_of_their_own(
    stage, erased, make_pico_pipeline, tmp_path, caplog
):
    delta = ErasedDelta.load(erased)
    for name in ("b", "a"):
        delta.save(tmp_path / name / "delta.safetensors")
    other = replace(delta, metadata={**delta.metadata, "base_fingerprint": "f" * 64})
    other.save(tmp_path / "c" / "delta.safetensors")
    found = find_deltas(str(tmp_path))
    assert [Path(each.source).parent.name for each in found] == ["a", "b", "c"]
    with caplog.at_level("INFO", "erase"):
        ours = of_base(found, stage.model)
    assert len(ours) == 2 and "is of another base and is left out" in caplog.text
    names = [erasure.name for erasure in named([*ours, delta, delta])]
    assert len(set(names)) == 4 and names[0] == f"heart: salun, {tmp_path / 'a'}"
    assert find_deltas(str(erased))[0].sha256 == delta.sha256
    with pytest.raises(ErasureError, match="belongs to base"):
        of_base(found[2:], stage.model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ErasureError, match=r"holds no delta\.safetensors"):
        find_deltas(str(tmp_path / "empty"))


# ---- judges --------------------------------------------------------------------------------------


def test_the_judge_of_the_embedded_world_names_what_is_rendered(tmp_path):
    from PIL import Image

    cells = [("heart", "Flat", "red"), ("house", "Striped", "blue")]
    drawn = render([dict(zip(KINDS, cell, strict=True)) for cell in cells], seed=0)
    rows = []
    for case, (cell, pixels) in enumerate(zip(cells, drawn, strict=True)):
        shown = (255 * pixels.permute(1, 2, 0)).round().byte().numpy()
        Image.fromarray(shown).save(tmp_path / f"{case}.png")
        rows.append(ImageRow(f"{case}.png", case, " ".join(cell), 0, 1.0, {}, ""))
    images = ImageSet(tmp_path, rows, {})
    canvas = load_model("canvas")
    words = find_judge("auto", canvas, clip.Config())(images)
    for cell, said in zip(cells, words, strict=True):
        assert [word.rpartition(" ")[0] for word in said.split(", ")] == list(cell)
    scores = find_judge("clip", canvas, clip.Config())(images)
    assert all(word.startswith("CLIP score ") for word in scores)
    assert find_judge("none", canvas, clip.Config()) is None


# ---- what is typed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0", (0,)), ("7, 3", (7, 3)), (" 2-4;9 ", (2, 3, 4, 9)), ("188 288", (188, 288))],
)
def test_seeds_are_read_as_they_are_typed(text, seeds):
    assert seeds_of(text) == seeds


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no list of seeds"),
        ("one", "no list of seeds"),
        ("-3", "no list of seeds"),
        ("5-3", "no list of seeds"),
        ("1.5", "no list of seeds"),
        ("1, 0-2", "has a seed twice"),
        (f"0-{MOST_SEEDS}", f"more than {MOST_SEEDS} seeds"),
        ("0-999999999999", f"more than {MOST_SEEDS} seeds"),
    ],
)
def test_what_is_no_list_of_seeds_is_refused(text, words):
    with pytest.raises(ErasureError, match=words):
        seeds_of(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "  "}, "There is no prompt"),
        ({"erasures": []}, "No erasure is chosen"),
        ({"erasures": ["hart"]}, "Unknown erasure"),
        ({"seeds": "x<y"}, "&#x27;x&lt;y&#x27; is no list of seeds"),
        ({"steps": 5000}, "Steps is 5000"),
        ({"strength": float("nan")}, "Strength"),
    ],
)
def test_errors_are_sentences_in_the_page_and_leave_its_pictures(stage, change, words):
    given = {
        "prompt": PROMPT, "erasures": list(stage.erasures), "strength": 1.0, "seeds": "0",
        "steps": 2, "guidance": 5.0,
    }  # fmt: skip
    pictures, said = answer(stage, **{**given, **change})
    assert pictures is None and words in said and 'role="alert"' in said


def test_what_is_typed_is_text_in_the_page(stage):
    prompt = "<script>alert(1)</script> \" onerror='x'"
    pictures, _ = answer(stage, prompt, list(stage.erasures), 1.0, "0", 1, 5.0)
    assert "<script" not in pictures and "&lt;script" in pictures
    assert pictures.count("<img") == 2 and pictures.count('src="data:image/webp;base64,') == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--judge", "clipp"], "did you mean 'clip'?"),
        (["--port", "70000"], "--port is 70000"),
        (["--delta", "nowhere"], "nowhere"),
        (["--hots", "x"], "did you mean 'host'?"),
    ],
)
@needs_gradio
def test_options_that_cannot_be_are_refused(flags, words, capsys):
    assert run(run_live.main, flags) == 2
    assert words in told(capsys)


def test_without_gradio_a_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert run(run_live.main, []) == 2
    assert "pip install 'concept-erasure-toolkit[live]'" in told(capsys)


def test_without_gradio_that_is_said_before_anything_is_loaded():
    code = (
        "import sys\nsys.modules['gradio'] = None\nsys.argv = ['erase-live']\n"
        "from erase.scripts.run_live import cli\n"
        "try:\n    cli()\nexcept SystemExit as left:\n"
        "    assert left.code == 2 and not {'torch', 'diffusers'} & set(sys.modules)\n"
        "else:\n    raise AssertionError"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("loading")) == (0, 0), done.stderr
    assert "pip install 'concept-erasure-toolkit[live]'" in done.stderr


# ---- served, and used in a browser ---------------------------------------------------------------


@pytest.fixture(scope="module")
def address(stage):
    page = make_page(stage, PROMPT, DRAWING)
    yield serve(page, "127.0.0.1", None)
    page.close(verbose=False)


@needs_gradio
def test_the_page_is_served_to_this_machine_alone_and_shared_with_nobody(stage, address):
    port = int(address.rstrip("/").rpartition(":")[2])
    assert address == f"http://127.0.0.1:{port}/"
    # Linux answers on all of 127.0.0.0/8 where a server listens on every address
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port), timeout=2)
    page = make_page(stage, PROMPT, DRAWING)
    assert not page.analytics_enabled and not page.share
    with pytest.raises(ErasureError, match="choose another --port"):
        serve(page, "127.0.0.1", port)


@needs_gradio
@pytest.mark.parametrize("width", [1400, 390])
def test_typed_and_clicked_in_a_browser_pictures_appear_and_differ(browser, address, width):
    resize(browser, width)
    browser.get(address)
    wait(browser, lambda it: find(it, "#draw"))
    (field,) = find(browser, "#prompt textarea")
    assert field.get_attribute("value") == PROMPT and not find(browser, "#pictures img")
    field.clear()
    field.send_keys("A star in Flat style.")
    find(browser, "#draw")[0].click()
    wait(browser, lambda it: len(find(it, "#pictures img")) == 4)
    images = find(browser, "#pictures img")
    assert "A star in Flat style." in images[0].get_attribute("alt")
    sources = [image.get_attribute("src") for image in images]
    assert len(set(sources)) == 4, "two seeds, and base and erased of each, all differ"
    assert all(image.size["width"] % 32 == 0 for image in images), "whole multiples of 32 px"
    words = [caption.text for caption in find(browser, "#pictures figcaption")]
    assert [word.splitlines()[0] for word in words] == ["Base", "Without heart"] * 2
    assert all("brightness 0." in word for word in words)
    assert overflow(browser) == 0

    # an error is a sentence, and the pictures stay
    (seeds,) = find(browser, "#seeds textarea, #seeds input")
    seeds.clear()
    seeds.send_keys("many")
    find(browser, "#draw")[0].click()
    (error,) = wait(browser, lambda it: find(it, "#note [role=alert]"))
    assert "'many' is no list of seeds" in error.text
    assert [image.get_attribute("src") for image in find(browser, "#pictures img")] == sources

    assert faults(browser) == []
    assert {url for url in requested(browser) if not url.startswith(address)} == set()


@needs_gradio
def test_at_strength_zero_both_are_the_base(browser, address):
    from selenium.webdriver.common.keys import Keys

    resize(browser, 1400)
    browser.get(address)
    wait(browser, lambda it: find(it, "#draw"))
    (number,) = find(browser, "#strength input[type=number]")
    number.send_keys(Keys.CONTROL, "a")
    number.send_keys("0", Keys.TAB)
    find(browser, "#draw")[0].click()
    wait(browser, lambda it: "strength 0" in it.find_element("id", "pictures").text)
    sources = [image.get_attribute("src") for image in find(browser, "#pictures img")]
    assert sources[0] == sources[1] and sources[2] == sources[3] and sources[0] != sources[2]
