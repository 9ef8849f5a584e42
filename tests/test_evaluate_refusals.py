"""What an evaluation refuses before it makes images: judges that cannot be loaded, prompts that
cannot be judged, damaged records."""

import pytest

from erase.eval.canvas.judges import clip_folder
from erase.eval.run import Evidence
from erase.prompts.errors import ErasureError
from erase.scripts import run_evaluate
from erase.scripts.cli import run
from tests.run_fixtures import base as base
from tests.run_fixtures import erased as erased


@pytest.mark.parametrize("text", ['{"losses": [1,', '{"loss": [1]}', "[]", '{"losses": ["low"]}'])
def test_a_damaged_record_of_training_is_named(text, tmp_path):
    (tmp_path / "training.json").write_text(text)
    with pytest.raises(ErasureError, match="training.json is damaged"):
        Evidence.of(tmp_path)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--classifier.judge", "canvass"], "unknown judge 'canvass'; did you mean 'canvas'"),
        (
            ["--evaluators", "clip"],
            "evaluators is a list, also where it holds one thing: --evaluators '[clip]'",
        ),
        (
            ["--evaluators", "[clip]", "--clip.model", "ViT-B-23"],
            "unknown CLIP model 'ViT-B-23'; did you mean 'ViT-B-32'",
        ),
        (["--evaluators", "[clip]", "--clip.model", "ViT-B-32"], "'ViT-B-32' needs weights"),
        (
            ["--evaluators", "[clip]", "--attack.attacks=[p4d]"],
            "--attack.attacks is given, and attack does not run (clip); name it in --evaluators",
        ),
        (
            ["--evaluators", "[attack]", "--attack.p4d.steps", "3"],
            "--attack.p4d.steps is given, and p4d does not run (pseudo_token); name it in",
        ),
        (
            ["--suite", "quick", "--seeds", "5"],
            "--seeds is of canvas's own prompts, and others are asked",
        ),
    ],
)
def test_a_judge_or_an_option_that_cannot_serve_is_refused_before_images_are_made(
    flags, message, erased, base, tmp_path, capsys
):
    out = tmp_path / "report"
    given = [
        "--delta",
        str(erased / "delta.safetensors"),
        "--generate.steps",
        "1",
        "--out",
        str(out),
        *flags,
    ]
    assert run(run_evaluate.main, given) == 2
    assert message in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    "rows, flags, message",
    [
        ("prompt,seed\na heart,1\n", [], "no labels to judge them by"),
        (
            "prompt,seed,object,colour\na heart,1,heart,red\na star,1,star,\n",
            [],
            "has no label 'colour'",
        ),
        ("prompt,seed,object,colour\na heart,1,hart,red\n", [], "did you mean 'heart'"),
        ("prompt,seed,object,colour\na star,1,star,red\n", [], "no image is labelled 'heart'"),
        (
            "prompt,seed,object\na heart,1,heart\na star,1,star\n",
            ["--evaluators", "[clip]", "--clip.model", str(clip_folder())],
            "lacks CLIP CRA",
        ),
    ],
)
def test_prompts_that_cannot_be_judged_are_refused_before_images_are_made(
    rows, flags, message, erased, tmp_path, capsys
):
    (tmp_path / "set.csv").write_text(rows)
    given = [
        "--delta",
        str(erased / "delta.safetensors"),
        "--prompts",
        str(tmp_path / "set.csv"),
    ]
    given += ["--generate.steps", "1", "--out", str(tmp_path / "report")]
    assert run(run_evaluate.main, [*given, *(flags or ["--evaluators", "[classifier]"])]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "report").exists()
