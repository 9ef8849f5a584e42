"""A step's batch is drawn whole and then cut: parts and processes together train on the rows of the step, each on its own."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

from erase.latents.prepare import LatentConfig, LatentSet, PromptCache, prepare_latents
from erase.models import Cond, wrap
from erase.objectives.remap import RemapConfig, frozen_targets, make_batch, make_job
from erase.prompts.canvas import canvas_concept
from erase.scripts.canvas import relearning
from erase.training.config import TrainConfig
from erase.training.loop import make_accelerator

PLAIN = RemapConfig(retain_dropout=0.5, share_latents=False, train=TrainConfig(steps=3, batch_size=8, lr=1e-3))
POINTS = LatentConfig(n_forget=4, n_retain=5, steps=3, trajectory=2)
SPLITS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (2, 4)]


@pytest.fixture
def pico(make_pico_pipeline):
    return wrap(make_pico_pipeline())


def from_images() -> tuple[LatentSet, LatentSet]:
    """Eleven forget and nine retain latents as of images: a posterior mean and deviation each."""
    mean, std = torch.rand(2, 11, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    words = tuple(
        f"a {word}" for word in ("heart", "star", "moon", "house", "tree", "fish", "flower", "ring", "arrow", "red", "blue")
    )
    return LatentSet(mean, std, words, words[::-1], 11), LatentSet(mean[:9], std[:9], words[:9])


def joined(parts: list) -> dict[str, torch.Tensor]:
    """Field -> its rows over all parts, in order."""
    found = {}
    for name in (field.name for field in fields(parts[0])):
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], Cond):
            values = [value.embeddings for value in values]
        if isinstance(values[0], tuple):
            values = [torch.cat([value.flatten(1) for value in pair], 1) for pair in values]
        if values[0] is not None:
            found[name] = torch.cat(values)
    return found


@pytest.mark.parametrize(("parts", "count"), SPLITS)
@pytest.mark.parametrize("points", [False, True])
def test_accumulated_parts_and_processes_see_the_rows_of_the_whole_batch(pico, parts, count, points) -> None:
    """Rows, timesteps, noise, posterior draws, dropped prompts and known targets: bit for bit."""
    sets = prepare_latents(pico, [canvas_concept("heart")], POINTS, 0) if points else from_images()
    job = make_job(pico, *sets, PLAIN, 0, make_accelerator(PLAIN.train))
    job = replace(job, targets=frozen_targets(job))
    assert (job.targets is not None) == points
    cut = replace(job, config=replace(PLAIN, train=replace(PLAIN.train, accumulation=parts)))
    for step in range(3):
        whole = joined([make_batch(job, step, 0)])
        each = [
            make_batch(replace(cut, accelerator=SimpleNamespace(num_processes=count, process_index=process)), step, part)
            for process in range(count)
            for part in range(parts)
        ]
        assert all(len(part.forget) == 8 // (parts * count) for part in each)
        together = joined(each)
        assert together.keys() == whole.keys()
        assert all(torch.equal(together[name], rows) for name, rows in whole.items())
    assert not torch.equal(whole["anchor"], whole["forget"]) or points  # two posterior draws


@pytest.mark.parametrize(("parts", "count"), SPLITS)
def test_relearning_in_parts_sees_each_row_once(pico, monkeypatch, parts, count) -> None:
    latents, train = from_images()[0], TrainConfig(steps=2, batch_size=8, lr=1e-3)
    embed = PromptCache(pico, latents.prompts)
    whole = relearning.relearning_batch(pico, latents, embed, train, 5, 1, 0)
    each = []
    for process in range(count):
        monkeypatch.setattr(relearning, "processes", lambda: SimpleNamespace(num_processes=count, process_index=process))  # noqa: B023
        split = replace(train, accumulation=parts)
        each += [relearning.relearning_batch(pico, latents, embed, split, 5, 1, part) for part in range(parts)]
    for rows, *shares in zip(whole, *each, strict=True):
        assert (
            torch.equal(rows.embeddings, Cond.stack(shares).embeddings)
            if isinstance(rows, Cond)
            else torch.equal(rows, torch.cat(shares))
        )


def test_relearning_with_accumulation_ends_where_it_does_without_and_sees_a_part_at_a_time(pico) -> None:
    latents, train = from_images()[0], TrainConfig(steps=2, batch_size=4, lr=0.1, optimizer="SGD")
    plain, seen = relearning.relearn(pico, latents, train), []
    pico.component("unet").register_forward_hook(lambda _, args, out: seen.append(len(out.sample)))
    split = relearning.relearn(pico, latents, replace(train, accumulation=4))
    assert seen == [1] * 8, "two steps of four rows, each of which is seen once"
    base = {name: param.detach() for name, param in pico.parameters("unet").items()}
    moved = sum((plain[name] - base[name]).square().sum() for name in plain).sqrt()
    apart = sum((plain[name] - split[name]).square().sum() for name in plain).sqrt()
    assert 0 < moved and apart < 1e-3 * moved
