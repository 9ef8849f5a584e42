"""Whose a run folder and its files are: what resuming refuses by name, what it lets pass, and what
a damaged file says."""

import json
import logging
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from erase.delta import ErasedDelta
from erase.latents import prepare
from erase.latents.config import LatentConfig
from erase.mask import SaliencyMask
from erase.methods.salun import SalUnConfig
from erase.models import load_model
from erase.prompts.canvas import canvas_concept
from erase.prompts.errors import ErasureError
from erase.run import EraseConfig, erase_concept
from erase.scripts import run_erase
from erase.scripts.cli import run
from erase.training.config import MaskConfig, TrainConfig
from erase.training.statistics import Statistics
from tests.run_fixtures import base as base

TRAIN = TrainConfig(steps=4, batch_size=4, lr=1e-3, checkpoint_every=1)
METHOD = SalUnConfig(mask=MaskConfig(batch_size=4), train=TRAIN)
OPTION = {"mask": "file", "saliency": "saliency"}
"""kind of a file -> the option of `mask` that names one"""


def masked(**change):
    """The method with other settings of its mask."""
    return replace(METHOD, mask=replace(METHOD.mask, **change))


@pytest.fixture(scope="module")
def config(base):
    return EraseConfig(
        model=str(base), latents=LatentConfig(n_forget=6, n_retain=8, steps=2, batch_size=4)
    )


@pytest.fixture(scope="module")
def made(config, tmp_path_factory):
    """Folders of `heart` and of `star`, each finished, and of `heart` stopped after two of four
    steps."""
    root = tmp_path_factory.mktemp("made")
    for name in ("heart", "star"):
        erase_concept(canvas_concept(name), config, METHOD, out=root / name)
    with pytest.MonkeyPatch.context() as patch:
        stop_before_step(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            erase_concept(canvas_concept("heart"), config, METHOD, out=root / "stopped")
    return root


def stop_before_step(monkeypatch, step):
    import erase.training.loop

    plain = erase.training.loop._Steps.take

    def stopping(self):
        if self.run.step == step:
            raise KeyboardInterrupt
        return plain(self)

    monkeypatch.setattr(erase.training.loop._Steps, "take", stopping)


@pytest.fixture
def stopped(made, tmp_path):
    return shutil.copytree(made / "stopped", tmp_path / "stopped")


@pytest.fixture
def finished(made, tmp_path):
    return shutil.copytree(made / "heart", tmp_path / "finished")


def again(folder, config, method=METHOD, concept="heart", **options):
    return erase_concept(canvas_concept(concept), config, method, out=folder, **options)


def files_of(folder):
    """Path -> content, but for the seconds and the memory that a run took, and its date."""
    files = {}
    for path in filter(Path.is_file, folder.rglob("*")):
        files[str(path.relative_to(folder))] = path.read_bytes()
        if path.name == "training.json":
            told = json.loads(path.read_text())
            del told["cost"], told["finished"]
            files[str(path.relative_to(folder))] = told
    return files


def edited(folder, change):
    """run.json after `change`, which gets its content with the JSON in it read."""
    content = json.loads((folder / "run.json").read_text())
    inner = json.loads(content["config"])
    change(content, inner)
    (folder / "run.json").write_text(json.dumps({**content, "config": json.dumps(inner)}))


# ---- resuming ------------------------------------------------------------------------------------


def test_a_resumed_run_leaves_every_file_as_an_uninterrupted_one_does(stopped, made, config):
    again(stopped, config)
    resumed, whole = files_of(stopped), files_of(made / "heart")
    assert resumed.keys() == whole.keys()
    assert not [name for name in whole if resumed[name] != whole[name]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, m: (replace(c, seed=7), m), "seed was 0 and is now 7"),
        (
            lambda c, m: (c, replace(m, mask=replace(m.mask, density=0.25))),
            "mask.density was 0.5 and is now 0.25",
        ),
        (
            lambda c, m: (c, replace(m, train=replace(m.train, lr=0.5))),
            "train.lr was 0.001 and is now 0.5",
        ),
        (
            lambda c, m: (c, replace(m, train=replace(m.train, ema=0.5))),
            "train.ema was not set and is now 0.5",
        ),
        (
            lambda c, m: (
                c,
                replace(m, train=replace(m.train, optimizer_args={"weight_decay": 0.1})),
            ),
            "train.optimizer_args.* now .*0.1",
        ),
        (
            lambda c, m: (replace(c, latents=replace(c.latents, guidance=4.0)), m),
            "latents.guidance was 3.0 and is now 4.0",
        ),
    ],
)
def test_resuming_names_the_setting_that_differs_before_the_base_is_loaded(
    stopped, config, change, message, monkeypatch
):
    before = files_of(stopped)
    monkeypatch.setattr("erase.run.load_model", None)
    with pytest.raises(ErasureError, match=f"stopped holds another run: {message}"):
        again(stopped, *change(config, METHOD))
    assert files_of(stopped) == before


def test_resuming_with_another_concept_or_anchor_names_it(stopped, config):
    with pytest.raises(
        ErasureError, match=r"another run: concepts was \['heart'\] and is now \['star'\]; give"
    ):
        again(stopped, config, concept="star")
    with pytest.raises(
        ErasureError, match="another run: anchor of heart was .* and is now 'moon'; give"
    ):
        erase_concept(canvas_concept("heart", anchor="moon"), config, METHOD, out=stopped)


def test_resuming_with_another_base_names_it(stopped, config, make_pico_pipeline, tmp_path):
    make_pico_pipeline(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ErasureError, match="another run: model was .*pico' and is now .*other'"):
        again(stopped, replace(config, model=str(tmp_path / "other")))
    other = load_model(str(tmp_path / "other"))
    with pytest.raises(ErasureError, match="another run: fingerprint of the base was .*, base was"):
        again(stopped, config, model=other)


@pytest.mark.parametrize(
    "change", [{"checkpoint_every": 3}, {"selective_recompute": True}, {"offload": True}], ids=str
)
def test_what_leaves_the_bits_as_they_are_is_no_reason_to_refuse(
    stopped, made, config, change, caplog
):
    delta = again(stopped, config, replace(METHOD, train=replace(TRAIN, **change)))
    assert delta.sha256 == ErasedDelta.load(made / "heart" / "delta.safetensors").sha256
    assert "rounding" not in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"attention": "sdpa"},
        {"gradient_checkpointing": True},
        {"channels_last": True},
        {"accumulation": 2},
    ],
    ids=str,
)
def test_what_changes_the_rounding_alone_is_said_and_no_reason_to_refuse(
    stopped, made, config, change, caplog
):
    delta = again(stopped, config, replace(METHOD, train=replace(TRAIN, **change)))
    (name,) = change
    assert f"train.{name} was" in caplog.text and "to rounding, not to the bit" in caplog.text
    whole = ErasedDelta.load(made / "heart" / "delta.safetensors")
    values = [load_model(config.model) for _ in range(2)]
    for model, found in zip(values, (delta, whole), strict=True):
        found.apply(model)
    pairs = [(p, values[1].parameters()[name]) for name, p in values[0].parameters().items()]
    # of steps of 1e-3 each in 40,000 weights: 0.8 in all
    assert sum(float((a - b).norm() ** 2) for a, b in pairs) ** 0.5 < 0.02


def test_a_slash_after_the_base_s_folder_is_the_same_base(stopped, made, config, monkeypatch):
    delta = again(stopped, replace(config, model=f"{config.model}/"))
    assert delta.sha256 == ErasedDelta.load(made / "heart" / "delta.safetensors").sha256


def test_an_update_of_torch_or_of_this_toolkit_is_said_and_no_reason_to_refuse(
    stopped, config, caplog
):
    def older(content, inner):
        content["created_with"] = "concept-erasure-toolkit 0.0.9, torch 2.5.0"
        del inner["method"]["retain_dropout"]  # an option that came later, left at its default

    edited(stopped, older)
    again(stopped, config)
    assert (
        "made with was 'concept-erasure-toolkit 0.0.9, torch 2.5.0'" in caplog.text
        and "retain_dropout" not in caplog.text
    )


def test_an_option_that_came_later_and_is_not_at_its_default_is_named(stopped, config):
    edited(stopped, lambda content, inner: inner["method"]["mask"].pop("density"))
    with pytest.raises(ErasureError, match="density was 0.04 and is now 0.25"):
        again(stopped, config, masked(density=0.25))


def test_another_number_of_threads_is_recorded_and_said_at_resume(stopped, config, caplog):
    threads = json.loads((stopped / "run.json").read_text())["threads"]
    assert threads == str(torch.get_num_threads())
    edited(stopped, lambda content, inner: content.update(threads="64"))
    again(stopped, config)
    assert f"threads was '64' and is now '{threads}'" in caplog.text and "rounding" in caplog.text
    # the next one goes on from here
    assert json.loads((stopped / "run.json").read_text())["threads"] == threads


def test_a_resumed_run_says_from_which_step(stopped, config, caplog):
    caplog.set_level(logging.INFO, "erase")
    again(stopped, config)
    assert "going on from step 2 of 4" in caplog.text


def test_a_finished_command_says_at_once_that_it_is_finished(finished, config, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "erase")

    def load(*args):
        assert "is finished" in caplog.text  # before the base is read
        return load_model(*args)

    monkeypatch.setattr("erase.run.load_model", load)
    monkeypatch.setattr("erase.run.Task", None)
    before = files_of(finished)
    again(finished, config)
    assert files_of(finished) == before


@pytest.mark.parametrize(
    "text",
    ["", "{", "5", "null", '"x"', "[[]]", '{"config": 5}', '{"config": "[", "concepts": "[]"}',
     '{"config": "{\\"a\\": 5}"}', '{"concepts": "5"}', '{"concepts": "[{}]"}', "[" * 100_000,
     "\udcff"],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_a_damaged_run_json_is_one_sentence_and_exit_code_2(text, finished, config, capsys):
    (finished / "run.json").write_bytes(text.encode(errors="surrogateescape"))
    assert run(run_erase.main, [
        "--model", config.model, "--concept", "heart", "--anchor", "star", "--retain", "a moon",
        "--out", str(finished),
    ]) == 2  # fmt: skip
    error = capsys.readouterr().err
    assert "run.json" in error or "holds another run" in error
    assert error.count("error: ") == 1 and "Traceback" not in error


def test_a_run_json_that_cannot_be_read_is_named(finished, config):
    (finished / "run.json").unlink()
    (finished / "run.json").mkdir()
    with pytest.raises(ErasureError, match=r"cannot read .*run\.json: Is a directory"):
        again(finished, config)


# ---- artifacts of another run --------------------------------------------------------------------


def test_a_folder_without_run_json_does_not_hand_out_another_concept_s_delta(
    finished, made, config
):
    (finished / "run.json").unlink()
    with pytest.raises(
        ErasureError,
        match=r"delta.safetensors is of another run: "
        r"concepts was \['heart'\] and is now \['star'\]",
    ):
        again(finished, config, concept="star")
    assert not (finished / "run.json").exists()  # it stays whose it was
    whole = ErasedDelta.load(made / "heart" / "delta.safetensors")
    assert again(finished, config).sha256 == whole.sha256  # its own is handed out


def test_a_delta_put_into_another_run_s_folder_is_refused(finished, made, config):
    shutil.copy(made / "star" / "delta.safetensors", finished / "delta.safetensors")
    with pytest.raises(ErasureError, match="delta.safetensors is of another run: concepts was"):
        again(finished, config)


def test_a_delta_that_does_not_say_whose_it_is_is_refused(finished, config):
    delta = ErasedDelta.load(finished / "delta.safetensors")
    replace(delta, metadata={"base_fingerprint": delta.metadata["base_fingerprint"]}).save(
        finished / "delta.safetensors"
    )
    with pytest.raises(ErasureError, match=r"delta\.safetensors does not say .*concepts"):
        again(finished, config)


@pytest.mark.parametrize(
    ("concept", "change", "message"),
    [
        ("star", {}, "concepts was"),
        ("heart", {"mask": replace(METHOD.mask, guidance=3.0)}, "loss of the saliency"),
        ("heart", {"scope": "xattn"}, "scope"),
        ("heart", {"anchor_latents": 0.0}, "digest of the forget latents"),
    ],
)
def test_a_left_saliency_of_another_run_is_not_used(
    concept, change, message, made, config, tmp_path
):
    shutil.copy(made / "heart" / "saliency.safetensors", tmp_path)
    with pytest.raises(ErasureError, match=rf"saliency\.safetensors is of another run: {message}"):
        again(tmp_path, config, replace(METHOD, **change), concept)


@pytest.mark.parametrize("kind", ["saliency", "mask"])
def test_a_file_of_another_concept_given_by_name_is_refused(kind, made, config):
    given = {OPTION[kind]: str(made / "star" / f"{kind}.safetensors")}
    with pytest.raises(
        ErasureError, match=rf"{kind}\.safetensors is of another run: concepts was \['star'\]"
    ):
        again(None, config, masked(**given))


def test_a_mask_that_does_not_say_its_concepts_may_be_of_any(made, config, tmp_path):
    mask = SaliencyMask.load(made / "star" / "mask.safetensors")
    replace(mask, metadata={"base_fingerprint": mask.metadata["base_fingerprint"]}).save(
        tmp_path / "m.safetensors"
    )
    assert again(None, config, masked(file=str(tmp_path / "m.safetensors"))).count


@pytest.mark.parametrize("kind", ["saliency", "mask"])
def test_a_file_of_another_base_given_by_name_is_refused(
    kind, made, config, make_pico_pipeline, tmp_path
):
    make_pico_pipeline(seed=1).save_pretrained(tmp_path / "other")
    given = {OPTION[kind]: str(made / "heart" / f"{kind}.safetensors")}
    with pytest.raises(
        ErasureError, match=rf"{kind}\.safetensors is of another run: fingerprint of the base was"
    ):
        again(None, replace(config, model=str(tmp_path / "other")), masked(**given))


@pytest.mark.parametrize(
    ("concept", "change", "message"),
    [("star", {}, "concepts was"), ("heart", {"alpha": 0.5}, "alpha was not set and is now 0.5"),
     ("heart", {"train": replace(TRAIN, lr=0.5)}, "train.lr was not set and is now 0.5")],
)  # fmt: skip
def test_a_left_training_state_of_another_run_is_not_gone_on_with(
    concept, change, message, made, config, tmp_path
):
    shutil.copy(made / "stopped" / "training.pt", tmp_path)
    method = replace(masked(file=str(made / "heart" / "mask.safetensors")), **change)
    if concept == "star":  # the same mask, so that only the state can tell
        mask = SaliencyMask.load(made / "heart" / "mask.safetensors")
        replace(mask, metadata={"base_fingerprint": mask.metadata["base_fingerprint"]}).save(
            tmp_path / "m.safetensors"
        )
        method = masked(file=str(tmp_path / "m.safetensors"))
    with pytest.raises(
        ErasureError, match=rf"training\.pt is of another run: (mask.file .*, )?{message}"
    ):
        again(tmp_path, config, method, concept)


def test_a_training_state_over_other_latents_is_not_gone_on_with(stopped, config):
    """As a folder of images whose content changed between the two starts would leave it."""
    for path in (stopped / "latents").glob("retain*"):
        path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "sample_points", moved(prepare.sample_points))
        with pytest.raises(
            ErasureError, match=r"training\.pt is of another run: digest of the retain latents"
        ):
            again(stopped, config)


def moved(sample):
    def sample_moved(*args, **options):
        latents, *others = sample(*args, **options)
        return latents + 0.01, *others

    return sample_moved


# ---- damage --------------------------------------------------------------------------------------


def flipped(path, tensor_bytes):
    """The lowest bit of one value's mantissa, somewhere in the file: it stays finite."""
    content = bytearray(path.read_bytes())
    place = bytes(content).index(tensor_bytes)
    content[place] ^= 1
    path.write_bytes(content)


def test_a_bit_that_flipped_in_a_training_state_is_noticed(stopped, config):
    state = torch.load(stopped / "training.pt", weights_only=True)
    name = next(iter(state["values"]))
    flipped(stopped / "training.pt", state["values"][name].detach().numpy().tobytes()[:64])
    with pytest.raises(
        ErasureError, match=r"training\.pt is damaged: it holds other values than were written"
    ):
        again(stopped, config)


@pytest.mark.parametrize("entry", ["values", "optimizer", "losses"])
def test_a_training_state_with_another_number_is_noticed(stopped, config, entry):
    state = torch.load(stopped / "training.pt", weights_only=True)
    if entry == "losses":
        state["losses"][0] += 1e-6
    elif entry == "values":
        next(iter(state["values"].values())).data += 1e-6
    else:
        state["optimizer"]["state"][0]["exp_avg"] += 1e-6
    torch.save(state, stopped / "training.pt")
    with pytest.raises(ErasureError, match=r"training\.pt is damaged"):
        again(stopped, config)


def test_a_bit_that_flipped_in_a_saliency_or_a_mask_is_noticed(made, tmp_path):
    saliency = Statistics.load(made / "heart" / "saliency.safetensors")
    mask = SaliencyMask.load(made / "heart" / "mask.safetensors")
    for kind, found, tensors in (
        (Statistics, saliency, saliency.values["forget.sum"]),
        (SaliencyMask, mask, mask.bits),
    ):
        path = tmp_path / f"{kind.__name__}.safetensors"
        found.save(path)
        largest = max(tensors.values(), key=lambda tensor: tensor.numel())
        flipped(path, largest.numpy().tobytes()[:64])
        with pytest.raises(ErasureError, match="is damaged: it holds other"):
            kind.load(path)


def test_a_saliency_with_other_metadata_than_were_written_is_noticed(made, tmp_path):
    saliency = Statistics.load(made / "heart" / "saliency.safetensors")
    saliency.save(tmp_path / "s.safetensors")
    content = (tmp_path / "s.safetensors").read_bytes()
    (tmp_path / "s.safetensors").write_bytes(content.replace(b"guidance 7.5", b"guidance 3.5"))
    with pytest.raises(ErasureError, match="is damaged"):
        Statistics.load(tmp_path / "s.safetensors")


@pytest.mark.parametrize("content", [b"", b"PK broken", b"x" * 4096])
def test_a_damaged_training_state_is_one_sentence(content, stopped, config):
    (stopped / "training.pt").write_bytes(content)
    with pytest.raises(
        ErasureError,
        match="cannot read the training state .*; delete it to start the training again",
    ) as refused:
        again(stopped, config)
    assert (
        "\n" not in str(refused.value)
        and "weights_only" not in str(refused.value)
        and len(str(refused.value)) < 400
    )


class Code:
    def __reduce__(self):
        return print, ("executed",)


def test_code_in_a_training_state_is_refused_in_one_sentence(stopped, config, capsys):
    torch.save({"values": Code()}, stopped / "training.pt")
    with pytest.raises(
        ErasureError, match="holds other things than tensors and numbers"
    ) as refused:
        again(stopped, config)
    assert "\n" not in str(refused.value) and "weights_only" not in str(refused.value)
    assert "executed" not in capsys.readouterr().out


def test_a_disk_that_is_full_when_the_training_state_is_written_is_one_sentence(
    stopped, made, config
):
    """A limit on the size of files ends a write as a full disk does, in torch's own writer."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = (stopped / "training.pt").read_bytes()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(
            ErasureError, match=r"cannot write .*training\.pt: .*free some space"
        ) as refused:
            again(stopped, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(refused.value)
    assert (stopped / "training.pt").read_bytes() == before and not list(stopped.glob(".*"))
    assert (
        again(stopped, config).sha256
        == ErasedDelta.load(made / "heart" / "delta.safetensors").sha256
    )
