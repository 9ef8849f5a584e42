"""Generation: what an image depends on, and what it does not."""

from __future__ import annotations

import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from erase.eval.generate import GenerateConfig, batches, generate
from erase.eval.generate_config import SCHEDULERS
from erase.eval.images import MANIFEST, SETTINGS, ImageSet, write_settings
from erase.models.pipelines import FROZEN
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import PromptRow, PromptSet
from tests.launching import environment, launch, start

OBJECTS = ("heart", "star", "moon", "house")
ROWS = tuple(
    PromptRow(case, f"a red {OBJECTS[case % 4]}", 10 + case, None, {"object": OBJECTS[case % 4]})
    for case in range(7)
)
PROMPTS = PromptSet("seven", ROWS)
FAST = GenerateConfig(scheduler="ddim", steps=2, batch_size=3)
MADE_BY = {"fingerprint": "0123"}


@pytest.fixture(scope="module")
def pipe(make_pico_pipeline):
    return make_pico_pipeline()


@pytest.fixture(scope="module")
def whole(pipe, tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """The set as one process makes it in one go."""
    return generate(pipe, PROMPTS, tmp_path_factory.mktemp("whole"), FAST, MADE_BY)


@pytest.fixture
def calls(pipe, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Batch sizes with which the UNet and the text encoder were called."""
    seen: dict[str, list[int]] = {"unet": [], "text_encoder": []}
    for name, sizes in seen.items():
        forward = getattr(pipe, name).forward

        def spy(sample, *args, forward=forward, sizes=sizes, **options):
            sizes.append(len(sample))
            return forward(sample, *args, **options)

        monkeypatch.setattr(getattr(pipe, name), "forward", spy)
    return seen


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pixels(images: ImageSet) -> dict[int, bytes]:
    return {row.case: images.image(row).tobytes() for row in images.rows}


def test_the_images_are_those_of_the_stock_pipeline(pipe, whole: ImageSet):
    """Row by row, `pipeline(prompt, generator=seed)` gives the same, up to one 8-bit level: batches
    of 1 round otherwise."""
    for row in whole.rows:
        generator = torch.Generator().manual_seed(row.seed)
        made = pipe(
            row.prompt,
            num_inference_steps=2,
            guidance_scale=5.0,
            generator=generator,
            output_type="np",
        ).images[0]
        expected = (made * 255).round().astype(int)
        assert np.abs(np.asarray(whole.image(row)).astype(int) - expected).max() <= 1


def test_the_manifest_says_how_each_image_was_made(whole: ImageSet):
    assert [(row.case, row.prompt, row.seed, row.guidance, row.labels) for row in whole.rows] == [
        (row.case, row.prompt, row.seed, 5.0, row.labels) for row in ROWS
    ]
    assert len({row.sha256 for row in whole.rows}) == 7
    wanted = {
        "images": 7,
        "prompt_set": "seven",
        "prompt_set_sha256": PROMPTS.sha256,
        "scheduler": "ddim",
        "steps": 2,
    }
    wanted |= {
        "guidance": 5.0,
        "resolution": 32,
        "batch_size": 3,
        "safety_checker": "off",
        "fingerprint": "0123",
    }
    assert wanted.items() <= whole.settings.items()


def test_the_same_settings_give_the_same_bytes(pipe, whole: ImageSet, tmp_path: Path):
    generate(pipe, PROMPTS, tmp_path, FAST, MADE_BY)
    assert files(tmp_path) == files(whole.folder)


def test_an_image_does_not_depend_on_the_rows_beside_it(pipe, whole: ImageSet, tmp_path: Path):
    """Every second row, in reverse: other neighbours, another place in the batch, another last
    batch; the same bits."""
    part = generate(pipe, PromptSet("part", ROWS[::-2]), tmp_path, FAST, MADE_BY)
    assert pixels(part) == {case: image for case, image in pixels(whole).items() if case % 2 == 0}


def test_every_batch_has_the_same_size_and_each_prompt_is_encoded_once(pipe, calls, tmp_path: Path):
    generate(pipe, PROMPTS, tmp_path, FAST, MADE_BY)
    assert calls["unet"] == [2 * 3] * 3 * FAST.steps  # twice, for classifier-free guidance
    assert calls["text_encoder"] == [1] * (4 + 1)  # and the empty prompt


def test_a_set_smaller_than_a_batch_is_not_filled_up(pipe, calls, tmp_path: Path):
    images = generate(pipe, PromptSet("two", ROWS[:2]), tmp_path, FAST, MADE_BY)
    assert calls["unet"] == [2 * 2] * FAST.steps
    assert images.settings["batch_size"] == 2


def test_a_finished_set_is_not_made_again(pipe, whole: ImageSet, calls):
    before = {path: path.stat().st_mtime_ns for path in whole.folder.glob("*.png")}
    assert generate(pipe, PROMPTS, whole.folder, FAST, MADE_BY) == whole
    assert calls == {"unet": [], "text_encoder": []}
    assert {path: path.stat().st_mtime_ns for path in whole.folder.glob("*.png")} == before


def test_what_is_missing_or_damaged_is_made_again_to_the_bit(
    pipe, whole: ImageSet, calls, tmp_path: Path
):
    generate(pipe, PROMPTS, tmp_path, FAST, MADE_BY)
    (tmp_path / "00001.png").unlink()
    (tmp_path / "00006.png").write_bytes((tmp_path / "00006.png").read_bytes()[:-1])
    (tmp_path / MANIFEST).unlink()
    kept = (tmp_path / "00000.png").stat().st_mtime_ns
    calls["unet"].clear()
    generate(pipe, PROMPTS, tmp_path, FAST, MADE_BY)
    assert files(tmp_path) == files(whole.folder)
    assert (tmp_path / "00000.png").stat().st_mtime_ns == kept
    assert len(calls["unet"]) == 2 * FAST.steps  # the batch between the two was not touched


def test_rows_of_another_guidance_go_into_batches_of_their_own(pipe, tmp_path: Path):
    rows = tuple(
        PromptRow(row.case, row.prompt, row.seed, 1.5 if row.case in (2, 5) else None)
        for row in ROWS
    )
    mixed = PromptSet("mixed", rows)
    assert [
        (batch.guidance, [row.case for row in batch.rows]) for batch in batches(mixed, FAST)
    ] == [
        (5.0, [0, 1, 3]),
        (5.0, [4, 6]),
        (1.5, [2, 5]),
    ]
    images = generate(pipe, mixed, tmp_path / "mixed", FAST, MADE_BY)
    assert [row.guidance for row in images.rows] == [5.0, 5.0, 1.5, 5.0, 5.0, 1.5, 5.0]
    low = GenerateConfig(scheduler="ddim", steps=2, batch_size=3, guidance=1.5)
    alone = pixels(generate(pipe, PROMPTS, tmp_path / "alone", low, MADE_BY))
    assert {case: pixels(images)[case] for case in (2, 5)} == {case: alone[case] for case in (2, 5)}


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_each_scheduler_starts_afresh_with_every_batch(pipe, tmp_path: Path, scheduler: str):
    """The second batch of a set equals the first batch of a set without the first."""
    config = GenerateConfig(scheduler=scheduler, steps=4, batch_size=2)
    both = pixels(generate(pipe, PromptSet("both", ROWS[:4]), tmp_path / "both", config, {}))
    second = pixels(generate(pipe, PromptSet("second", ROWS[2:4]), tmp_path / "second", config, {}))
    assert second == {case: both[case] for case in (2, 3)}


def test_schedulers_differ_and_a_longer_run_does_too(pipe, whole: ImageSet, tmp_path: Path):
    made = [
        generate(pipe, PROMPTS, tmp_path / name, GenerateConfig(name, 5), {})
        for name in sorted(SCHEDULERS)
    ]
    made.append(generate(pipe, PROMPTS, tmp_path / "long", GenerateConfig("ddim", 6), {}))
    assert len({images.tensor().numpy().tobytes() for images in made}) == len(SCHEDULERS) + 1


def test_mixed_precision_moves_pixels_a_little(pipe, whole: ImageSet, tmp_path: Path):
    half = generate(pipe, PROMPTS, tmp_path, replace(FAST, mixed_precision="bf16"), MADE_BY)
    difference = (half.tensor() - whole.tensor()).abs()
    assert 0 < difference.mean() < 0.02


def test_resolution(pipe, tmp_path: Path):
    images = generate(
        pipe, PromptSet("one", ROWS[:1]), tmp_path, GenerateConfig("ddim", 2, resolution=48), {}
    )
    assert images.image(images.rows[0]).size == (48, 48)


def test_the_pipeline_is_left_as_it_was_found(make_pico_pipeline, tmp_path: Path):
    pipe = make_pico_pipeline()
    scheduler, config, bar = pipe.scheduler, dict(pipe.config), dict(pipe._progress_bar_config)
    timesteps = scheduler.timesteps.clone()
    weights = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    generate(pipe, PromptSet("one", ROWS[:1]), tmp_path, GenerateConfig("dpm++", 2), {})
    assert pipe.scheduler is scheduler
    assert torch.equal(scheduler.timesteps, timesteps)
    assert dict(pipe.config) == config
    assert pipe._progress_bar_config == bar
    assert all(torch.equal(value, weights[name]) for name, value in pipe.unet.state_dict().items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"config": GenerateConfig("dpm++", 2, batch_size=3)},
            "made with scheduler 'ddim', not 'dpm\\+\\+'",
        ),
        ({"config": GenerateConfig("ddim", 3, batch_size=3)}, "made with steps 2, not 3"),
        (
            {"config": GenerateConfig("ddim", 2, 7.5, batch_size=3)},
            "made with guidance 5.0, not 7.5",
        ),
        ({"config": GenerateConfig("ddim", 2, batch_size=4)}, "made with batch_size 3, not 4"),
        ({"provenance": {"fingerprint": "4567"}}, "of another erasure or base; "),
        ({"provenance": {"fingerprint": "0123", "delta": "x"}}, "of another erasure or base; "),
        ({"provenance": {}}, "of another erasure or base; "),
        (
            {"prompts": PromptSet("seven", (*ROWS[:6], PromptRow(6, "a blue star", 16)))},
            "of other prompts or seeds; ",
        ),
    ],
)
def test_a_folder_of_other_images_is_refused_and_left_alone(pipe, whole: ImageSet, change, says):
    before = files(whole.folder)
    job = {"prompts": PROMPTS, "out": whole.folder, "config": FAST, "provenance": MADE_BY} | change
    with pytest.raises(ErasureError, match=f"holds images {says}.*give another --out"):
        generate(pipe, **job)
    assert files(whole.folder) == before


def another_vae(pipe, make) -> None:
    pipe.vae = make(7).vae


def another_prediction(pipe, _) -> None:
    pipe.scheduler.register_to_config(prediction_type="v_prediction")


def another_scale(pipe, _) -> None:
    pipe.vae.register_to_config(scaling_factor=0.5)


@pytest.mark.parametrize(
    "change, says",
    [
        (another_vae, "vae '"),
        (another_scale, "vae '"),
        (another_prediction, "prediction_type 'epsilon', not 'v_prediction'"),
    ],
)
def test_images_of_another_frozen_part_are_refused(
    make_pico_pipeline, whole: ImageSet, change, says
):
    other = make_pico_pipeline()
    change(other, make_pico_pipeline)
    with pytest.raises(ErasureError, match=f"made with {says}.*give another --out"):
        generate(other, PROMPTS, whole.folder, FAST, MADE_BY)


def test_a_folder_that_does_not_tell_of_frozen_parts_is_taken_and_stays_so(
    pipe, whole: ImageSet, calls, tmp_path: Path
):
    older = shutil.copytree(whole.folder, tmp_path / "older")
    told = {key: value for key, value in whole.settings.items() if key not in FROZEN}
    write_settings(older, told)
    assert generate(pipe, PROMPTS, older, FAST, MADE_BY).settings == told
    assert calls["unet"] == [] and len(told) < len(whole.settings)


def test_the_command_may_change(pipe, tmp_path: Path):
    one = PromptSet("one", ROWS[:1])
    generate(pipe, one, tmp_path, FAST, {"command": "old"})
    assert generate(pipe, one, tmp_path, FAST, {"command": "new"}).settings["command"] == "new"


def test_images_of_a_set_that_is_marked_later_are_kept_and_get_the_mark(pipe, tmp_path: Path):
    one = PromptSet("one", ROWS[:1])
    assert "sensitive" not in generate(pipe, one, tmp_path, FAST, {}).settings
    pictures = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    marked = generate(pipe, replace(one, sensitive=True), tmp_path, FAST, {})
    assert marked.settings["sensitive"] is True and len(pictures) == 1
    assert {path: path.stat().st_mtime_ns for path in pictures} == pictures


def test_foreign_images_are_not_overwritten(pipe, tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "00000.png")
    before = files(tmp_path)
    with pytest.raises(ErasureError, match="holds images but no settings.json"):
        generate(pipe, PROMPTS, tmp_path, FAST, {})
    assert files(tmp_path) == before


def test_provenance_cannot_contradict_the_settings(pipe, tmp_path: Path):
    with pytest.raises(ErasureError, match="may not set 'steps'"):
        generate(pipe, PROMPTS, tmp_path, FAST, {"steps": "9"})


def test_an_image_that_is_not_finite_is_named_and_not_written(make_pico_pipeline, tmp_path: Path):
    pipe = make_pico_pipeline()
    embedding = pipe.text_encoder.get_input_embeddings().weight.data
    embedding[pipe.tokenizer("moon").input_ids[1]] = float("nan")
    with pytest.raises(ErasureError, match="prompt 'a red moon', seed 12 .case 2., is not finite"):
        generate(pipe, PROMPTS, tmp_path, FAST, {})
    assert set(files(tmp_path)) == {SETTINGS}


def test_a_full_disk_is_an_error_that_says_so(
    pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(
        ErasureError, match="cannot write .*png: No space left on device; free some space"
    ):
        generate(pipe, PROMPTS, tmp_path, FAST, {})
    assert set(files(tmp_path)) == {SETTINGS}


def test_a_pipeline_of_no_known_family_is_refused(tmp_path: Path):
    class Other:
        def __call__(self, prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds): ...

    with pytest.raises(ErasureError, match="the pipeline is a Other, which is not supported"):
        generate(Other(), PROMPTS, tmp_path, FAST, {})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mixed_precision": "bf61"}, "unknown mixed precision 'bf61'; did you mean 'bf16'"),
        ({"scheduler": "dpm"}, "unknown scheduler 'dpm'; did you mean 'dpm\\+\\+'"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"resolution": 100}, "resolution is 100 pixels"),
        ({"guidance": float("nan")}, "guidance is nan"),
    ],
)
def test_bad_settings_are_named(options, says):
    with pytest.raises(ErasureError, match=says):
        GenerateConfig(**options)


def test_more_steps_than_the_model_has_timesteps_are_refused_before_anything_is_written(
    pipe, tmp_path: Path
):
    with pytest.raises(ErasureError, match="steps is 1001; it must be between 1 and 1000"):
        generate(pipe, PROMPTS, tmp_path / "out", GenerateConfig(steps=1001), {})
    assert not (tmp_path / "out").exists()


# ---- in processes of their own -------------------------------------------------------------------

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from diffusers import StableDiffusionPipeline
from PIL import Image
from erase.eval.generate import GenerateConfig, generate
from erase.prompts.prompt_sets import PromptRow, PromptSet

def save_or_die(image, path, save=Image.Image.save, **options):
    if "00004" in path.name:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(image, path, **options)

folder, out, end = sys.argv[1:]
if end == "dies":
    Image.Image.save = save_or_die
rows = tuple(PromptRow(**row) for row in json.loads((Path(folder) / "rows.json").read_text()))
pipe = StableDiffusionPipeline.from_pretrained(folder)
config = GenerateConfig(scheduler="ddim", steps=2, batch_size=3)
generate(pipe, PromptSet("seven", rows), Path(out), config, {"fingerprint": "0123"})
"""


@pytest.fixture(scope="module")
def job(pipe, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A program that makes the seven images, with the same model, and its folder."""
    folder = tmp_path_factory.mktemp("job")
    pipe.save_pretrained(folder)
    (folder / "rows.json").write_text(json.dumps([vars(row) for row in ROWS]))
    (folder / "job.py").write_text(SCRIPT)
    return [folder / "job.py", folder]


def test_two_processes_make_the_same_bytes_as_one(whole: ImageSet, job, tmp_path: Path):
    threads = torch.get_num_threads()
    told = launch(*job, "out", "ends", folder=tmp_path, processes=2, threads=threads)
    assert files(tmp_path / "out") == files(whole.folder)
    bars = set(re.findall(r"images.*?(\d+/\d+) ", told))
    # the main process's bar and share: batches 0 and 2; a fast step is not drawn
    assert {"0/4", "4/4"} <= bars <= {"0/4", "3/4", "4/4"}


def test_a_run_killed_while_it_writes_is_finished_by_the_next(
    pipe, whole: ImageSet, calls, job, tmp_path: Path
):
    out = tmp_path / "out"
    own = environment(torch.get_num_threads())
    died = start(*job, out, "dies", folder=tmp_path, environment=own)
    died.join()
    assert died.exitcode == -signal.SIGKILL
    made = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert {path.name for path in made} >= {"00000.png", "00001.png", "00002.png"}
    assert not (out / "00004.png").exists()
    with pytest.raises(ErasureError, match="is not finished"):
        ImageSet.open(out)
    generate(pipe, PROMPTS, out, FAST, MADE_BY)
    assert len(calls["unet"]) == 2 * FAST.steps  # the first batch was kept
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert files(whole.folder).items() <= files(out).items()
