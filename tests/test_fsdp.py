"""Training in shards (FSDP2), two processes on the CPU: the steps of the same two processes with whole models, to rounding."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch import nn

from erase.delta import ErasedDelta
from erase.mask import Saliency, SaliencyMask
from erase.models import load_model, wrap
from erase.models.scopes import select
from erase.models.sd import StableDiffusion
from erase.parallel import fsdp
from erase.parallel.fsdp import BF16, ON_CPUS, check_sharded
from erase.parallel.launch import FSDP, UNFIT, FullShard, full_shard
from erase.parallel.layout import ActiveWeights
from erase.parallel.processes import processes
from erase.prompts.errors import ErasureError
from erase.scripts import run_erase
from erase.scripts.cli import run
from erase.training.config import TrainConfig
from erase.training.loop import fit, make_accelerator
from erase.training.optimizers import make_optimizer
from erase.training.trainable import Trainable

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "scripts" / "launch"
LAUNCHES = ("fsdp", "fsdp-zero2")
NEWER = ("sdxl", "sd3")
"""families with other denoisers than the pico model's"""
SGD = TrainConfig(steps=3, batch_size=4, lr=0.05, optimizer="SGD", optimizer_args={"momentum": 0.9, "weight_decay": 0.1})
ADAM = replace(
    SGD, steps=4, lr=1e-3, optimizer="AdamW", optimizer_args={"weight_decay": 0.1}, ema=0.9, max_grad_norm=0.05, accumulation=2,
    schedule="linear", checkpoint_every=2,
)  # fmt: skip
VARIANTS = {
    "sgd": (SGD, 0.5, LAUNCHES),
    "sgd-whole": (SGD, None, LAUNCHES[:1]),
    "adam": (ADAM, 0.5, LAUNCHES),
    "adam-whole": (ADAM, None, LAUNCHES[1:]),
    "checkpointing": (replace(SGD, gradient_checkpointing=True), 0.5, LAUNCHES[:1]),
    "selective-recompute": (replace(SGD, selective_recompute=True), 0.5, LAUNCHES[:1]),
    "bf16": (replace(SGD, mixed_precision="bf16"), 0.5, LAUNCHES),
    "offload": (replace(SGD, offload=True, shard_optimizer=True), 0.5, LAUNCHES[:1]),
}
"""name -> settings, density of the mask (None: no mask), launches that are compared with none"""
POSSIBLE = {name: variant for name, variant in VARIANTS.items() if BF16 or name != "bf16"}
NO_SHARDS = f"FSDP of torch {torch.__version__} cannot shard on a CPU"
OLDER_TORCH = pytest.mark.skipif(not BF16, reason=f"FSDP of torch {torch.__version__} cannot do bf16 with norms in float32")
CANVAS = ["--concept", "heart", "--latents.n_forget", "10", "--latents.n_retain", "7", "--latents.steps", "4"]
CANVAS += ["--latents.batch_size", "4", "--latents.trajectory", "2", "--saliency_batch_size", "3", "--train.steps", "3"]
CANVAS += ["--train.batch_size", "4", "--train.optimizer", "SGD", "--train.lr", "0.01", "--train.schedule", "constant"]

JOB = """
    import shutil, sys
    from pathlib import Path
    import torch
    sys.path.insert(0, {tests!r})
    from conftest import build_pico_pipeline
    import test_fsdp as ours
    from families import FAMILIES
    from test_processes import saliency_of
    from erase.parallel.fsdp import Shards
    from erase.parallel.processes import in_shares, processes

    folder, main = Path.cwd(), processes().is_main_process
    facts = {{"trained": {{}}, "as found": {{}}, "losses": {{}}}}
    model = ours.with_a_lone_weight(build_pico_pipeline())
    launches = {{kind: ours.environment_of(kind) for kind in ours.LAUNCHES}}

    for name, (config, density, kinds) in ours.POSSIBLE.items():
        for kind in (None, *kinds):
            with ours.launched(launches.get(kind)), ours.as_found(model) as same:
                fitted = ours.train(model, config, density)
            facts["trained"][name, kind] = {{key: value.clone() for key, value in fitted.values.items()}}
            facts["losses"][name, kind] = fitted.losses
            facts["as found"][name, kind] = same["same"]

    kept, Shards.invalidate_gathered = Shards.invalidate_gathered, lambda self: None
    with ours.launched(launches["fsdp-zero2"]):
        facts["stale"] = dict(ours.train(model, ours.SGD, 0.5).values)
    Shards.invalidate_gathered = kept

    for kind in (None, "fsdp"):  # stopped in the fourth step, with a state of the second
        with ours.launched(launches.get(kind)):
            path = Path(f"{{kind}}.pt")
            try:
                ours.train(model, ours.ADAM, 0.5, path, stop=True)
            except KeyboardInterrupt:
                facts["stopped", kind] = path.exists()
    if main:
        shutil.copy("fsdp.pt", "handed-over.pt")
        facts["states"] = [torch.load(f"{{kind}}.pt", weights_only=True) for kind in (None, "fsdp")]
    with ours.launched(launches["fsdp"]):
        facts["resumed"] = dict(ours.train(model, ours.ADAM, 0.5, Path("fsdp.pt")).values)
        facts["taken over"] = dict(ours.train(model, ours.ADAM, 0.5, Path("None.pt")).values)

    for kind in (None, "fsdp"):
        with ours.launched(launches.get(kind)):
            facts["saliency", kind] = saliency_of("base").values
            held = ours.bytes_held(model)
            facts["bytes", kind] = in_shares(2, 1, lambda _: held, "bytes", "process")
            facts["families", kind] = {{name: ours.one_step(FAMILIES[name]()) for name in ours.NEWER}}
    with ours.launched(launches["fsdp"]):
        facts["refused"] = [ours.refusal(model, config) for config in ours.UNFIT_CONFIGS]
        facts["refused"].append(ours.refusal(model, ours.SGD, "text_encoder"))
        facts["odd"] = in_shares(3, 1, lambda rows: processes().process_index, "odd", "row", pad=True)
    if main:
        model.pipeline().save_pretrained("after")
        torch.save(facts, "facts.pt")
"""


class Gain(nn.Module):
    """One weight: fewer rows than there are processes."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.gain


def with_a_lone_weight(pipeline):
    """The model of a pico pipeline, with a parameter of which one of two processes has nothing."""
    pipeline.unet.mid_block.resnets[0].nonlinearity = nn.Sequential(Gain(), nn.SiLU())
    return StableDiffusion(pipeline)


UNFIT_CONFIGS = [
    replace(SGD, optimizer="Adafactor", optimizer_args={}),
    replace(SGD, optimizer="AdamW8bit", optimizer_args={}),
    replace(SGD, channels_last=True),
    replace(SGD, compile=True),
    replace(SGD, mixed_precision="fp16"),
    *([] if BF16 else [VARIANTS["bf16"][0]]),
]


def refusal(model, config, scope="full"):
    with pytest.raises(ErasureError) as error:
        check_sharded(config)
        fit(model, select(model.parameters(), scope), *task(model)[1:], config)
    return str(error.value)


def one_step(pipeline):
    """What a step of plain SGD changes of a family's denoiser: minus its gradient."""
    model = wrap(pipeline)
    params, cond, t = select(model.parameters(), "full"), model.encode(["a red heart"]), torch.tensor([300])
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(processes().process_index))

    def loss(batch, frozen):
        return model.predict(x, t, cond).square().mean()

    config = TrainConfig(steps=1, lr=1.0, optimizer="SGD")
    fitted = fit(model, params, lambda step, part: None, loss, config)
    return {name: value - params[name].detach() for name, value in fitted.values.items()}


def environment_of(kind):
    """What `accelerate launch` makes of a shipped config, by its own parser."""
    args = launch_command_parser().parse_args(["--config_file", str(LAUNCH / f"{kind}.yaml"), "script.py"])
    args, *_ = _validate_launch_command(args)
    found = prepare_multi_gpu_env(args)
    return {name: value for name, value in found.items() if name == FSDP or name.startswith("FSDP_")}


@contextmanager
def launched(environment):
    """As under a launch with these variables."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environment or {}).items():
            patch.setenv(name, value)
        yield


def everything(model):
    """What training might leave changed."""
    pipeline, unet = model.pipeline(), model.component("unet")
    weights = {name: (p.detach().clone(), p.data_ptr(), p.requires_grad, p.grad) for name, p in model.parameters().items()}
    kinds = {name: type(one) for name, one in unet.attn_processors.items()}
    return weights, (id(unet), type(unet), dict(pipeline.config), kinds, unet.training, unet.is_gradient_checkpointing)


@contextmanager
def as_found(model):
    weights, rest = everything(model)
    facts = {}
    yield facts
    now, rest_now = everything(model)
    same = all(torch.equal(now[name][0], was[0]) and now[name][1:] == was[1:] for name, was in weights.items())
    facts["same"] = same and rest == rest_now


def task(model):
    """Parameters, this process's rows of each part, and a loss that moves every weight away from the frozen base's predictions."""
    params = select(model.parameters(), "full")
    cond, t, state = model.encode(["a red heart", "a blue star"] * 2), torch.tensor([10, 300, 600, 990]), processes()

    def batches(step, part):
        x = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(step))[part]
        return [tensor.chunk(state.num_processes)[state.process_index] for tensor in (x, torch.arange(4))]

    def loss(batch, frozen):
        x, rows = batch
        with torch.no_grad(), frozen():
            base = model.predict(x, t[rows], cond[rows])
        return (model.predict(x, t[rows], cond[rows]) - base - 0.5).square().mean()

    return params, batches, loss


def train(model, config, density, checkpoint=None, stop=False):
    params, batches, loss = task(model)

    def stopping(step, part):
        if stop and step == 3:
            raise KeyboardInterrupt
        return batches(step, part)

    return fit(model, params, stopping, loss, config, density and mask_of(model, density), checkpoint=checkpoint)


def mask_of(model, density):
    params = select(model.parameters(), "full")
    return SaliencyMask.random(params, density, 0, {"base_fingerprint": model.fingerprint})


def bytes_held(model):
    """Bytes of weights, of what is trained, and of the optimizer's state, in this process after one step."""
    from erase.training.running import running

    params, batches, loss = task(model)
    with running(model, params, SGD) as active:
        trainable = Trainable(params, mask_of(model, 0.5), active)
        loss(batches(0, 0), trainable.frozen).backward()
        values = list(trainable.values.values())
        optimizer = make_optimizer(values, "Adam", 1e-3, {}, fuse=True)
        optimizer.step()
        moments = [entry for of_value in optimizer.state.values() for entry in of_value.values() if entry.dim()]
        weights = [active.layout.local(param) for param in active.params.values()]
        mine = [*values, *(value.grad for value in values), *trainable._base.values(), *trainable._where.values()]
        held = [sum(tensor.untyped_storage().nbytes() for tensor in group) for group in (weights, mine, moments)]
        trainable.close()
    return held


@pytest.fixture(scope="module")
def job(make_pico_pipeline, tmp_path_factory):
    """(folder, facts) of two processes that train with and without shards."""
    if not ON_CPUS:
        pytest.skip(NO_SHARDS)
    folder = tmp_path_factory.mktemp("fsdp")
    make_pico_pipeline().save_pretrained(folder / "base")
    (folder / "job.py").write_text(textwrap.dedent(JOB.format(tests=str(ROOT / "tests"))))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([sys.executable, *launcher, "job.py"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, torch.load(folder / "facts.pt", weights_only=True)


@pytest.fixture
def model(make_pico_pipeline):
    return with_a_lone_weight(make_pico_pipeline())


def apart(one, other, model):
    """How far two trainings lie apart, as a fraction of how far the first one went."""
    base = {name: param.detach() for name, param in model.parameters().items()}
    moved = sum(float((one[name] - base[name]).square().sum()) for name in one) ** 0.5
    assert moved > 0
    return sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5 / moved


CASES = [
    pytest.param(name, kind, marks=[OLDER_TORCH] if name == "bf16" else [])
    for name, (_, _, kinds) in VARIANTS.items()
    for kind in kinds
]


@pytest.mark.parametrize("name, kind", CASES)
def test_shards_take_the_steps_of_whole_models(job, model, name, kind):
    trained, losses = job[1]["trained"], job[1]["losses"]
    whole, sharded = trained[name, None], trained[name, kind]
    assert whole.keys() == sharded.keys() and {value.shape for value in whole.values()}
    found = apart(whole, sharded, model)
    print(f"{name} {kind}: {found:.1e}")
    assert found < (5e-2 if name == "bf16" else 1e-4)
    assert losses[name, kind] == pytest.approx(losses[name, None], rel=1e-2 if name == "bf16" else 1e-5)


@pytest.mark.parametrize("name, kind", CASES)
def test_weights_outside_the_mask_and_the_base_are_bit_identical(job, model, name, kind):
    base, density = model.parameters(), VARIANTS[name][1]
    assert job[1]["as found"][name, kind]
    if density:
        mask = mask_of(model, density)
        for key, value in job[1]["trained"][name, kind].items():
            assert torch.equal(value[~mask[key]], base[key][~mask[key]]), key
    after = load_weights(job[0] / "after")
    assert all(torch.equal(after[name.removeprefix("unet.")], p) for name, p in base.items() if name.startswith("unet."))


def load_weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_a_student_with_the_teacher_s_gathered_weights_would_be_seen(job, model):
    """The control: without the word that shards were written, passes go on with what was gathered before."""
    trained = job[1]["trained"]
    assert apart(trained["sgd", None], job[1]["stale"], model) > 0.01  # measured: 0.08


def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(job):
    facts = job[1]
    assert facts["stopped", "fsdp"] and facts["stopped", None]
    whole = facts["trained"]["adam", "fsdp"]
    assert all(torch.equal(whole[name], facts["resumed"][name]) for name in whole)


def test_a_training_state_is_the_same_file_sharded_or_not(job, model):
    plain, sharded = job[1]["states"]
    assert plain.keys() == sharded.keys()
    for name in ("values", "average"):
        assert all(plain[name][key].shape == value.shape for key, value in sharded[name].items())
        assert plain[name].keys() == sharded[name].keys()
    ours, theirs = sharded["optimizer"], plain["optimizer"]
    assert ours["param_groups"] == theirs["param_groups"] and ours["state"].keys() == theirs["state"].keys()
    for index, of_value in ours["state"].items():
        assert {key: entry.shape for key, entry in of_value.items()} == {
            key: entry.shape for key, entry in theirs["state"][index].items()
        }


def test_a_run_changes_between_sharded_and_whole(job, model, tmp_path):
    """Begun whole and finished in shards, and begun in shards by two processes and finished by one: to rounding."""
    folder, facts = job
    whole = facts["trained"]["adam", None]
    shutil.copy(folder / "handed-over.pt", tmp_path / "state.pt")
    handed_over = train(model, ADAM, 0.5, tmp_path / "state.pt").values
    found = apart(whole, facts["taken over"], model), apart(whole, handed_over, model)
    print("taken over {:.1e}, handed over {:.1e}".format(*found))
    assert max(found) < 1e-4


def test_saliency_is_that_of_whole_models(job):
    """Of three batches by two processes: the last one's partner counts for nothing."""
    plain, sharded = job[1]["saliency", None], job[1]["saliency", "fsdp"]
    total = sum(float(value.sum()) for value in plain.values())
    missed = sum(float((plain[name] - sharded[name]).abs().sum()) for name in plain)
    print(f"saliency: {missed / total:.1e} of the sum")
    assert missed < 1e-6 * total
    masks = [Saliency(values).cut(0.5) for values in (plain, sharded)]
    differing = sum(int((masks[0][name] != masks[1][name]).sum()) for name in plain)
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
    missed = sum(float((value - shards[name]).square().sum()) for name, value in whole.items()) ** 0.5
    print(f"{family}: {missed / moved:.1e}")
    assert moved and missed < 1e-4 * moved


def test_odd_work_is_done_in_step_and_counted_once(job):
    assert job[1]["odd"] == [0, 1, 0]


def test_what_shards_cannot_do_is_refused(job):
    older = () if BF16 else ("beside matrices in bf16; take torch 2.15 or newer",)
    names = ("Adafactor", "AdamW8bit", "channels_last", "compile", "fp16", *older, "text_encoder")
    for message, name in zip(job[1]["refused"], names, strict=True):
        assert name in message and "several-gpus.yaml" in message


@pytest.mark.parametrize("precision, way_out", [("bf16", "take torch 2.15 or newer, mixed_precision no"), ("fp16", "use no, or")])
def test_half_precision_in_shards_under_an_older_torch_is_refused_in_a_sentence(monkeypatch, precision, way_out):
    monkeypatch.setattr(fsdp, "sharding", lambda: FullShard(reshard_after_forward=True))
    monkeypatch.setattr(fsdp, "ON_CPUS", True)
    monkeypatch.setattr(fsdp, "BF16", False)
    with pytest.raises(ErasureError, match=way_out) as error:
        check_sharded(replace(SGD, mixed_precision=precision))
    assert precision in str(error.value) and "several-gpus.yaml" in str(error.value)


def test_shards_on_a_cpu_under_an_older_torch_are_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(fsdp, "sharding", lambda: FullShard(reshard_after_forward=True))
    monkeypatch.setattr(fsdp, "processes", lambda: SimpleNamespace(device=torch.device("cpu")))
    monkeypatch.setattr(fsdp, "ON_CPUS", False)
    with pytest.raises(ErasureError, match=f"torch {re.escape(torch.__version__)} cannot shard on a CPU; take a newer torch"):
        check_sharded(SGD)


@pytest.mark.parametrize("kind", LAUNCHES)
def test_accelerate_makes_of_the_configs_what_they_claim(kind, monkeypatch):
    config = load_config_from_file(str(LAUNCH / f"{kind}.yaml"))
    assert config.distributed_type == "FSDP" and config.num_processes > 1 and config.mixed_precision == "no"
    for name, value in environment_of(kind).items():
        monkeypatch.setenv(name, value)
    assert full_shard() == FullShard(reshard_after_forward=kind == "fsdp")
    processes()


def test_one_process_has_nothing_to_shard(monkeypatch, model):
    for name, value in environment_of("fsdp").items():
        monkeypatch.setenv(name, value)
    make_accelerator(replace(SGD, optimizer="Adafactor", optimizer_args={}))
    assert fit(model, *task(model)[:3], replace(SGD, steps=1)).losses
    assert isinstance(ActiveWeights({}).layout.rows(3), slice)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"FSDP_VERSION": "1"}, "asks for FSDP version 1"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, "is true or false under FSDP version 2, not FULL_SHARD"),
        *(({name: "true"}, f"sets {name.lower()}") for name in UNFIT),
    ],
    ids=str,
)
def test_other_fsdp_launches_are_refused_in_a_sentence(changes, words, monkeypatch, capsys, tmp_path):
    for name, value in (environment_of("fsdp") | changes).items():
        monkeypatch.setenv(name, value)
    assert run(run_erase.main, ["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert words in error and "scripts/launch/fsdp.yaml" in error and "Traceback" not in error


def test_a_whole_erasure_by_accelerate_launch(tmp_path):
    """From words to a delta, on the embedded model, with targets computed beforehand: that of one process, to rounding."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / "fsdp.yaml"), "--num_processes", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(ROOT / "scripts" / "run_erase.py"), *CANVAS, "--out", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    if not ON_CPUS:
        assert done.returncode and f"error: {NO_SHARDS}; take a newer torch" in done.stderr, done.stderr
        pytest.skip(NO_SHARDS)
    assert done.returncode == 0 and "erasing in shards on 2 processes" in done.stderr, done.stderr
    assert run(run_erase.main, [*CANVAS, "--out", str(tmp_path / "one")]) == 0
    base = load_model("canvas")
    one, two = (ErasedDelta.load(tmp_path / name / "delta.safetensors").apply(load_model("canvas")) for name in ("one", "two"))
    found = [{name: param.detach() for name, param in each.parameters().items()} for each in (one, two)]
    difference = apart(*found, base)
    print(f"canvas: {difference:.1e}")
    assert difference < 1e-3
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )
