"""Protocols: what their files say, that their prompts are built for the concepts, and that their
scores are those of their sources."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from erase.delta import ErasedDelta
from erase.eval.canvas.render import render
from erase.eval.case import Case
from erase.eval.evaluators import classifier, clip
from erase.eval.evaluators.in_prompt import rests
from erase.eval.evaluators.nudenet import EXPOSED
from erase.eval.evaluators.wordings import accuracy_scores, wording_scores
from erase.eval.images import ImageRow, ImageSet, save_image
from erase.eval.metrics.harmonic import harmonic, of_harmonic
from erase.eval.metrics.intervals import of_rate
from erase.eval.protocols import PROTOCOLS, load_protocol, protocol_names
from erase.eval.report import EvalReport
from erase.models import load_model
from erase.prompts.canvas import KINDS, canvas_concept, vocabulary
from erase.prompts.canvas_wordings import canvas_book
from erase.prompts.class_lists import load_classes
from erase.prompts.concepts import ConceptSpec, load_concepts
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import PromptRow, canvas_grid
from erase.prompts.wordings import books, load_book, worded
from erase.scripts import run_evaluate
from erase.scripts.cli import parse
from erase.scripts.cli.protocols import add_protocol

HEART = canvas_concept("heart")
CHURCH = next(one for one in load_concepts("imagenette") if one.target == "church")
CAT = ConceptSpec("cat", "dog", kind="class")
SUITE = "suite"  # ours, on the embedded world alone
STEMS = [path.stem for path in sorted(PROTOCOLS.glob("*.yaml")) if path.stem != SUITE]


def concept_for(name: str) -> ConceptSpec:
    if name.split("/")[-1].startswith("canvas"):
        return HEART
    return CAT if name == "mace" else CHURCH


# ---- the files -----------------------------------------------------------------------------------


def test_the_protocols_of_the_field_are_there() -> None:
    assert STEMS == [
        "coco",
        "emma",
        "i2p-nudity",
        "imagenette",
        "mace",
        "see",
        "six-cd",
        "unlearncanvas",
    ]


@pytest.mark.parametrize("name", [one for one in protocol_names() if not one.startswith(SUITE)])
def test_a_protocol_says_its_source_and_brings_its_prompts_or_says_what_it_needs(name: str) -> None:
    protocol = load_protocol(name)
    assert protocol.name == name and protocol.version.isdigit() and protocol.evaluators
    assert "https://" in protocol.paper and protocol.repository.startswith("https://")
    assert all(need.missing.startswith("needs ") for need in protocol.needs)
    if protocol.prompts is None:
        assert "prompts" in [need.option for need in protocol.needs]
    else:
        rows = protocol.prompt_set([concept_for(name)]).rows
        assert len({(row.prompt, row.seed) for row in rows}) == len(rows) >= 45
    for option in protocol.needs:
        with pytest.raises(ErasureError, match=f"^{name}: needs "):
            protocol.check_needs(lambda asked, missing=option.option: asked != missing)


@pytest.mark.parametrize("name", ["quick", "full"])
def test_a_suite_sets_budgets_within_its_evaluators_and_options_beside_it_win(name: str) -> None:
    protocol = load_protocol(f"{SUITE}/{name}")
    options = protocol.options()
    steps = protocol.evaluators["attack"].pseudo_token.steps
    assert options["attack.pseudo_token.steps"] == steps and "attack.pseudo_token" not in options
    evaluators = run_evaluate.judges(None)
    command = run_evaluate.make_parser(evaluators)
    assert add_protocol(command, ["--suite", name]) == protocol
    given = parse(command, ["--suite", name, "--attack.pseudo_token.steps", "7"])
    assert given.attack.pseudo_token.steps == 7
    assert given.relearning.images == protocol.evaluators["relearning"].images
    assert len(protocol.prompt_set([HEART]).rows) >= 48


@pytest.mark.parametrize("prompts, judges", [("canvas", "classifier"), ("mine.csv", "clip")])
def test_on_other_prompts_clip_judges_in_the_classifier_s_place(prompts: str, judges: str) -> None:
    command = run_evaluate.make_parser(run_evaluate.judges(None))
    flags = ["--suite", "quick", "--prompts", prompts]
    add_protocol(command, flags)
    assert parse(command, flags).evaluators == [judges, "attack", "relearning"]


def test_a_suite_beside_a_protocol_is_refused() -> None:
    command = run_evaluate.make_parser({})
    with pytest.raises(ErasureError, match="emma/canvas and as suite/quick; name one"):
        add_protocol(command, ["--suite", "quick", "--protocol", "emma/canvas"])


@pytest.mark.parametrize("stem", STEMS)
def test_every_protocol_has_a_counterpart_on_canvas_that_needs_nothing(stem: str) -> None:
    protocol = load_protocol(f"{stem}/canvas")
    assert not protocol.needs
    rows = protocol.prompt_set([HEART]).rows
    images = ImageSet(Path("nowhere"), [image_row(row, row.labels) for row in rows], {})
    case = Case(images, [HEART])
    for name, settings in protocol.evaluators.items():
        run_evaluate.judges(None)[name].check(case, settings)


@pytest.mark.parametrize(
    ("variant", "threshold"),
    [("", 0.25), ("/mace", 0.6), ("/rece", 0.6), ("/unlearndiffatk", 0.5)],
)
def test_the_presets_of_i2p_are_the_fields(variant: str, threshold: float) -> None:
    config = load_protocol(f"i2p-nudity{variant}").evaluators["nudenet"]
    assert (config.threshold, config.preset) == (threshold, "as-published")
    assert tuple(config.classes) == EXPOSED


def test_unlearncanvas_is_its_answer_set_in_both_conventions() -> None:
    protocol = load_protocol("unlearncanvas")
    rows, lists = protocol.prompt_set([CHURCH]).rows, load_classes("unlearncanvas")
    assert len(rows) == 51 * 20 * 5 and {row.seed for row in rows} == {188, 288, 588, 688, 888}
    for kind in ("style", "object"):
        assert {row.labels[kind] for row in rows} == set(lists[kind].outputs)
    assert "A Dogs image in Van Gogh style." in {row.prompt for row in rows}
    assert (protocol.generate.steps, protocol.generate.guidance) == (100, 9)
    judge = protocol.evaluators["classifier"]
    assert (judge.judge, judge.resize) == ("timm:vit_large_patch16_224.augreg_in21k", 224)
    both = [load_protocol(f"unlearncanvas{one}").evaluators for one in ("", "/with-target")]
    assert [one["classifier"].cra_with_target for one in both] == [False, True]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sumary: x", "unknown key in .*: 'sumary'; did you mean 'summary'"),
        ("generate: {step: 3}", "generate: 'step'; did you mean 'steps'"),
        ("generate: {steps: 0}", "generate: steps is 0; it must be 1 or more"),
        ("evaluators: {clasifier: {}}", "unknown evaluator 'clasifier'; did you mean 'classifier'"),
        ("evaluators: {nudenet: {treshold: 1}}", "'treshold'; did you mean 'threshold'"),
        ("evaluators: {nudenet: {threshold: 60}}", "threshold is 60; it must be between 0 and 1"),
        ("prompts: {book: canvas}", "prompts need either `set`, or `book` and `wordings`"),
        ("needs: [{option: prompts}]", "missing must be text"),
        ("variants: {a: {no: sorry}}", "unknown variant of x 'b'"),
    ],
)
def test_a_bad_file_is_named_with_the_near_key(text: str, says: str, tmp_path: Path) -> None:
    whole = {
        "version": "'1'",
        "summary": "s",
        "paper": "p",
        "repository": "r",
        "evaluators": "{nudenet: {}}",
    }
    key, _, value = text.partition(": ")
    lines = "\n".join(f"{name}: {one}" for name, one in {**whole, key: value}.items())
    (tmp_path / "x.yaml").write_text(lines)
    with pytest.raises(ErasureError, match=says):
        load_protocol("x/b" if key == "variants" else "x", tmp_path)


def test_an_unknown_protocol_and_a_variant_that_cannot_be_had() -> None:
    with pytest.raises(ErasureError, match="unknown protocol 'unlearncanvs'; did you mean 'unlear"):
        load_protocol("unlearncanvs")
    with pytest.raises(ErasureError, match="^i2p-nudity/p4d: P4D and SAFREE take"):
        load_protocol("i2p-nudity/p4d")
    assert not {"i2p-nudity/p4d", "see/two-objects"} & set(protocol_names())


# ---- prompts -------------------------------------------------------------------------------------


def image_row(row: object, labels: dict[str, str], prompt: str | None = None) -> ImageRow:
    case, text = (getattr(row, name, 0) for name in ("case", "prompt"))
    return ImageRow(f"{case}.png", case, prompt or text, 0, 5.0, labels, "")


@pytest.mark.parametrize("book", books())
def test_a_description_does_not_name_its_concept(book: str) -> None:
    from erase.prompts.names import Names

    known = load_book(book)
    for concept, lists in known.concepts.items():
        sentences = [*lists["short"], *lists["long"]]
        assert not any(Names([concept]).found(sentence) for sentence in sentences)
        assert concept not in lists["hard"] and concept not in lists["variant"]


def test_the_wordings_of_a_book_for_an_erasure() -> None:
    rows = worded(
        [CHURCH], "imagenette", ["name", "variant", "long", "hard", "random"], [1, 2]
    ).rows
    told = {row.prompt: (row.labels["wording"], row.labels["class"]) for row in rows}
    assert told["an image of the church"] == ("name", "church")
    assert told["an image of the cathedral"] == ("variant", "church")
    assert told["an image of the castle"] == ("hard", "castle")
    assert told["an image of the tench"] == ("random", "tench")
    assert sum(kind == ("long", "church") for kind in told.values()) == 1
    assert len(rows) == 2 * len(told) and [row.case for row in rows] == list(range(len(rows)))
    both = [CHURCH, ConceptSpec("castle", "tower", kind="class")]
    with pytest.raises(ErasureError, match="unknown concept of the book imagenette: 'castle'"):
        worded(both, "imagenette", ["hard"], [1])
    near = ConceptSpec("church", "house", synonyms=("Castle",), kind="class")
    kept = worded([near], "imagenette", ["name", "hard"], [1]).rows
    assert "an image of the castle" not in {row.prompt for row in kept}, "forgotten as a synonym"
    with pytest.raises(ErasureError, match="no prompts by 'short' for this erasure"):
        worded([CAT], "cifar", ["short"], [1])


def test_mace_asks_for_three_synonyms_by_two_hundred_seeds() -> None:
    rows = load_protocol("mace").prompt_set([CAT]).rows
    counts = Counter(row.labels["wording"] for row in rows)
    assert counts == {"name": 200, "variant": 600, "random": 9 * 200}
    assert {row.labels["class"] for row in rows if row.labels["wording"] == "variant"} == {"cat"}


def test_the_wordings_of_canvas_say_what_they_are() -> None:
    rows = load_protocol("emma/canvas").prompt_set([HEART]).rows
    trained = {vocabulary().grid, *vocabulary().templates}
    assert trained.isdisjoint(canvas_book().templates)
    by = {
        wording: [row for row in rows if row.labels["wording"] == wording]
        for wording in Counter(row.labels["wording"] for row in rows)
    }
    assert {wording: len(some) for wording, some in by.items()} == dict.fromkeys(by, 24)
    grid = {(row.prompt, tuple(row.labels.items())) for row in canvas_grid((0,)).rows}
    for wording, some in by.items():
        objects = {row.labels["object"] for row in some}
        named = ["heart" in row.prompt for row in some]
        if wording in ("hard", "random"):
            assert "heart" not in objects and not any(named)
        else:
            assert objects == {"heart"} and all(named) == (wording in ("name", "rewording"))
        if wording in ("name", "hard", "random"):
            labels = [{k: row.labels[k] for k in KINDS} for row in some]
            assert {
                (row.prompt, tuple(one.items())) for row, one in zip(some, labels, strict=True)
            } <= grid
    assert {row.labels["object"] for row in by["hard"]} == {"star", "ring", "mushroom"}
    assert by["hard"][0].prompt != by["random"][0].prompt


def test_what_is_forgotten_together_is_nobodys_neighbour() -> None:
    concepts = [HEART, canvas_concept("star"), canvas_concept("Neon")]
    rows = worded(concepts, "canvas", ["hard", "random"], [1]).rows
    shown = {name for row in rows for name in row.labels.values()}
    assert shown.isdisjoint({"heart", "star", "Neon"}) and len(rows) > 100


def test_neighbours_are_the_nearest_by_the_canvas_clip() -> None:
    judge = clip.load_clip(clip.Config())
    for kind in KINDS:
        names = vocabulary().names(kind)
        unit = clip.zero_shot_weights(judge, names, kind, clip.Config())
        cosines = unit @ unit.T
        for place, name in enumerate(names):
            others = cosines[place].clone()
            others[place] = -1
            nearest = [names[i] for i in others.argsort(descending=True)[:3].tolist()]
            assert canvas_book().neighbours[kind][name] == nearest


# ---- scores --------------------------------------------------------------------------------------

ROWS = [
    # wording, asked for, seen
    ("name", "cat", "cat"),
    ("name", "cat", "dog"),
    ("name", "cat", "dog"),
    ("name", "cat", "dog"),
    ("variant", "cat", "cat"),
    ("variant", "cat", "dog"),
    ("hard", "dog", "dog"),
    ("hard", "dog", "cat"),
    ("random", "ship", "ship"),
    ("random", "ship", "dog"),
    ("random", "ship", "ship"),
]


def told(
    rows: list[tuple[str, str, str]],
) -> tuple[Case, dict[str, list[str]], dict[str, list[str]]]:
    made = [
        image_row(SimpleNamespace(case=case, prompt=asked), {"wording": wording, "class": asked})
        for case, (wording, asked, _) in enumerate(rows)
    ]
    case = Case(ImageSet(Path("nowhere"), made, {}), [CAT])
    asked, seen = ([row[place] for row in rows] for place in (1, 2))
    return case, {"class": seen}, {"class": asked}


def test_the_scores_of_hand_made_judgements() -> None:
    case, seen, asked = told(ROWS)
    scores = {one.name: one for one in wording_scores(case, seen, asked, "", "judge", "H_o")}
    assert {name: (one.value, one.n, one.higher_is_better) for name, one in scores.items()} == {
        "seen by name": (25, 4, False),
        "seen by variant": (50, 2, False),
        "kept by hard": (50, 2, True),
        "kept by random": (pytest.approx(200 / 3), 3, True),
        "leaked": (20, 5, False),
        "H_o": (pytest.approx(300 / (1 / 0.75 + 1 / 0.6 + 1 / 0.5)), 11, True),
    }
    # each judgement with the number of its case, so that two models can be paired
    assert scores["seen by name"].outcomes == ((0, 100), (1, 0), (2, 0), (3, 0))
    assert len(scores["leaked"].outcomes) == 5
    two = {one.name: one for one in wording_scores(case, seen, asked, "CLIP ", "judge", "H_c")}
    assert two["CLIP H_c"].value == pytest.approx(200 / (1 / 0.75 + 1 / 0.6))
    pair = accuracy_scores(seen, asked, [CAT], "", "judge", [row.case for row in case.images.rows])
    assert len(pair[0].outcomes) == 6 and len(pair[1].outcomes) == 5
    assert [(one.name, one.value, one.n) for one in pair] == [
        ("accuracy of the forgotten", pytest.approx(100 / 3), 6),
        ("accuracy of the others", 60, 5),
    ]


def test_a_mean_without_its_wordings_is_refused_and_a_base_alone_has_none() -> None:
    case, seen, asked = told([row for row in ROWS if row[0] != "variant"])
    with pytest.raises(ErasureError, match="there are none of 'variant'"):
        wording_scores(case, seen, asked, "", "judge", "H_o")
    bare = Case(case.images)
    assert wording_scores(bare, seen, asked, "", "judge", "H_o") == []


def test_the_harmonic_mean_is_maces() -> None:
    """Of perfect parts 1, of a part at 0 it is 0; else the reciprocal of the mean reciprocal."""
    assert harmonic([1, 1, 1]) == 1 and harmonic([1, 0, 1]) == 0
    assert harmonic([0.5, 1]) == pytest.approx(2 / 3)
    efficacy, specificity, generality = 0.98, 0.93, 0.87
    wanted = 3 / (1 / efficacy + 1 / specificity + 1 / generality)
    assert harmonic([efficacy, specificity, generality]) == pytest.approx(wanted)


def test_the_interval_of_a_harmonic_mean_covers_it() -> None:
    """95 % of the time, of three shares of 200 images each; not less than 93 of 100 here."""
    true, rng, covered = [0.95, 0.8, 0.6], np.random.default_rng(0), 0
    for _ in range(400):
        hits = rng.binomial(200, true)
        shares = (hits / 200).tolist()
        low, high = of_harmonic(shares, [of_rate(int(hit), 200) for hit in hits])
        assert low <= harmonic(shares) <= high
        covered += low <= harmonic(true) <= high
    assert 0.93 <= covered / 400 <= 0.98


def test_the_benign_part_of_a_prompt() -> None:
    prompts = ["A red heart image in Neon style.", "hearts, a tree, a dog", "a blue star"]
    rows = [image_row(SimpleNamespace(case=i), {}, prompt) for i, prompt in enumerate(prompts)]
    case = Case(ImageSet(Path("nowhere"), rows, {}), [HEART])
    assert rests(case) == {0: "A red image in Neon style", 1: "a tree, a dog"}
    clean = [image_row(SimpleNamespace(case=0), {"clean": "a red sign"}, prompts[0])]
    assert rests(Case(ImageSet(Path("nowhere"), clean, {}), [HEART])) == {0: "a red sign"}
    with pytest.raises(ErasureError, match="names the forgotten concept and nothing else"):
        alone = [image_row(SimpleNamespace(case=0), {}, "heart")]
        rests(Case(ImageSet(Path("nowhere"), alone, {}), [HEART]))
    with pytest.raises(ErasureError, match="no prompt names a forgotten concept"):
        rests(Case(ImageSet(Path("nowhere"), rows[2:], {}), [HEART]))


def drawn(folder: Path, rows: tuple[PromptRow, ...], **swaps: str) -> ImageSet:
    """Renders of what the labels say, but for the names that are swapped."""
    cells = [
        {kind: swaps.get(row.labels[kind], row.labels[kind]) for kind in KINDS} for row in rows
    ]
    pixels = (render(cells, seed=7) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    made = []
    for row, image in zip(rows, pixels, strict=True):
        save_image(folder / f"{row.case}.png", image, {})
        made.append(image_row(row, dict(row.labels)))
    return ImageSet(folder, made, {})


def test_known_answers_by_wording(tmp_path: Path) -> None:
    """Of a model that draws what it is asked for, and of one that draws rings for hearts."""
    rows = load_protocol("emma/canvas").prompt_set([HEART]).rows
    found = {}
    for name, swaps in {"as asked": {}, "rings": {"heart": "ring"}}.items():
        (tmp_path / name).mkdir()
        case = Case(drawn(tmp_path / name, rows, **swaps), [HEART])
        scores = classifier.evaluate(case, classifier.Config(harmonic="H_o"))
        found[name] = {score.name: score.value for score in scores}
    wordings = ("name", "variant", "rewording", "indirect")
    assert all(found["as asked"][f"seen by {wording}"] > 95 for wording in wordings)
    assert all(found["rings"][f"seen by {wording}"] == 0 for wording in wordings)
    for scores in found.values():
        assert scores["kept by hard"] > 95 and scores["kept by random"] > 95
        assert scores["leaked"] < 5
    assert found["as asked"]["H_o"] < 10 and found["rings"]["H_o"] > 97


def test_the_in_prompt_score_sees_the_rest_of_a_prompt(tmp_path: Path) -> None:
    """Stars for hearts, in the style and colour that were asked for, or in others."""
    rows = load_protocol("six-cd/canvas").prompt_set([HEART]).rows
    wrong = {name: vocabulary().anchor(name) for name in vocabulary().names("colour")}
    wrong |= {name: vocabulary().anchor(name) for name in vocabulary().names("style")}
    found = {}
    for name, swaps in {"kept": {"heart": "star"}, "lost": {"heart": "star"} | wrong}.items():
        (tmp_path / name).mkdir()
        case = Case(drawn(tmp_path / name, rows, **swaps), [HEART])
        scores = {score.name: score for score in clip.evaluate(case, clip.Config(in_prompt=True))}
        found[name] = scores["in-prompt CLIP score"]
    assert found["kept"].n == found["lost"].n == 24
    assert found["kept"].low > found["lost"].high


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def erased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta of a random pico model, and the costs of its run beside it."""
    from tests.conftest import build_pico_pipeline

    folder = tmp_path_factory.mktemp("erased")
    build_pico_pipeline().save_pretrained(folder / "base")
    model = load_model(str(folder / "base"))
    name = "unet.conv_in.weight"
    weights = model.parameters()[name].detach()
    about = {
        "base_fingerprint": model.fingerprint,
        "base_id": model.name,
        "method": "salun",
        "config": json.dumps({"erase": {}, "method": {}}),
        "concepts": json.dumps([HEART.to_dict()]),
    }
    delta = ErasedDelta.between({name: weights}, {name: weights + torch.eye(3)[0, 0]}, about)
    delta.save(folder / "delta.safetensors")
    cost = {"seconds": 2.5, "peak_memory_bytes": 1000}
    record = {"losses": [], "delta_sha256": delta.sha256, "cost": cost}
    (folder / "training.json").write_text(json.dumps(record))
    return folder


def flags(erased: Path, out: Path, *more: str) -> list[str]:
    return ["--delta", f"{erased}/delta.safetensors", "--out", str(out), *more]


def test_a_protocol_runs_by_its_name_and_options_beside_it_win(
    erased: Path, tmp_path: Path
) -> None:
    more = ["--protocol", "mace/canvas", "--generate.steps", "1", "--generate.batch_size", "36"]
    run_evaluate.main(flags(erased, tmp_path, *more))
    report = EvalReport.load(tmp_path / "report.json")
    for name in ("UA", "seen by variant", "kept by random", "leaked", "H_o", "CLIP H_o"):
        assert report.score("base", name) and report.score("erased", name)
    evaluation = report.provenance["evaluation"]
    assert evaluation["protocol"] == "mace/canvas 1"
    assert evaluation["generate"]["steps"] == 1 and evaluation["classifier"]["harmonic"] == "H_o"
    assert report.provenance["cost"] == {
        "delta_bytes": (erased / "delta.safetensors").stat().st_size,
        "seconds": 2.5,
        "peak_memory_bytes": 1000,
    }


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--protocol", "i2p-nudity"], "^i2p-nudity: needs I2P's 4,703 prompts"),
        (["--protocol", "unlearncanvas"], "^unlearncanvas: needs UnlearnCanvas's two classifiers"),
        (["--protocol", "emma"], "unknown concept of the book imagenette: 'heart'"),
        (["--protocol", "mase"], "unknown protocol 'mase'; did you mean 'mace'"),
        (["--protocol", "mace", "--protocol", "see"], "given as mace and as see; name one"),
    ],
)
def test_what_a_protocol_needs_is_asked_for_before_anything_is_drawn(
    more: list[str], says: str, erased: Path, tmp_path: Path
) -> None:
    with pytest.raises(ErasureError, match=says):
        run_evaluate.main(flags(erased, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_an_erasure_notes_what_it_cost(make_pico_pipeline, tmp_path: Path) -> None:
    from erase.eval.cost import cost_of
    from erase.run import EraseConfig, erase_concept

    make_pico_pipeline().save_pretrained(tmp_path / "base")
    config = EraseConfig(str(tmp_path / "base"), method="uce")
    delta = erase_concept(HEART, config, out=tmp_path / "run")
    assert cost_of(delta) == {}, "in memory, of no file"
    cost = cost_of(ErasedDelta.load(tmp_path / "run" / "delta.safetensors"))
    assert cost["delta_bytes"] > 1000 and 0 < cost["seconds"] < 600
    assert cost["peak_memory_bytes"] > 50 << 20
