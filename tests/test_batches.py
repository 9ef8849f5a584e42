"""A step's batch is drawn whole and then cut: parts and processes together train on the rows of the
step, each on its own."""

from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from erase.attacks.relearning import relearn
from erase.latents.config import LatentConfig
from erase.latents.latent_set import Given, LatentSet
from erase.latents.prepare import prepare_latents
from erase.models import wrap
from erase.objectives.remap import Remap, RemapConfig
from erase.prompts.canvas import canvas_concept
from erase.prompts.errors import ErasureError
from erase.task import Task
from erase.training.config import TrainConfig, TunedConfig
from erase.training.shares import cut
from erase.training.trainable import Trainable

PLAIN = RemapConfig(
    retain_dropout=0.5, share_latents=False, train=TrainConfig(steps=3, batch_size=8, lr=1e-3)
)
POINTS = LatentConfig(n_forget=4, n_retain=5, steps=3, trajectory=2)
SPLITS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (2, 4)]


@pytest.fixture
def pico(make_pico_pipeline):
    return wrap(make_pico_pipeline())


def from_images() -> tuple[LatentSet, LatentSet]:
    """Eleven forget and nine retain latents as of images: a posterior mean and deviation each."""
    mean, std = torch.rand(2, 11, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    words = tuple(
        f"a {word}"
        for word in (
            "heart",
            "star",
            "moon",
            "house",
            "tree",
            "fish",
            "flower",
            "ring",
            "arrow",
            "red",
            "blue",
        )
    )
    return LatentSet(mean, std, words, words[::-1]), LatentSet(mean[:9], std[:9], words[:9])


def tensors_of(batch) -> dict[str, torch.Tensor]:
    """Every tensor of a batch, by its place in it."""
    if torch.is_tensor(batch):
        return {"": batch}
    return {
        f"{field.name}.{name}": tensor
        for field in fields(batch)
        for name, tensor in tensors_of(getattr(batch, field.name)).items()
    }


@pytest.mark.parametrize(("parts", "count"), SPLITS)
@pytest.mark.parametrize("points", [False, True])
def test_accumulated_parts_and_processes_see_the_rows_of_the_whole_batch(
    pico, parts, count, points
) -> None:
    """Rows, timesteps, noise and posterior draws: bit for bit."""
    sets = prepare_latents(pico, [canvas_concept("heart")], POINTS, 0) if points else from_images()
    remap = Remap(Task(pico, [canvas_concept("heart")], Given(*sets)), PLAIN)
    for step in range(3):
        batch = remap.batches(step)
        shares = [
            cut(
                batch,
                part,
                parts,
                SimpleNamespace(num_processes=count, process_index=process, device="cpu"),
            )
            for process in range(count)
            for part in range(parts)
        ]
        assert all(len(share.forget) == 8 // (parts * count) for share in shares)
        columns = [tensors_of(share) for share in shares]
        for name, rows in tensors_of(batch).items():
            assert torch.equal(torch.cat([column[name] for column in columns]), rows), name
    assert not torch.equal(batch.anchor.noisy, batch.forget.noisy) or points  # two posterior draws


def test_a_batch_is_cut_whatever_it_is_made_of() -> None:
    second = SimpleNamespace(num_processes=2, process_index=1, device="cpu")
    batch = {"rows": (torch.arange(8), list("abcdefgh")), "nothing": None}
    found = cut(batch, 1, 2, second)
    assert (
        found["rows"][0].tolist() == [6, 7]
        and found["rows"][1] == ["g", "h"]
        and found["nothing"] is None
    )
    with pytest.raises(
        ErasureError, match="a batch of 7 rows cannot be split evenly into 2 parts on 2 processes"
    ):
        cut(torch.arange(7), 0, 2, second)


def test_relearning_with_accumulation_ends_where_it_does_without_and_sees_a_part_at_a_time(
    pico,
) -> None:
    latents, train = from_images()[0], TrainConfig(steps=2, batch_size=4, lr=0.1, optimizer="SGD")
    heart = canvas_concept("heart")
    ((_, plain),) = relearn(pico, [heart], latents, TunedConfig(train=train), [2])
    seen: list[int] = []
    pico.component("unet").register_forward_hook(lambda _, args, out: seen.append(len(out.sample)))
    parts = TunedConfig(train=replace(train, accumulation=4))
    ((_, split),) = relearn(pico, [heart], latents, parts, [2])
    assert seen == [1] * 8, "two steps of four rows, each of which is seen once"
    base = {name: param.detach() for name, param in pico.parameters("unet").items()}
    moved = sum((plain[name] - base[name]).square().sum() for name in plain).sqrt()
    apart = sum((plain[name] - split[name]).square().sum() for name in plain).sqrt()
    assert 0 < moved and apart < 1e-3 * moved


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.0])
def test_timesteps_follow_the_power(power) -> None:
    """A share (t / T)^p lies below t: Kolmogorov and Smirnov's distance at the 1 % level."""
    latents, _ = from_images()
    count, timesteps = 20_000, 1000
    rows = torch.zeros(count, dtype=torch.int64)
    t, _ = latents.draw_noise(rows, timesteps, torch.Generator().manual_seed(0), power)

    shares = torch.bincount(t, minlength=timesteps).cumsum(0) / count
    expected = (torch.arange(1, timesteps + 1) / timesteps) ** power
    assert len(shares) == timesteps
    assert (shares - expected).abs().max() < 1.63 / count**0.5


def test_forget_and_retain_rows_are_drawn_by_the_power(pico) -> None:
    """Both look at nearly pure noise more often, and the statistics of a mask with them."""
    task = Task(pico, [canvas_concept("heart")], Given(*from_images()))
    often = Remap(task, replace(PLAIN, noise_power=10.0))
    batches = [often.batches(step) for step in range(20)]
    for name in ("forget", "retain"):
        t = torch.cat([getattr(batch, name).t for batch in batches])
        assert t.double().mean() / pico.timesteps == pytest.approx(10 / 11, abs=0.03)


def test_the_states_of_a_trajectory_are_chosen_by_the_power(pico) -> None:
    """Forget and retain points alike, and whoever asks for them afterwards has the same."""
    task = Task(pico, [canvas_concept("heart")], replace(POINTS, n_forget=12, n_retain=12))
    often = Remap(task, replace(PLAIN, noise_power=10.0))
    assert task.forget() is often.forget_set and torch.equal(task.retain().t, often.retain_set.t)
    for points in (often.forget_set, often.retain_set):
        assert points.t.double().mean() / pico.timesteps == pytest.approx(10 / 11, abs=0.03)
    uniform = Remap(task, PLAIN)
    assert task.forget() is uniform.forget_set is not often.forget_set
    assert uniform.retain_set.t.double().mean() / pico.timesteps == pytest.approx(0.5, abs=0.05)


def test_points_that_are_fixed_refuse_a_power(pico) -> None:
    sets = prepare_latents(pico, [canvas_concept("heart")], POINTS, 0)
    with pytest.raises(ErasureError, match="noise_power 2 says .* given fix theirs"):
        Remap(Task(pico, [canvas_concept("heart")], Given(*sets)), replace(PLAIN, noise_power=2.0))


@pytest.mark.parametrize("points", [False, True])
def test_the_target_lies_beyond_the_anchor(pico, points) -> None:
    """eps_a + eta (eps_a - eps_c), as a negative prompt would lead; at eta 0 the anchor's; moved no
    further than the limit, row by row."""
    sets = prepare_latents(pico, [canvas_concept("heart")], POINTS, 0) if points else from_images()
    task = Task(pico, [canvas_concept("heart")], Given(*sets))
    config = replace(PLAIN, share_latents=True, train=replace(PLAIN.train, batch_size=4))
    limits: list[float | None] = [None, None, 1e-6, 100.0]
    for eta, limit in zip((0.0, 2.0, 2.0, 2.0), limits, strict=True):
        remap = Remap(task, replace(config, beyond=eta, beyond_limit=limit))
        batch = remap.batches(0)
        forget, rows = remap.forget_set, batch.forget
        prompts, anchors = (
            [texts[row] for row in batch.forget_rows] for texts in (forget.prompts, forget.anchors)
        )
        with torch.no_grad():
            concept, anchor = task.predict(rows, prompts), task.predict(rows, anchors)
            loss = remap.loss(batch, nullcontext)["forget"]
        moves = [eta * (anchor - concept).double()[row] for row in range(len(anchor))]
        if limit is not None:
            rms = [float((move**2).mean() ** 0.5) for move in moves]
            moves = [move * min(1, limit / size) for move, size in zip(moves, rms, strict=True)]
        expected = ((concept - (anchor + torch.stack(moves).float())) ** 2).mean()
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("points", [False, True])
@pytest.mark.parametrize("beyond", [0.0, 2.0])
def test_the_anchor_is_held_to_the_base_on_the_forget_rows(pico, points, beyond) -> None:
    """retain = alpha (|eps(x, kept) - base's|^2 + hold |eps(x, anchor) - base's|^2), the latter at
    the rows that show the concept, and not beyond the anchor."""
    sets = prepare_latents(pico, [canvas_concept("heart")], POINTS, 0) if points else from_images()
    task = Task(pico, [canvas_concept("heart")], Given(*sets))
    train = replace(PLAIN.train, batch_size=4)
    plain = replace(PLAIN, share_latents=points, beyond=beyond, alpha=3.0, train=train)
    remap, held = Remap(task, plain), Remap(task, replace(plain, hold=0.5))
    batch = held.batches(0)
    anchors = [held.forget_set.anchors[row] for row in batch.forget_rows]
    weights = list(task.weights("full").values())

    @contextmanager
    def base():
        """Other weights than those that are trained."""
        with torch.no_grad():
            before = [weight.clone() for weight in weights]
            torch._foreach_mul_(weights, 1.05)
            yield
            torch._foreach_copy_(weights, before)

    with base():
        kept = task.predict(batch.anchor, anchors)
    with torch.no_grad():
        expected = ((task.predict(batch.anchor, anchors) - kept) ** 2).mean()
        without, found = remap.loss(batch, base), held.loss(batch, base)
    assert expected > 1e-4
    torch.testing.assert_close(found["forget"], without["forget"])
    torch.testing.assert_close(found["retain"], without["retain"] + 3.0 * 0.5 * expected)


@pytest.mark.parametrize("points", [0, 2])
@pytest.mark.parametrize("change", [{}, {"anchor_from": "current"}, {"retain_target": "noise"}])
def test_without_weight_no_retained_image_is_drawn_or_seen(pico, points, change, monkeypatch):
    task = Task(pico, [canvas_concept("heart")], replace(POINTS, trajectory=points))
    monkeypatch.setattr(task, "retain", None)
    config = replace(PLAIN, alpha=0.0, share_latents=True, **change)
    remap, rows = Remap(task, config), []
    predict = task.predict
    monkeypatch.setattr(
        task, "predict", lambda seen, texts: (rows.append(len(seen)), predict(seen, texts))[1]
    )
    batch = cut(remap.batches(0), 1, 2, Accelerator(cpu=True))  # four of its eight rows
    trained = Trainable(pico.parameters("unet"))
    with torch.no_grad():
        terms = remap.loss(batch, trained.base)
        anchors = [remap.forget_set.anchors[row] for row in batch.forget_rows]
        prompts = [remap.forget_set.prompts[row] for row in batch.forget_rows]
        apart = (predict(batch.forget, prompts) - predict(batch.forget, anchors)).square().mean()
    assert list(terms) == ["forget"]
    torch.testing.assert_close(terms["forget"], apart)
    # the base beforehand, of points; else with the step; and what is trained
    assert rows == ([8, 4] if points and not change else [4, 4])


def test_a_multiple_of_no_weight_is_refused() -> None:
    with pytest.raises(ErasureError, match="hold 1 is a multiple of alpha, which is 0"):
        RemapConfig(alpha=0.0, hold=1.0)


@pytest.mark.parametrize("name", ["beyond", "hold"])
def test_what_asks_the_base_about_the_anchor_needs_it_as_teacher(name) -> None:
    with pytest.raises(ErasureError, match=f"{name} 1 .* anchor_from"):
        RemapConfig(anchor_from="current", **{name: 1.0})
