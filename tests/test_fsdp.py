"""Training in shards (FSDP2), two processes on the CPU, started by torchrun: the steps of whole
models, to rounding."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from erase.mask import Saliency
from erase.parallel.fsdp import BF16, ON_CPUS
from tests.launching import PROGRAMS, environment
from tests.programs.fsdp_job import NEWER
from tests.programs.processes_job import STATISTICS
from tests.shards import (
    NO_SHARDS,
    SLOW,
    VARIANTS,
    apart,
    mask_of,
    train,
    with_a_lone_weight,
)

OLDER_TORCH = pytest.mark.skipif(
    not BF16,
    reason=f"FSDP of torch {torch.__version__} cannot do bf16 with norms in float32",
)
MARKS = {"bf16": [OLDER_TORCH]}
NAMES = [pytest.param(name, marks=MARKS.get(name, [])) for name in VARIANTS]
CASES = [
    pytest.param(name, kind, marks=MARKS.get(name, []))  # under this launch
    for name, (_, _, kinds) in VARIANTS.items()
    for kind in kinds
]


@pytest.fixture(scope="module")
def job(make_pico_pipeline, tmp_path_factory):
    """(folder, facts) of two processes that train with and without shards."""
    if not ON_CPUS:
        pytest.skip(NO_SHARDS)
    folder = tmp_path_factory.mktemp("fsdp")
    make_pico_pipeline().save_pretrained(folder / "base")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, str(PROGRAMS / "fsdp_job.py")]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, torch.load(folder / "facts.pt", weights_only=True)


@pytest.fixture
def model(make_pico_pipeline):
    return with_a_lone_weight(make_pico_pipeline())


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_with_whole_models_take_the_steps_of_one(job, model, name):
    config, density, _ = VARIANTS[name]
    alone, shared = train(model, config, density).values, job[1]["trained"][name, None]
    found = apart(alone, shared, model)
    print(f"{name}: {found:.1e}")
    assert found < (5e-2 if name == "bf16" else 1e-4)


@pytest.mark.parametrize("name, kind", CASES)
def test_shards_take_the_steps_of_whole_models(job, model, name, kind):
    trained, losses = job[1]["trained"], job[1]["losses"]
    whole, sharded = trained[name, None], trained[name, kind]
    assert whole.keys() == sharded.keys() and {value.shape for value in whole.values()}
    found = apart(whole, sharded, model)
    print(f"{name} {kind}: {found:.1e}")
    assert found < (5e-2 if name == "bf16" else 1e-4)
    rounding = 1e-2 if name == "bf16" else 1e-5
    assert losses[name, kind] == pytest.approx(losses[name, None], rel=rounding)


@pytest.mark.parametrize("name, kind", CASES)
def test_weights_outside_the_mask_and_the_base_are_bit_identical(job, model, name, kind):
    base, density = model.parameters(), VARIANTS[name][1]
    assert job[1]["as found"][name, kind]
    if density:
        mask = mask_of(model, density)
        for key, value in job[1]["trained"][name, kind].items():
            assert torch.equal(value[~mask[key]], base[key][~mask[key]]), key
    after = load_file(job[0] / "after" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, param in model.component("unet").named_parameters():
        assert torch.equal(after[name], param), name


def test_a_student_with_the_teacher_s_gathered_weights_would_be_seen(job, model):
    """The control: not told that shards were written, passes use what was gathered before."""
    trained = job[1]["trained"]
    assert apart(trained["sgd", None], job[1]["stale"], model) > 0.01  # measured: 0.09


def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(job):
    facts = job[1]
    assert facts["stopped"] == {None: True, "fsdp": True}
    whole = facts["trained"]["adam", "fsdp"]
    assert all(torch.equal(whole[name], facts["resumed"][name]) for name in whole)


def test_an_erasure_stopped_and_resumed_gives_the_delta_of_an_uninterrupted_one(job):
    whole, resumed = job[1]["erased"]
    assert job[1]["erasure stopped"] and whole == resumed


def test_a_training_state_is_the_same_file_sharded_or_not(job, model):
    plain, sharded = job[1]["states"]
    assert plain.keys() == sharded.keys()
    for name in ("values", "average"):
        assert all(plain[name][key].shape == value.shape for key, value in sharded[name].items())
        assert plain[name].keys() == sharded[name].keys()
    ours, theirs = sharded["optimizer"], plain["optimizer"]
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, of_value in ours["state"].items():
        assert {key: entry.shape for key, entry in of_value.items()} == {
            key: entry.shape for key, entry in theirs["state"][index].items()
        }


def test_a_run_changes_between_sharded_and_whole(job, model, tmp_path):
    """Begun whole, finished in shards; begun in shards by two, finished by one: to rounding."""
    folder, facts = job
    whole = facts["trained"]["adam", None]
    shutil.copy(folder / "handed-over.pt", tmp_path / "state.pt")
    handed_over = train(model, SLOW, 0.5, tmp_path / "state.pt").values
    found = apart(whole, facts["taken over"], model), apart(whole, handed_over, model)
    print("taken over {:.1e}, handed over {:.1e}".format(*found))
    assert max(found) < 1e-4


@pytest.mark.parametrize("statistic", STATISTICS)
def test_statistics_are_those_of_whole_models(job, statistic):
    """Of batches that do not come out even over two processes: the last one's partner counts for
    nothing."""
    whole, sharded = (job[1]["statistics", kind][statistic] for kind in (None, "fsdp"))
    total = sum(float(value.abs().sum()) for value in whole.values())
    missed = sum(float((whole[name] - sharded[name]).abs().sum()) for name in whole)
    print(f"{statistic}: {missed / total:.1e} of the sum")
    assert missed < 1e-5 * total
    masks = [
        Saliency({name: v.abs() for name, v in each.items()}).cut(0.5) for each in (whole, sharded)
    ]
    differing = sum(int((masks[0][name] != masks[1][name]).sum()) for name in whole)
    print(f"mask: {differing} of {masks[0].size} bits")
    assert differing < 1e-4 * masks[0].size


def test_each_process_holds_about_half(job):
    whole, shards = job[1]["bytes", None], job[1]["bytes", "fsdp"]
    for i, what in enumerate(("weights", "values, gradients, base, places", "moments")):
        print(what, [held[i] for held in whole], [held[i] for held in shards])
        assert all(held[i] < 0.51 * whole[0][i] for held in shards), what


@pytest.mark.parametrize("family", NEWER)
def test_every_family_s_denoiser_is_sharded(job, family):
    whole, shards = (job[1]["families", kind][family] for kind in (None, "fsdp"))
    moved = sum(float(value.square().sum()) for value in whole.values()) ** 0.5
    missed = sum(float((whole[name] - shards[name]).square().sum()) for name in whole) ** 0.5
    print(f"{family}: {missed / moved:.1e}")
    assert moved and missed < 1e-4 * moved


def test_odd_work_is_done_in_step_and_counted_once(job):
    assert job[1]["odd"] == [0, 1, 0]


def test_what_shards_cannot_do_is_refused(job):
    assert len(job[1]["refused"]) >= 7
    for name, message in job[1]["refused"].items():
        assert name in message and "several-gpus.yaml" in message
