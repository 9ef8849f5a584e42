"""Settings: numbers out of range, presets that sign their own settings alone, optimizers that
cannot step, steps that change nothing."""

from dataclasses import replace
from math import inf, nan

import pytest
import torch

import erase.training.loop
from erase.latents.config import LatentConfig
from erase.methods import METHODS, get_method
from erase.methods.salun import SalUnConfig, SalUnPaperConfig
from erase.models import wrap
from erase.models.scopes import select
from erase.prompts.canvas import canvas_concept
from erase.prompts.errors import ErasureError, check_ranges
from erase.run import EraseConfig, erase_concept
from erase.scripts import run_erase
from erase.scripts.cli import build, parse
from erase.training.checkpoint import Checkpoint
from erase.training.config import MaskConfig, TrainConfig, TunedConfig
from erase.training.loop import fit, make_accelerator
from erase.training.optimizers import NOT_OURS, try_optimizer

DATA = LatentConfig(n_forget=4, n_retain=4, steps=2, batch_size=4)
TRAIN = TrainConfig(steps=2, batch_size=2, lr=1e-3)
NO_NUMBERS = (nan, inf, -inf, "1", True)
OUT_OF_RANGE = {
    (TrainConfig, "steps"): (0, -1, 1.5, 10**12, None),
    (TrainConfig, "batch_size"): (0, -1, 1.5, 10**12),
    (TrainConfig, "accumulation"): (0, -1, 1.5),
    (TrainConfig, "checkpoint_every"): (0, -1, 1.5),
    (TrainConfig, "lr"): (0, 0.0, -1e-4, None),
    (TrainConfig, "warmup"): (-1, 1.5, 10**12),
    (TrainConfig, "max_grad_norm"): (0, -1),
    (TrainConfig, "ema"): (1, 1.0, -0.1, 2),
    (SalUnConfig, "alpha"): (-1, -1e-9, 1e300),
    (SalUnConfig, "beyond"): (-1, -1e-9, 1e300),
    (SalUnConfig, "beyond_limit"): (0, -1, 1e300),
    (SalUnConfig, "hold"): (-1, -1e-9, 1e300),
    (SalUnConfig, "noise_power"): (0, -1, 1e300),
    (SalUnConfig, "anchor_latents"): (-0.1, 1.1),
    (SalUnConfig, "retain_dropout"): (-0.1, 1.1),
    (SalUnConfig, "sam"): (-1,),
    (SalUnConfig, "smoothing"): (-1,),
    (SalUnConfig, "smoothing_draws"): (0, -1, 1.5),
    (SalUnConfig, "prox_l1"): (-1,),
    (SalUnConfig, "prox_l2"): (-1,),
    (SalUnConfig, "prox_text"): (-1, 1e300),
    (SalUnConfig, "confine"): (-1, 1.5),
    (SalUnConfig, "barrier"): (-1, 1e300),
    (SalUnConfig, "lora_rank"): (-1, 1.5),
    (MaskConfig, "density"): (0, -0.1, 1.1),
    (MaskConfig, "guidance"): (-2, 1e300),
    (MaskConfig, "batch_size"): (0, -1, 1.5),
    (MaskConfig, "batches"): (0, -1, 1.5),
    (EraseConfig, "seed"): (1.5, 2**60, -(2**60), None),
}


@pytest.fixture
def model(make_pico_pipeline):
    return wrap(make_pico_pipeline(), "pico")


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [(*key, value) for key, values in OUT_OF_RANGE.items() for value in (*values, *NO_NUMBERS)],
)
def test_a_number_out_of_range_is_refused_by_name(kind, name, value):
    if name == "density" and value is True:
        return  # all of the weights, in any spelling
    with pytest.raises(ErasureError, match=name):
        kind(**{name: value})


def test_every_number_of_the_settings_has_a_range():
    named = {key for key in OUT_OF_RANGE}
    for kind in (TrainConfig, MaskConfig, SalUnConfig, EraseConfig):
        for name, value in vars(kind()).items():
            numeric = isinstance(value, int | float) and not isinstance(value, bool)
            assert not numeric or (kind, name) in named, (kind.__name__, name)


@pytest.mark.parametrize("value", [None, 0.5, 3])
def test_what_an_annotation_allows_is_let_pass(value):
    assert replace(TRAIN, max_grad_norm=value).max_grad_norm == value
    check_ranges(replace(TRAIN, steps=3), {"steps": (1, 10)})


@pytest.mark.parametrize("args", [[], "weight_decay", {1: 2}, None])
def test_optimizer_arguments_are_names_with_values(args):
    with pytest.raises(ErasureError, match="optimizer_args is"):
        TrainConfig(optimizer_args=args)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (
            "salun-paper",
            SalUnConfig(),
            r'takes a SalUnPaperConfig, not a SalUnConfig; name method="salun"',
        ),
        (
            "salun",
            SalUnPaperConfig(),
            r'takes a SalUnConfig, not a SalUnPaperConfig; name method="salun-paper"',
        ),
        ("salun", TrainConfig(), "takes a SalUnConfig, not a TrainConfig"),
        ("salun", {"alpha": 0.5}, "takes a SalUnConfig, not a dict"),
    ],
)
def test_settings_of_another_method_are_not_signed_with_this_one_s_name(
    method, settings, message, model, tmp_path
):
    with pytest.raises(ErasureError, match=message):
        erase_concept(
            canvas_concept("heart"),
            EraseConfig(method=method),
            settings,
            model=model,
            out=tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def test_a_method_s_settings_given_as_the_erasure_s_are_refused(model):
    with pytest.raises(ErasureError, match="config is a SalUnConfig; give an EraseConfig"):
        erase_concept(canvas_concept("heart"), SalUnConfig(), model=model)


def test_every_method_has_settings_of_a_type_of_its_own():
    kinds = [type(get_method(name).config) for name in METHODS]
    assert len(set(kinds)) == len(kinds)


def test_latents_that_nobody_asks_for_are_the_method_s():
    """In Python and on the command line, where one option changes one of them."""
    own, usual = get_method("salun-half").latents, LatentConfig()
    assert own != usual == EraseConfig().latents
    assert EraseConfig(method="salun-half").latents == own
    assert EraseConfig(method="salun-half", latents=usual).latents == usual
    EraseConfig(method="salun-half").latents.steps = 1
    assert EraseConfig(method="salun-half").latents == own  # each has its own copy
    options = parse(run_erase.make_parser("salun-half"), ["--latents.n_forget", "5"])
    assert build(EraseConfig, options).latents == replace(own, n_forget=5)


def test_one_setting_of_a_preset_can_be_changed_on_the_command_line(monkeypatch, tmp_path):
    given = []

    def erased(concepts, config, settings, out, after=None):
        given.extend([config.method, settings])
        raise ErasureError("far enough")

    monkeypatch.setattr("erase.run.erase_concept", erased)
    with pytest.raises(ErasureError, match="far enough"):
        run_erase.main(
            [
                "--concept",
                "heart",
                "--method",
                "salun-paper",
                "--alpha",
                "0.2",
                "--out",
                str(tmp_path),
            ]
        )
    assert given == ["salun-paper", SalUnPaperConfig(alpha=0.2)]
    assert given[1].retain_target == "noise" and given[1].train.lr == 1e-5


@pytest.mark.parametrize(
    ("optimizer", "args", "message"),
    [
        ("Adam", {"betas": [0.9]}, "betas is .* a list of 2 numbers"),
        ("Adam", {"betas": [0.9, 0.99, 0.999]}, "betas is .* a list of 2 numbers"),
        ("Adam", {"betas": [0.9, "0.99"]}, "optimizer Adam"),
        ("Adam", {"amsgrad": "no"}, "amsgrad is 'no'; it must be true or false"),
        ("Adam", {"capturable": True, "fused": False}, "cannot take a step"),
        ("ASGD", {"t0": "late"}, "t0 is 'late'; it must be a number"),
        ("Adam", {"betas": [0.9, 1.5]}, "Invalid beta"),
        ("Adam", {"betas": "high"}, "optimizer Adam"),
        ("Adam", {"betas": 0.9}, "optimizer Adam"),
        ("Adam", {"eps": "tiny"}, "optimizer Adam"),
        ("Adam", {"eps": 1e60}, "moves no weight"),
        ("AdamW", {"weight_decay": "0.1"}, "weight_decay is '0.1'; it must be a number"),
        ("AdamW", {"differentiable": True}, "cannot take a step"),
        ("AdamW", {"fused": True, "foreach": True}, "optimizer AdamW"),
        ("SGD", {"momentum": "0.9"}, "momentum is '0.9'; it must be a number"),
        ("SGD", {"weight_decay": inf}, "not finite"),
        ("SGD", {"maximize": True}, "leave maximize out"),
        ("RMSprop", {"alpha": 3.0}, "not finite"),
        ("Rprop", {"etas": [0.5]}, "optimizer Rprop"),
        ("Adafactor", {"d": "one"}, "optimizer Adafactor"),
        ("Muon", {}, "steps on matrices alone"),
        ("LBFGS", {}, "computes the loss several times"),
    ],
)
def test_an_optimizer_that_would_fail_at_the_first_step_is_refused_before_latents_are_made(
    optimizer, args, message, model, monkeypatch
):
    monkeypatch.setattr("erase.run.Task", None)
    settings = SalUnConfig(train=replace(TRAIN, optimizer=optimizer, optimizer_args=args))
    with pytest.raises(ErasureError, match=message) as refused:
        erase_concept(canvas_concept("heart"), EraseConfig(latents=DATA), settings, model=model)
    assert "\n" not in str(refused.value)


def test_every_optimizer_that_is_offered_takes_steps():
    offered = {
        name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type)
        and issubclass(kind, torch.optim.Optimizer)
        and name not in NOT_OURS
    }
    before = torch.random.get_rng_state()
    for name in offered:
        for fuse in (True, False):
            try_optimizer(name, 1e-4, {}, fuse, torch.device("cpu"))
    assert len(offered) > 10 and torch.equal(torch.random.get_rng_state(), before)


def test_a_learning_rate_below_what_float32_can_hold_is_refused():
    with pytest.raises(ErasureError, match="moves no weight with lr 1e-60"):
        make_accelerator(replace(TRAIN, lr=1e-60))


def test_an_edit_that_changes_nothing_is_an_error_and_leaves_no_delta(model, tmp_path):
    weights = r"to_k\.weight"  # biases begin at zero, where the smallest step is seen
    settings = SalUnConfig(
        scope=weights, mask=MaskConfig(batch_size=4), train=replace(TRAIN, lr=1e-30)
    )
    with pytest.raises(ErasureError, match="erasing heart changed no weight"):
        erase_concept(
            canvas_concept("heart"), EraseConfig(latents=DATA), settings, model=model, out=tmp_path
        )
    assert not (tmp_path / "delta.safetensors").exists()


def test_a_density_that_leaves_no_weight_is_refused_before_latents_are_made(model, monkeypatch):
    monkeypatch.setattr("erase.run.Task", None)
    with pytest.raises(ErasureError, match="leaves none to train"):
        erase_concept(
            canvas_concept("heart"),
            EraseConfig(latents=DATA),
            SalUnConfig(mask=MaskConfig(density=1e-9)),
            model=model,
        )


@pytest.mark.parametrize(
    ("out", "message"), [("", "is empty"), ("a\0b", "holds a NUL"), ("x" * 5000, "is too long")]
)
def test_an_output_folder_that_cannot_be_is_refused_before_the_base_is_loaded(
    out, message, monkeypatch
):
    monkeypatch.setattr("erase.run.load_model", None)
    with pytest.raises(ErasureError, match=message):
        erase_concept(canvas_concept("heart"), out=out)


def drawn(model, accumulation, steps=2, checkpoint=None, stop=None, seen=None):
    """What losses draw from the global stream, by step and part."""
    params, seen = select(model.parameters(), "xattn_kv"), [] if seen is None else seen

    def batches(step):
        return torch.full((accumulation,), step), torch.arange(accumulation)

    def loss(batch, base):
        place = tuple(int(column) for column in batch)
        if place == stop:
            raise KeyboardInterrupt
        seen.append((*place, torch.randn(3).tolist()))
        return {"forget": sum(p.sum() for p in params.values())}

    train = replace(TRAIN, steps=steps, accumulation=accumulation, checkpoint_every=1)
    kept = Checkpoint(checkpoint, {}) if checkpoint else None
    fit(params, loss, batches, TunedConfig(train=train), checkpoint=kept)
    return seen


def test_accumulated_parts_draw_different_numbers_from_the_global_stream(model):
    rows = [tuple(numbers) for *_, numbers in drawn(model, 2)]
    assert len(set(rows)) == 4


def test_a_single_part_draws_what_its_step_seeds(model):
    for step, _, numbers in drawn(model, 1):
        assert numbers == torch.randn(3, generator=torch.Generator().manual_seed(step)).tolist()


def test_a_resumed_run_draws_from_the_global_stream_what_it_would_have_drawn(model, tmp_path):
    whole, begun = drawn(model, 2), []
    with pytest.raises(KeyboardInterrupt):
        drawn(model, 2, checkpoint=tmp_path / "training.pt", stop=(1, 1), seen=begun)
    assert begun == whole[:3]
    assert drawn(model, 2, checkpoint=tmp_path / "training.pt") == whole[2:]


def test_processes_draw_different_numbers_from_the_global_stream(model, monkeypatch):
    seeds = []
    monkeypatch.setattr(erase.training.loop.torch, "manual_seed", lambda seed: seeds.append(seed))
    accelerator, params = make_accelerator(TRAIN), select(model.parameters(), "xattn_kv")

    def loss(batch, base):
        return {"forget": sum(p.sum() for p in params.values())}

    config = TunedConfig(train=replace(TRAIN, accumulation=2))
    for index in range(3):
        monkeypatch.setattr(type(accelerator), "process_index", index)
        fit(params, loss, lambda step: None, config, accelerator=accelerator)
    assert len(set(seeds)) == len(seeds) == 3 * 2 * 2
    # a CPU's generator looks at no more of it
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)
