"""The commands as users type them: help, options, names, outputs, consoles."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import Namespace

from erase.delta import ErasedDelta
from erase.methods import get_method
from erase.models import load_model
from erase.parallel.progress import bar
from erase.prompts.canvas import KINDS, canvas_concept, check_canvas, vocabulary
from erase.prompts.concepts import ConceptSpec, load_concepts
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import PromptSet, joined, of_prompts
from erase.run import EraseConfig, erase_concept
from erase.scripts import (
    demo,
    run_compare,
    run_erase,
    run_evaluate,
    run_export,
    run_freeze,
    run_generate,
    run_list,
    run_live,
)
from erase.scripts.cli import WIDTH, check_folder, hush, parse, read_concepts, run
from erase.scripts.cli.foreign import place_of
from erase.scripts.cli.recipes import recipe, recipes
from tests.loaded import loaded, watched
from tests.texts import raises, written

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "erase-concept": run_erase,
    "erase-generate": run_generate,
    "erase-evaluate": run_evaluate,
    "erase-export": run_export,
    "erase-demo": demo,
    "erase-list": run_list,
    "erase-live": run_live,
    "erase-compare": run_compare,
    "erase-freeze": run_freeze,
}
WITHOUT_OUT = ("erase-list", "erase-live")  # these write no folder
every_command = pytest.mark.parametrize("name", COMMANDS)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def failed(capsys: pytest.CaptureFixture[str], main, *flags: str) -> str:
    """The one sentence with which a command refuses these flags."""
    assert run(main, list(flags)) == 2
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 1 and "Traceback" not in errors
    return errors.split("error: ")[1].strip()


# ---- help ----------------------------------------------------------------------------------------


@every_command
def test_help_comes_at_once_in_80_columns_and_is_that_of_the_real_libraries(
    name, capsys, monkeypatch, tmp_path
):
    module = COMMANDS[name].__name__
    environment = {**ENVIRONMENT, **watched(tmp_path / "told", ROOT), "COLUMNS": "200"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert loaded(tmp_path / "told") == []
    # beside other work
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.5
    shown = done.stdout.decode()
    assert done.stderr == b"" and max(map(len, shown.splitlines())) <= WIDTH
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as left:
        run(COMMANDS[name].main, ["--help"])
    assert left.value.code == 0 and capsys.readouterr().out == shown


@every_command
def test_version_names_the_libraries_too(name, capsys):
    with pytest.raises(SystemExit) as left:
        run(COMMANDS[name].main, ["--version"])
    shown = capsys.readouterr().out
    assert (
        left.value.code == 0
        and shown.startswith(f"{name} 0.")
        and f"torch {torch.__version__.split('+')[0]}" in shown
    )


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("main", "flags", "near"),
    [
        (run_erase.main, ["--meth", "salun-paper"], "'method'"),
        (run_erase.main, ["--concep", "heart"], "'concept'"),
        (run_generate.main, ["--mod", "canvas"], "'model'"),
        (run_evaluate.main, ["--seed", "1"], "'seeds'"),
        (run_export.main, ["--form", "lora"], "'format'"),
        (demo.main, ["--conc", "Neon"], "'concept'"),
        (run_erase.main, ["--train.step", "1"], "'train.steps'"),
    ],
)
def test_an_abbreviated_option_is_refused_and_the_whole_one_named(main, flags, near, capsys):
    assert f"did you mean {near}" in failed(capsys, main, *flags)


def test_an_abbreviated_key_of_a_config_file_is_refused(tmp_path, capsys):
    path = written(tmp_path, "c.yaml", "meth: salun-paper\nconcept: heart\n")
    assert "'meth'; did you mean 'method'" in failed(capsys, run_erase.main, "--config", str(path))


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").rglob("*.py")), ids=str)
def test_no_parser_of_any_script_takes_abbreviations(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "argparse.ArgumentParser",
            "ArgumentParser",
            "Parser",
        ):
            assert "allow_abbrev=False" in ast.unparse(node)


@pytest.mark.parametrize(
    ("main", "option", "near"),
    [
        (run_erase.main, "lr", "'train.lr'"),
        (run_erase.main, "learning_rate", "'train.lr'"),
        (run_erase.main, "learning-rate", "'train.lr'"),
        (run_erase.main, "train.learning_rate", "'train.lr'"),
        (run_erase.main, "steps", "'latents.steps' or 'train.steps'"),
        (
            run_erase.main,
            "batch-size",
            "'latents.batch_size' or 'mask.batch_size' or 'train.batch_size'",
        ),
        (run_erase.main, "train.batch-size", "'train.batch_size'"),
        (run_erase.main, "Density", "'mask.density'"),
        (run_erase.main, "output_dir", "'out'"),
        (run_erase.main, "optimiser", "'train.optimizer'"),
        (run_evaluate.main, "steps", "'generate.steps'"),
        (
            run_evaluate.main,
            "batch-size",
            "'classifier.batch_size' or 'clip.batch_size' or 'cmmd.batch_size'",
        ),
        (run_generate.main, "num_inference_steps", "'steps'"),
        (run_generate.main, "guidance-scale", "'guidance'"),
        (run_export.main, "output", "'out'"),
    ],
)
def test_a_wrong_option_gets_the_near_one(main, option, near, capsys):
    assert f"did you mean {near}" in failed(capsys, main, f"--{option}", "3")


@every_command
def test_an_option_like_no_other_does_not_get_a_line_of_sixty_names(name, capsys):
    variant = "--method salun " if name == "erase-concept" else ""
    assert (
        failed(capsys, COMMANDS[name].main, "--zzzz", "1")
        == f"unknown option 'zzzz'; {name} {variant}--help lists the options"
    )


def test_an_option_of_training_tells_a_method_that_does_not_train(capsys):
    for option in ("train.steps", "twofold"):
        assert failed(capsys, run_erase.main, "--method", "uce", f"--{option}", "3") == (
            f"uce takes no gradient steps, so it has no {option}; "
            "erase-concept --method uce --help lists its options"
        )


@pytest.mark.parametrize(
    ("main", "flags", "words"),
    [
        (run_erase.main, ["--train.steps", "many"], ["--train.steps", "'many'", "a whole number"]),
        (run_erase.main, ["--train.lr", "1e-x"], ["--train.lr", "'1e-x'", "a number"]),
        (run_erase.main, ["--mask.density", "half"], ["'half'", "a number or auto"]),
        (run_erase.main, ["--load.offload", "block"], ["'block'", "true or false or blocks"]),
        (run_erase.main, ["--seed", "1.5"], ["--seed", "'1.5'", "a whole number"]),
        (
            run_erase.main,
            ["--train.offload", "maybe"],
            ["--train.offload", "'maybe'", "true or false"],
        ),
        (
            run_erase.main,
            ["--train.optimizer_args", "[1]"],
            ["--train.optimizer_args", "'[1]'", "a mapping"],
        ),
        (run_erase.main, ["--train", "3"], ["train is a group", "--train."]),
        (run_erase.main, ["--out"], ["--out needs a value behind it"]),
        (run_erase.main, ["--twofold"], ["--twofold needs a value behind it: true or false"]),
        (run_erase.main, ["--config", "."], ["--config . is a folder", "a .yaml file in it"]),
        (run_erase.main, ["heart"], ["'heart' belongs to no option"]),
        (run_generate.main, ["--resolution", "big"], ["--resolution", "'big'", "a whole number"]),
        (
            run_evaluate.main,
            ["--nudenet.threshold", "low"],
            ["--nudenet.threshold", "'low'", "a number"],
        ),
        (run_export.main, ["--rank", "full"], ["--rank", "'full'", "a whole number"]),
        (run_export.main, ["--scale", "nan"], ["--scale is nan", "finite"]),
        (run_export.main, ["--format", "lora", "--rank", "0"], ["rank is 0", "1 or more"]),
        (
            run_export.main,
            ["--format", "lora", "--energy", "7"],
            ["energy is 7", "between 0 and 1"],
        ),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_option(main, flags, words, capsys):
    error = failed(capsys, main, *flags)
    assert [word for word in words if word not in error] == [] and "<class" not in error


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (
            run_erase.main,
            [
                "--concept",
                "no",
                "--concept",
                "007",
                "--concept",
                "→ 猫",
                "--train.lr",
                "1e-5",
                "--quiet",
            ],
        ),
        (
            run_generate.main,
            ["--prompt", "a: b", "--prompt", "null", "--seed", "5", "--prompts", "canvas"],
        ),
        (run_evaluate.main, []),
        (run_evaluate.main, ["--evaluators", "[clip]", "--clip.classes", "{style: [Van Gogh]}"]),
        (
            run_export.main,
            ["--delta", "a", "--delta", "b", "--scale", "1", "--scale", "-0.5", "--undo"],
        ),
        (demo.main, ["--concept", "Neon"]),
    ],
)
def test_what_print_config_prints_is_read_back(main, flags, tmp_path, capsys):
    def printed(*flags: str) -> str:
        with pytest.raises(SystemExit):
            main([*flags, "--print_config"])
        return capsys.readouterr().out

    first = printed(*flags)
    path = written(tmp_path, "c.yaml", first)
    assert printed("--config", str(path)) == first and yaml.safe_load(first)


# ---- recipes -------------------------------------------------------------------------------------


def test_a_recipe_is_found_by_its_name_and_options_after_it_win(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nudity-sd14").mkdir()  # a folder of that name is no config file
    for given in (["--config", "nudity-sd14"], ["--config=nudity-sd14.yaml"]):
        argv = [*given, "--train.steps", "7"]
        options = parse(run_erase.make_parser(run_erase.chosen_method(argv)), argv)
        assert (options.concepts, options.latents.n_forget, options.train.steps) == (
            ["nudity"],
            400,
            7,
        )
    assert run_erase.chosen_method(["--config", "nudity-sd14-salun-paper"]) == "salun-paper"
    own = written(tmp_path, "canvas.yaml", "density: 0.2\n")
    assert recipe("canvas.yaml") == own.name, "a user's own file comes first"


def test_an_unknown_recipe_gets_a_suggestion_or_the_way_to_the_list(capsys):
    for name in ("nudity-sd1.4", "nuditysd14"):
        error = failed(capsys, run_erase.main, "--config", name)
        assert error == f"unknown recipe {name!r}; did you mean 'nudity-sd14'?"
    assert "erase-list recipes names all" in failed(capsys, run_erase.main, "--config", "zzzz")
    assert "absent.yaml" in failed(capsys, run_erase.main, "--config", "absent.yaml")


def test_a_config_file_cannot_include_another_past_its_checks(tmp_path, capsys):
    bomb = written(tmp_path, "bomb.yaml", "density: 0.5\ndensity: 0.4\n")
    path = written(tmp_path, "c.yaml", f"config: {bomb}\n")
    assert "includes another file" in failed(capsys, run_erase.main, "--config", str(path))


def test_recipes_and_type_marks_go_into_the_wheel(monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.chdir(ROOT)
    built = setuptools.Distribution({"script_name": "setup.py"})
    built.parse_config_files(["setup.cfg"])
    command = built.get_command_obj("build_py")
    command.ensure_finalized()
    shipped = {f"{folder}/{file}" for _, folder, _, files in command.data_files for file in files}
    assert {f"scripts/recipes/{name}.yaml" for name in recipes()} <= shipped
    assert {f"{package}/py.typed" for package in ("prompts", "erase", "eval", "scripts")} <= shipped


# ---- concepts ------------------------------------------------------------------------------------


def targets(*args, **named) -> list[str]:
    return [concept.target for concept in read_concepts(*args, **named)]


def test_concepts_given_twice_are_both_erased():
    options = parse(
        run_erase.make_parser("salun"),
        ["--concepts", "nudity", "--concepts", "van-gogh", "--concept", "Monet"],
    )
    named = targets(options.concept, options.anchor, options.concepts, "some/model", options.retain)
    assert named == ["nude person", "Van Gogh", "Monet"]


def test_a_concept_picks_from_the_file_that_has_it_and_is_one_more_else():
    assert targets(["church"], [], ["imagenette", "nudity"], "m", []) == ["church", "nude person"]
    assert targets(["gnome"], ["dwarf"], ["van-gogh"], "m", ["a tree"]) == ["Van Gogh", "gnome"]
    with raises("2 anchors", "those of --concepts"):
        read_concepts(["gnome"], ["dwarf", "elf"], ["van-gogh"], "m", [])


@pytest.mark.parametrize(
    ("name", "kind", "target"),
    [
        ("nudity", "artist", "nude person"),
        ("Violence", "style", "violence"),
        ("einstein", "object", "Albert Einstein"),
    ],
)
def test_a_shipped_name_wins_over_the_kind(name, kind, target, capsys):
    assert targets([name], [], None, "some/model", [], kind) == [target]
    assert f"--kind {kind} is not asked" in capsys.readouterr().err


def test_the_same_concept_twice_is_erased_once_or_refused():
    assert targets(["Dog", " dog "], [], None, "m", [], "object") == ["Dog"]
    assert targets(["heart", "heart "], [], None, "canvas", []) == ["heart"]
    assert targets(["nudity", "naked person"], [], ["nudity"], "m", []) == ["nude person"]
    with raises("'heart' is given twice", "'moon'", "'star'"):
        read_concepts(["heart", "heart"], ["moon", "star"], None, "canvas", [])


def test_a_file_with_a_target_twice_but_for_case_and_blanks_is_refused(tmp_path):
    path = written(
        tmp_path, "c.yaml", "- {target: red  dog, anchor: cat}\n- {target: Red dog, anchor: cow}\n"
    )
    with raises("'Red dog' twice"):
        load_concepts(path)


@pytest.mark.parametrize(
    "flags", [["--concepts", "nudity"], ["--concepts", "van-gogh", "--concept", "heart"]]
)
def test_a_concept_that_canvas_does_not_know_is_refused_there(flags, tmp_path, capsys):
    error = failed(capsys, run_erase.main, *flags, "--out", str(tmp_path / "out"))
    assert "canvas, the embedded model, does not know" in error and "--model" in error
    assert not (tmp_path / "out").exists()


def test_canvas_refuses_it_in_python_too_and_knows_all_its_own_words():
    with raises("does not know 'nude person'", "'nude'"):
        erase_concept(load_concepts("nudity"), EraseConfig())
    names = [name for kind in KINDS for name in vocabulary().names(kind)]
    check_canvas(canvas_concept(name) for name in names)
    check_canvas(
        [
            ConceptSpec("Red Heart", "blue moon"),
            ConceptSpec(vocabulary().synonyms["object"]["heart"][0], "moon"),
        ]
    )


def test_canvas_knows_its_concepts_by_any_name_and_any_case(capsys):
    for name, target in (("Heart", "heart"), ("neon", "Neon"), (" Valentine", "heart")):
        assert read_concepts([name], [], None, "canvas", []) == [canvas_concept(target)]
    assert canvas_concept("RED", "Turquoise") == canvas_concept("red", "cyan")
    assert len(read_concepts(["heart", "valentine"], [], None, "canvas", [])) == 1
    error = failed(capsys, run_erase.main, "--concept", "love")
    assert "unknown canvas concept 'love'; choose one of: " in error


# ---- outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in WITHOUT_OUT])
@pytest.mark.parametrize("out", ["", "  "])
def test_an_empty_out_is_refused(name, out, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--out is empty" in failed(capsys, COMMANDS[name].main, "--out", out)
    assert list(tmp_path.iterdir()) == []


def test_any_other_empty_option_is_refused_too(capsys):
    for main, option in (
        (run_erase.main, "model"),
        (run_erase.main, "concepts"),
        (run_export.main, "report"),
    ):
        assert f"--{option} is empty" in failed(capsys, main, f"--{option}", "")


@pytest.mark.parametrize(
    ("main", "option"),
    [
        (run_evaluate.main, "delta"),
        (run_generate.main, "delta"),
        (run_freeze.main, "delta"),
        (run_erase.main, "after"),
    ],
)
def test_the_first_of_two_deltas_is_not_left_out_without_a_word(main, option, capsys):
    told = failed(capsys, main, f"--{option}", "A", f"--{option}", "B")
    assert f"--{option} takes one delta, and is given A and B" in told


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({"delta": "runs/heart/delta.safetensors"}, "runs/heart/report"),
        ({"delta": "runs/both.safetensors"}, "runs/both/report"),
        ({"delta": "docs"}, "docs/report"),
        ({"erased": ["models/esd.safetensors", "text.pt"]}, "runs/esd/report"),
    ],
)
def test_no_two_erasures_share_a_place_unless_the_user_says_so(given, place, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    assert place_of(Namespace(**{"erased": [], "delta": "", **given}), "report") == place


def test_an_empty_out_is_refused_in_python():
    with raises("out is empty"):
        erase_concept(canvas_concept("heart"), EraseConfig(), out="")


@pytest.mark.parametrize(
    "name", ["erase-concept", "erase-generate", "erase-evaluate", "erase-demo"]
)
@pytest.mark.parametrize("out", ["x.ckpt", "runs/x.safetensors", "x.PT", "x.gguf"])
def test_a_file_name_is_refused_for_what_is_a_folder(name, out, capsys):
    concept = ["--concept", "heart"] if name == "erase-concept" else []
    assert "--out is a folder here" in failed(capsys, COMMANDS[name].main, *concept, "--out", out)


@pytest.mark.parametrize(
    ("format", "out", "words"),
    [
        *(
            ("single-file", f"x.{ending}", "--out x.safetensors")
            for ending in ("ckpt", "pt", "bin", "pth", "onnx", "gguf", "CKPT")
        ),
        ("lora", "x.bin", "--out x.safetensors"),
        ("delta", "x.pt", "--out x.safetensors"),
        ("diffusers", "x.safetensors", "writes a folder"),
        ("components", "x.ckpt", "writes a folder"),
    ],
)
def test_an_export_is_named_as_its_format_is(format, out, words, capsys):
    assert words in failed(capsys, run_export.main, "--format", format, "--out", out)


def test_folders_may_have_dots_in_their_names():
    for out in ("runs/v1.5", "heart.2", ".hidden", "../x"):
        check_folder(out)


# ---- prompts -------------------------------------------------------------------------------------


def prompts_of(*flags: str) -> PromptSet:
    return run_generate.chosen(parse(run_generate.make_parser(), list(flags)))


def test_a_single_picture_has_its_prompt_and_its_seed(capsys):
    (row,) = prompts_of("--prompt", "A heart in Neon style.", "--seed", "5").rows
    assert (row.case, row.prompt, row.seed, row.labels) == (0, "A heart in Neon style.", 5, {})
    assert [row.seed for row in prompts_of("--prompt", "a", "--prompt", "b").rows] == [0, 0]
    assert len(prompts_of().rows) == len(PromptSet.load("canvas").rows)
    assert "--seed is for --prompt" in failed(capsys, run_generate.main, "--seed", "5")


def test_words_that_an_embedded_model_has_never_seen_are_told(capsys):
    prompts = of_prompts(["A heart image in Neon style.", "two giraffes", "a dog"], 0)
    run_generate.tell_strange("sd14", prompts)
    assert not capsys.readouterr().err
    run_generate.tell_strange("canvas", prompts)
    assert (
        "words of 2 prompts (the first is 'two giraffes': two, giraffes)" in capsys.readouterr().err
    )


def test_the_help_tells_how_many_images_canvas_is():
    count = f"{len(PromptSet.load('canvas').rows):,} images"
    assert count in " ".join(run_generate.make_parser().format_help().split())


def test_several_prompt_sets_are_drawn_and_keep_their_rows_apart(tmp_path):
    a = written(tmp_path, "a.csv", "case_number,prompt,seed\n3,one,1\n7,two,2\n")
    b = written(tmp_path, "b.csv", "case_number,prompt,seed\n0,three,3\n3,four,4\n")
    both = prompts_of("--prompts", str(a), "--prompts", str(b), "--prompt", "five")
    assert [(row.case, row.prompt) for row in both.rows] == [
        (3, "one"),
        (7, "two"),
        (8, "three"),
        (11, "four"),
        (12, "five"),
    ]
    assert both.name == "a+b+prompt"
    alone = PromptSet.load(a)
    assert joined([alone]) == alone and joined([alone]).sha256 == alone.sha256
    with raises("'a' and 'a' are the same"):
        joined([alone, PromptSet.load(a)])
    with raises("prompt is empty"):
        of_prompts([" "], 0)


# ---- undo ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def erasure(make_pico_pipeline, tmp_path_factory):
    """A checkpoint on disk, a delta of it, and the checkpoint without the concept."""
    folder = tmp_path_factory.mktemp("erasure")
    make_pico_pipeline().save_pretrained(folder / "base")
    model = load_model(str(folder / "base"))
    old = {
        name: param.detach().clone()
        for name, param in model.parameters().items()
        if "attn2" in name
    }
    metadata = {
        "base_fingerprint": model.fingerprint, "base_id": str(folder / "base"), "method": "salun",
        "config": "{}",
        "concepts": json.dumps([canvas_concept("heart").to_dict()]), "created_with": "0.1.0",
    }  # fmt: skip
    delta = ErasedDelta.between(old, {name: value + 0.1 for name, value in old.items()}, metadata)
    delta.save(folder / "delta.safetensors")
    assert (
        run(
            run_export.main,
            ["--delta", str(folder / "delta.safetensors"), "--out", str(folder / "erased")],
        )
        == 0
    )
    return folder


def test_undo_makes_the_base_of_an_erased_checkpoint(erasure, tmp_path, capsys):
    flags = ["--delta", str(erasure / "delta.safetensors"), "--undo"]
    assert (
        run(
            run_export.main,
            [*flags, "--model", str(erasure / "erased"), "--out", str(tmp_path / "back")],
        )
        == 0
    )
    base, erased, back = (
        load_model(str(path)) for path in (erasure / "base", erasure / "erased", tmp_path / "back")
    )
    assert back.fingerprint == base.fingerprint != erased.fingerprint
    assert "put back" in capsys.readouterr().out and "put back" in (
        tmp_path / "back" / "README.md"
    ).read_text(encoding="utf-8")
    inverse = str(tmp_path / "inverse.safetensors")
    assert run(run_export.main, [*flags, "--format", "delta", "--out", inverse]) == 0
    assert ErasedDelta.load(inverse).apply(erased).fingerprint == base.fingerprint


def test_undo_says_what_it_needs(erasure, tmp_path, capsys):
    flags = [
        "--delta",
        str(erasure / "delta.safetensors"),
        "--undo",
        "--out",
        str(tmp_path / "out"),
    ]
    assert "name that one with --model" in failed(capsys, run_export.main, *flags)
    assert "--format lora does not go with --undo" in failed(
        capsys, run_export.main, *flags, "--format", "lora"
    )
    error = failed(capsys, run_export.main, *flags, "--model", str(erasure / "base"))
    assert "belongs to base" in error and "without heart" in error


def test_a_delta_is_shown_in_one_line(erasure):
    shown = repr(ErasedDelta.load(erasure / "delta.safetensors"))
    assert "\n" not in shown and len(shown) < 300 and "heart" in shown and "weights" in shown


# ---- consoles ------------------------------------------------------------------------------------


def test_progress_in_a_log_is_few_whole_lines(capfd, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with bar("images", "image", 5000) as shown:
        for _ in range(5000):
            shown.update()
    lines = capfd.readouterr().err
    assert "\r" not in lines and 1 <= len(lines.splitlines()) <= 3 and "5000/5000" in lines


@pytest.mark.parametrize(
    ("value", "shown"), [("1", False), ("true", False), ("0", True), ("", True)]
)
def test_tqdm_disable_is_honoured(value, shown, capfd, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", value)
    with bar("images", "image", 2) as made:
        made.update(2)
    assert bool(capfd.readouterr().err) == shown


def test_no_bar_is_made_but_by_that_function():
    for path in sorted(
        path for folder in ("erase", "eval") for path in (ROOT / folder).rglob("*.py")
    ):
        assert path.stem == "progress" or "tqdm(" not in path.read_text(encoding="utf-8"), path


def test_of_the_libraries_only_errors_are_heard():
    assert run(lambda _: None, []) == 0
    for name in ("diffusers.pipelines.any", "transformers.any", "huggingface_hub.any"):
        log = logging.getLogger(name)
        assert log.isEnabledFor(logging.ERROR) and not log.isEnabledFor(logging.WARNING)


def test_quiet_leaves_results_and_errors_alone_and_ends_with_the_command(capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)

    def main(argv):
        hush()
        logging.getLogger("erase").info("a note")
        bar("images", "image", 2).close()
        read_concepts(["Monet"], [], None, "some/model", [])
        print("the result")

    assert run(main, []) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("the result\n", "") and "TQDM_DISABLE" not in os.environ
    flags = ["--quiet", "--model", "m", "--concept", "Monet", "--propose"]
    assert run(run_erase.main, flags) == 0 and capsys.readouterr().err == ""


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp437", "latin-1"])
def test_no_code_page_makes_a_command_fall(encoding, monkeypatch):
    streams = {
        name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")
    }
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)

    def main(argv):
        print("UA % ↑ 100.0 ± 1.0: heart → mushroom, 猫 \udcff")
        raise ErasureError("no 猫 → dog")

    assert run(main, []) == 2
    for stream in streams.values():
        stream.flush()
    assert (
        "↑ 100.0 ± 1.0: heart → mushroom, 猫 \\udcff"
        in streams["stdout"].buffer.getvalue().decode()
    )
    assert "no 猫 → dog" in streams["stderr"].buffer.getvalue().decode()


def test_a_line_stands_there_before_the_libraries_are_loaded_and_texts_are_utf8_in_an_ascii_locale(
    tmp_path,
):
    concept = written(tmp_path, "c.yaml", "target: 猫\nanchor: 犬 → dog\n")
    config = written(tmp_path, "run.yaml", f"concepts: {concept}\nretain: []\nmodel: 模型\n")
    environment = {
        **ENVIRONMENT,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    }
    command = [
        sys.executable,
        "-m",
        "erase.scripts.run_erase",
        "--config",
        str(config),
        "--propose",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    assert done.stderr.decode().startswith("loading torch and diffusers ...\n")
    assert yaml.safe_load(done.stdout.decode())["anchor"] == "犬 → dog"


def test_an_option_that_there_is_not_is_said_before_the_libraries_are_loaded():
    command = [sys.executable, "-m", "erase.scripts.run_erase", "--train.stepz", "3"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: unknown option 'train.stepz'; did you mean 'train.steps'?\n"


@pytest.mark.parametrize(
    "path",
    sorted(p for d in ("prompts", "erase", "eval", "scripts") for p in (ROOT / d).rglob("*.py")),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_text_file_is_opened_with_its_encoding(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        named = {keyword.arg for keyword in node.keywords}
        if called.endswith((".read_text", ".write_text")):
            assert "encoding" in named, f"line {node.lineno}"
        if called == "open":
            mode = ast.unparse(node.args[1]) if len(node.args) > 1 else "'r'"
            assert "encoding" in named or "b" in mode, f"line {node.lineno}"


def test_every_command_is_installed():
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    for name, module in COMMANDS.items():
        assert f"{name} = {module.__name__}:cli" in text and callable(
            import_module(module.__name__).cli
        )


def test_a_training_in_a_log_is_few_whole_lines(make_pico_pipeline, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    make_pico_pipeline().save_pretrained(tmp_path / "base")
    capfd.readouterr()
    flags = (
        "--concept heart --anchor mushroom --latents.n_forget 2 --latents.n_retain 2 "
        "--latents.steps 1 --train.steps 2 --train.batch_size 2 --scope xattn_kv"
    ).split()
    flags += ["--retain", "a moon", "--model", str(tmp_path / "base")]
    assert run(run_erase.main, [*flags, "--out", str(tmp_path / "out")]) == 0
    shown = capfd.readouterr()
    assert (
        "\r" not in shown.err and "erasing: 100%" in shown.err and "heart -> mushroom" in shown.out
    )


def test_what_the_defaults_are_not_made_for_is_said():
    config, settings = EraseConfig(method="salun"), get_method("salun").config
    assert list(run_erase.hints(config, settings, 1)) == []
    (several,) = run_erase.hints(config, settings, 3)
    steps, latents = settings.train.steps, config.latents
    assert f"--train.steps {3 * steps} --latents.n_forget {3 * latents.n_forget} " in several
    batches = 3 * settings.mask.batches
    assert several.endswith(f" --mask.batches {batches} --mask.rule fisher-ratio")
    own = replace(settings, train=replace(settings.train, steps=400))
    assert list(run_erase.hints(config, own, 3)) == []  # the user chose
    (elsewhere,) = run_erase.hints(replace(config, model="sd14"), settings, 1)
    assert "not on sd14" in elsewhere and "erase-list recipes" in elsewhere
    # a closed form takes no steps
    (measured,) = run_erase.hints(EraseConfig(method="uce"), get_method("uce").config, 3)
    assert "--config canvas-uce" in measured
    own = replace(get_method("esd").config, guidance=2.0)
    assert list(run_erase.hints(EraseConfig(method="esd"), own, 1)) == []
    (unmasked,) = run_erase.hints(EraseConfig(method="esd"), own, 2)
    assert "--train.steps" in unmasked and "mask" not in unmasked


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("mace", ["latents.n_forget"]),
        ("sfd", ["train.steps"]),
        ("esd", ["train.steps", "latents.n_forget"]),
        ("advunlearn", ["train.steps", "latents.n_forget", "latents.n_retain"]),
    ],
)
def test_several_concepts_want_more_of_what_the_method_looks_at(name, wanted):
    config = EraseConfig(method=name)
    *_, several = run_erase.hints(config, get_method(name).config, 3)
    assert re.findall(r"--(\S+) ", several) == wanted
