"""Foreign checkpoints, finished images and several prompt sets, through the commands."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file

from erase.delta import ErasedDelta
from erase.eval.finished import evaluate_images, finished_images, holds_images, prompts_of
from erase.eval.images import ImageSet, write_manifest, write_settings
from erase.eval.report import EvalReport
from erase.eval.reporting import asked_of
from erase.eval.run import EvaluateConfig, GenerateConfig
from erase.foreign import read_erased
from erase.models import load_model
from erase.prompts.canvas import canvas_concept
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import PromptSet, apart, joined, of_prompts
from erase.scripts import run_evaluate, run_export, run_generate
from erase.scripts.cli import run
from erase.scripts.cli.naming import concepts_named
from tests.run_fixtures import base as base

HEADER = "case_number,prompt,seed,object,style,colour\n"
HEARTS = HEADER + "0,a red heart,1,heart,Flat,red\n1,a blue star,2,star,Neon,blue\n"
MOONS = HEADER + "0,a blue moon,3,moon,Flat,blue\n1,a red star,4,star,Neon,red\n"
PLAIN = "prompt,seed\nsomething,5\nsomething else,6\n"
FEW = ["--generate.steps", "1", "--generate.batch_size", "2", "--evaluators", "[classifier]"]


@pytest.fixture(scope="module")
def work(base, tmp_path_factory):
    """A folder with a checkpoint in ESD's layout, prompt sets, and images of the erased model."""
    folder = tmp_path_factory.mktemp("foreign")
    state = {}
    for name, param in load_model(str(base)).component("unet").named_parameters():
        if "attn2" in name:
            state[name] = param.detach() + 0.1
    save_file(state, folder / "esd.safetensors")
    for name, text in {"hearts": HEARTS, "moons": MOONS, "plain": PLAIN}.items():
        (folder / f"{name}.csv").write_text(text)
    made = run(
        run_generate.main,
        [
            *("--model", str(base), "--erased", str(folder / "esd.safetensors")),
            *("--prompts", str(folder / "hearts.csv"), "--out", str(folder / "images")),
            *("--steps", "1", "--batch_size", "2"),
        ],
    )
    assert made == 0
    return folder


def evaluated(out: Path, *flags: object) -> EvalReport:
    assert run(run_evaluate.main, [*map(str, flags), "--out", str(out), *FEW]) == 0
    return EvalReport.load(out / "report.json")


def scores(report: EvalReport, row: str) -> dict[str, tuple[float, int]]:
    return {score.name: (score.value, score.n) for score in report.rows[row]}


def test_images_are_drawn_on_the_base_that_a_delta_names(work, base, tmp_path):
    path, out = tmp_path / "delta.safetensors", tmp_path / "images"
    erased = ["--model", str(base), "--erased", str(work / "esd.safetensors")]
    named = ["--concepts", "heart", "--format", "delta", "--out", str(path)]
    assert run(run_export.main, [*erased, *named]) == 0
    drawn = ["--prompts", str(work / "hearts.csv"), "--steps", "1", "--batch_size", "2"]
    assert run(run_generate.main, ["--delta", str(path), *drawn, "--out", str(out)]) == 0
    for image in (work / "images").glob("*.png"):
        assert (out / image.name).read_bytes() == image.read_bytes()


def test_a_foreign_checkpoint_is_evaluated_as_a_delta_is(work, base, tmp_path):
    """The report of ESD's file is that of the delta which it is exported to."""
    erased = ["--model", base, "--erased", work / "esd.safetensors", "--concepts", "heart"]
    prompts = ["--prompts", work / "hearts.csv"]
    report = evaluated(tmp_path / "a", *erased, *prompts)
    path = tmp_path / "delta.safetensors"
    exported = [*map(str, erased), "--format", "delta", "--out", str(path)]
    assert run(run_export.main, exported) == 0
    again = evaluated(tmp_path / "b", "--delta", path, *prompts)
    assert report.rows == again.rows
    assert report.provenance["delta_sha256"] == ErasedDelta.load(path).sha256
    (told,) = json.loads(report.provenance["foreign"])
    assert told["file"] == "esd.safetensors" and len(told["sha256"]) == 64
    assert report.title == "heart"  # what it put in the place is not known
    page = (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    assert told["sha256"] in page


def test_images_of_a_foreign_checkpoint_are_those_of_its_weights(work, base):
    model = load_model(str(base))
    with read_erased(model, [work / "esd.safetensors"]).applied(model) as erased:
        fingerprint = erased.fingerprint
    settings = ImageSet.open(work / "images").settings
    assert settings["fingerprint"] == fingerprint and settings["delta"] == "foreign"


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "does not say what was forgotten; name it with --concepts"),
        (["--delta", "d.safetensors"], "give --delta or --erased"),
    ],
)
def test_what_a_foreign_checkpoint_needs_is_said(flags, message, work, base, tmp_path, capsys):
    given = ["--model", base, "--erased", work / "esd.safetensors", *flags, "--out", tmp_path / "r"]
    assert run(run_evaluate.main, [*map(str, given), *FEW]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "words, model, targets",
    [
        (["heart", "moon"], "canvas", ["heart", "moon"]),
        (["heart"], "sd", ["heart"]),
        (["nudity"], "sd", ["nude person"]),
        (["imagenette", "church"], "sd", ["church"]),
        (["Van Gogh", "Neon"], "sd", ["Van Gogh", "Neon"]),
        (["nudity", "heart", "fish"], None, ["nude person", "heart", "fish"]),
        (["Zorblax"], None, "'Zorblax' is on none of the lists"),
        (["hart"], "canvas", "unknown canvas concept 'hart'; did you mean 'heart'"),
        (["Zorblax"], "sd", "'Zorblax' is on none of the lists .* into a YAML file"),
    ],
)
def test_concepts_are_named_by_word_or_file(words, model, targets):
    if isinstance(targets, str):
        with pytest.raises(ErasureError, match=targets):
            concepts_named(words, model)
        return
    assert [concept.target for concept in concepts_named(words, model)] == targets


def test_concepts_are_for_foreign_checkpoints(tmp_path, capsys):
    assert run(run_evaluate.main, ["--concepts", "heart", "--out", str(tmp_path / "r")]) == 2
    assert "--concepts is for --erased" in capsys.readouterr().err


# ---- finished images -----------------------------------------------------------------------------


def test_finished_images_score_as_the_weights_that_drew_them(work, base, tmp_path):
    flags = ["--model", base, "--concepts", "heart", "--prompts", work / "hearts.csv"]
    report = evaluated(tmp_path / "a", "--erased", work / "esd.safetensors", *flags)
    finished = evaluated(tmp_path / "b", "--erased", work / "images", *flags)
    assert finished.rows == report.rows
    assert finished.provenance["method"] == "finished images"
    assert evaluated(tmp_path / "c", "--erased", work / "images", *flags[:4]).rows == report.rows


@pytest.fixture
def others(work, tmp_path):
    """The same images as another program leaves them, erased and base alike: no manifest, a CSV
    beside them."""
    for name in ("erased", "base"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(work / "hearts.csv", folder / "prompts.csv")
        for case in (0, 1):
            shutil.copy(work / "images" / f"{case:05d}.png", folder / f"{case}_0.png")
    return tmp_path


def test_images_with_a_csv_are_read_and_need_no_model(others, work):
    images = finished_images(others / "erased")
    first = ImageSet.open(work / "images")
    assert [row.sha256 for row in images.rows] == [row.sha256 for row in first.rows]
    assert prompts_of(images).rows == PromptSet.load(work / "hearts.csv").rows
    report = evaluate_images(
        others / "erased", [canvas_concept("heart")], others / "base", others / "report"
    )
    assert scores(report, "base") == scores(report, "erased")


def test_finished_images_are_of_anything(others, tmp_path):
    """No model is asked whether it knows the concept where both sides are there."""
    for name in ("erased", "base"):
        (others / name / "prompts.csv").write_text("prompt,seed\na nude person,1\na church,2\n")
    given = ["--erased", others / "erased", "--base_images", others / "base"]
    given += ["--concepts", "nudity", "--evaluators", "[nudenet]", "--out", tmp_path / "r"]
    assert run(run_evaluate.main, list(map(str, given))) == 0
    assert EvalReport.load(tmp_path / "r" / "report.json").title == "nude person"


def test_a_column_may_name_the_images(others):
    (others / "erased" / "0_0.png").rename(others / "erased" / "first.png")
    (others / "erased" / "1_0.png").rename(others / "erased" / "second.png")
    table = "prompt,seed,object,file\na red heart,1,heart,second.png\nstar,2,star,first.png\n"
    (others / "erased" / "prompts.csv").write_text(table)
    rows = finished_images(others / "erased").rows
    assert [row.file for row in rows] == ["second.png", "first.png"]
    assert [dict(row.labels) for row in rows] == [{"object": "heart"}, {"object": "star"}]


def test_a_missing_image_is_an_error(others):
    (others / "erased" / "1_0.png").unlink()
    with pytest.raises(ErasureError, match=r"holds no image of case 1 .*1_0.png is missing"):
        finished_images(others / "erased")


def test_an_image_that_no_row_names_is_an_error(others):
    shutil.copy(others / "erased" / "1_0.png", others / "erased" / "1_1.png")
    with pytest.raises(ErasureError, match="1 images that no row .* names, the first is 1_1.png"):
        finished_images(others / "erased")


def test_an_image_that_is_none_is_an_error(others):
    (others / "erased" / "1_0.png").write_bytes(b"no image")
    with pytest.raises(ErasureError, match="1_0.png cannot be read as an image"):
        finished_images(others / "erased")


def test_an_ending_in_capitals_is_one(others):
    (others / "erased" / "1_0.png").rename(others / "erased" / "1_0.PNG")
    assert [row.file for row in finished_images(others / "erased").rows] == ["0_0.png", "1_0.PNG"]


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_an_image_that_is_cut_short_is_an_error(ending, others):
    path = others / "erased" / f"1_0.{ending}"
    Image.effect_noise((64, 64), 99).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if ending != "png":
        path.with_suffix(".png").unlink()
    with pytest.raises(ErasureError, match=f"1_0.{ending} cannot be read as an image"):
        finished_images(others / "erased")


def test_images_of_other_prompts_than_the_base_s_are_refused(others):
    (others / "base" / "prompts.csv").write_text(HEARTS.replace("a red heart", "a heart"))
    with pytest.raises(ErasureError, match="is not of the prompts prompts: case 0 is"):
        evaluate_images(
            others / "erased", [canvas_concept("heart")], others / "base", others / "report"
        )
    assert not (others / "report").exists()


def test_labels_are_those_of_the_prompts_that_are_given(work):
    corrected = HEADER.replace("\n", ",file\n") + "0,a red heart,1,moon,Flat,red,a.png\n"
    corrected += "1,a blue star,2,star,Neon,blue,b.png\n"
    (work / "corrected.csv").write_text(corrected)
    rows = finished_images(work / "images", PromptSet.load(work / "corrected.csv")).rows
    wanted = [{"object": "moon", "style": "Flat", "colour": "red"}]
    assert [dict(row.labels) for row in rows[:1]] == wanted
    assert finished_images(work / "images").rows[0].labels["object"] == "heart"


def test_both_sides_have_the_labels_of_the_erased_ones(others):
    (others / "base" / "prompts.csv").write_text(HEARTS.replace("1,heart", "1,moon"))
    report = evaluate_images(
        others / "erased", [canvas_concept("heart")], others / "base", others / "report"
    )
    assert scores(report, "base") == scores(report, "erased")


def test_the_base_is_drawn_with_the_settings_of_our_own_images(work, base, tmp_path, capsys):
    given = [*("--model", base, "--erased", work / "images", "--concepts", "heart"), *FEW]
    given += ["--generate.steps", "3", "--out", tmp_path / "r"]
    assert run(run_evaluate.main, list(map(str, given))) == 2
    assert "was made with steps 1, and the base's images would be with 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, said",
    [
        ({"steps": 3}, "steps 1, and .*base with 3"),
        ({"mixed_precision": "bf16"}, "mixed_precision no, and .*base with bf16"),
        ({"vae": "another"}, "vae .*base with another"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr None, and .*base with True"),
        (7.5, "guidance 5.0, and .*base with 7.5"),
    ],
)
def test_finished_images_of_other_settings_are_not_compared(change, said, work, tmp_path):
    other = ImageSet.open(work / "images")
    shutil.copytree(other.folder, tmp_path / "base")
    if isinstance(change, dict):
        write_settings(tmp_path / "base", other.settings | change)
    else:
        write_manifest(tmp_path / "base", [replace(row, guidance=change) for row in other.rows])
    with pytest.raises(ErasureError, match=f"was made with {said}; make both by the same"):
        evaluate_images(
            work / "images", [canvas_concept("heart")], tmp_path / "base", tmp_path / "r"
        )
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"resolution": 64}, "resolution 64, and .* with 32; add --generate.resolution 64"),
        ({"mixed_precision": "bf16"}, "mixed_precision bf16, .*--generate.mixed_precision bf16"),
        ({"vae": "another"}, "vae another, .*load the base as it was loaded there"),
        (7.5, "guidance 7.5, and .* with 5.0; add --generate.guidance 7.5"),
    ],
)
def test_the_base_is_not_drawn_in_another_way(change, said, work, base, tmp_path):
    other = ImageSet.open(work / "images")
    folder = shutil.copytree(other.folder, tmp_path / "erased")
    if isinstance(change, dict):
        write_settings(folder, other.settings | change)
    else:
        write_manifest(folder, [replace(row, guidance=change) for row in other.rows])
    config = EvaluateConfig(["classifier"], GenerateConfig(steps=1))
    with pytest.raises(ErasureError, match=said):
        evaluate_images(
            *(folder, [canvas_concept("heart")], lambda: load_model(str(base)), tmp_path / "r"),
            config,
            prompts=[PromptSet.load(work / "hearts.csv")],
        )
    assert not (tmp_path / "r").exists()


def test_folders_of_images_are_told_from_checkpoints(others, work, base):
    assert holds_images(others / "erased") and holds_images(work / "images")
    assert not holds_images(base) and not holds_images(work) and not holds_images(work / "absent")
    parts = others / "parts"  # an export of the changed parts, with the picture of its card
    shutil.copytree(base / "unet", parts / "unet")
    shutil.copy(work / "images" / "00000.png", parts / "before_after.png")
    assert not holds_images(parts)


def test_an_image_is_opened_once_its_size_is_known(others):
    Image.new("RGB", (9000, 1)).save(others / "erased" / "1_0.png")
    with pytest.raises(ErasureError, match="is 9000 x 1 pixels"):
        finished_images(others / "erased")


# ---- several prompt sets -------------------------------------------------------------------------


def test_sets_are_numbered_apart_and_named_apart():
    one, two = (
        PromptSet("a", PromptSet.load("canvas").rows[:3]),
        PromptSet("a", PromptSet.load("canvas").rows[3:5]),
    )
    first, second = apart([one, two])
    assert first == one and second.name == "a (2)"
    assert [row.case for row in second.rows] == [3 + row.case for row in two.rows]
    assert joined([one, two]).rows == first.rows + second.rows


def test_every_set_is_scored_by_itself_on_what_it_asks_for(work, base, tmp_path):
    erased = ["--model", base, "--erased", work / "esd.safetensors"]
    both = ["--concepts", "heart", "--concepts", "moon"]
    sets = ["--prompts", work / "hearts.csv", "--prompts", work / "moons.csv"]
    report = evaluated(tmp_path / "both", *erased, *both, *sets)
    for name, concept in (("hearts", "heart"), ("moons", "moon")):
        prompts = ["--prompts", work / f"{name}.csv"]
        alone = evaluated(tmp_path / name, *erased, "--concepts", concept, *prompts)
        for row in ("base", "erased"):
            own = {
                score.removeprefix(f"{name}: "): value
                for score, value in scores(report, row).items()
                if score.startswith(f"{name}: ")
            }
            assert own == scores(alone, row)
    assert report.provenance["prompt_sets"]["moons"]["judged_on"] == ["moon"]
    assert len(ImageSet.open(tmp_path / "both" / "erased").rows) == 4


def test_a_set_that_no_concept_is_asked_in_is_of_what_must_stay(work, base, tmp_path):
    erased = ["--model", base, "--erased", work / "esd.safetensors", "--concepts", "heart"]
    sets = ["--prompts", work / "hearts.csv", "--prompts", work / "plain.csv"]
    report = evaluated(tmp_path / "r", *erased, *sets)
    told = report.provenance["prompt_sets"]["plain"]
    assert (
        told["judged_on"] == []
        and "no labels to judge them by" in told["not_judged_by"]["classifier"]
    )
    assert {name.split(":")[0] for name in scores(report, "erased")} == {"hearts"}


def test_a_set_asks_for_a_concept_in_the_plural_or_by_a_synonym_too():
    church = ConceptSpec("church", "castle", ("prayer house",))
    coco = of_prompts(["a dog on a sofa"], 0)
    for prompt in ("two churches by a lake", "a prayer-house"):
        asking = of_prompts([prompt], 0)
        assert asked_of([asking, coco], [church]) == [(asking, [church]), (coco, [])]


def test_a_concept_that_no_set_names_is_judged_on_each(work, base, tmp_path, capsys):
    given = ["--model", base, "--erased", work / "esd.safetensors", "--concepts", "house"]
    sets = ["--prompts", work / "hearts.csv", "--prompts", work / "moons.csv"]
    out = ["--out", tmp_path / "r"]
    assert run(run_evaluate.main, [*map(str, [*given, *sets, *out]), *FEW]) == 2
    assert "prompt set hearts: no image is labelled 'house'" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
