"""SSD: dampening by hand, and on the bare UNet with gradients of single latents."""

from dataclasses import replace

import pytest
import torch

from erase.latents.latent_set import epoch_rows
from erase.methods import get_method
from erase.methods.ssd import dampened
from erase.prompts.errors import ErasureError
from erase.training.config import TrainConfig, TunedConfig
from erase.training.saliency import _training_pass
from tests.bare import FORGET, PROMPTS, RETAIN, RETAINED, Bare, task_of


def test_dampening_by_hand():
    weight = torch.tensor([4.0, 4.0, 4.0, 4.0, -4.0, 4.0])
    forget = torch.tensor([1.0, 20.0, 20.0, 10.0, 40.0, 0.0])
    retain = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    expected = torch.tensor([4.0, 0.2, 0.0, 4.0, -0.1, 4.0])
    assert torch.allclose(dampened(weight, forget, retain, 10, 1), expected)
    stronger = dampened(weight, forget, retain, 0.5, 30)
    assert torch.equal(stronger[[0, 1, 3, 5]], weight[[0, 1, 3, 5]]), "none grows"


def test_ssd_dampens_by_the_gradients_of_single_latents(make_pico_pipeline):
    bare, task = Bare(make_pico_pipeline()), task_of(make_pico_pipeline())
    config = replace(get_method("ssd").config, samples=5, scope="xattn", alpha=1.5)
    names = [name for name, _ in bare.unet.named_parameters() if "attn2" in name]
    params = dict(bare.unet.named_parameters())
    squares = {}
    for kind, points, prompts, seed in (("f", FORGET, PROMPTS, 0), ("r", RETAIN, RETAINED, 1)):
        total = {name: torch.zeros_like(params[name]) for name in names}
        for step in range(5):
            row = int(epoch_rows(len(points), step, 1, seed))
            generator = torch.Generator().manual_seed(step)
            t = torch.randint(1000, (1,), generator=generator)[0]
            noise = torch.randn((1, 4, 8, 8), generator=generator)[0]
            loss = bare.error(points.latents[row], noise, t, prompts[row])
            tensors = [params[name].requires_grad_(True) for name in names]
            for name, slope in zip(names, torch.autograd.grad(loss, tensors), strict=True):
                total[name] += slope.square()
        squares[kind] = total

    found, moved = get_method("ssd").edit(task, config).values, 0
    for name in names:
        w, f, r = params[name].detach(), squares["f"][name], squares["r"][name]
        expected = torch.where(f > 1.5 * r, w * torch.minimum(r / f, torch.ones(())), w)
        near = (f / (1.5 * r) - 1).abs() < 1e-3  # rounding decides
        value = found[f"unet.{name}"]
        assert torch.allclose(value[~near], expected[~near], rtol=1e-3, atol=1e-7)
        assert (value.abs() <= w.abs()).all()
        moved += int((value != w).sum())
    assert 0 < moved < sum(params[name].numel() for name in names)


class Two:
    """The second of two processes, which would go on alone."""

    device, num_processes, process_index, is_main_process = torch.device("cpu"), 2, 1, True


def test_single_latents_are_not_split_between_processes(make_pico_pipeline, monkeypatch):
    task = task_of(make_pico_pipeline())
    config = replace(get_method("ssd").config, samples=2, scope="xattn")
    alone = get_method("ssd").edit(task, config).values
    monkeypatch.setattr("erase.training.saliency.processes", Two)
    assert all(
        torch.equal(value, alone[name])
        for name, value in get_method("ssd").edit(task, config).values.items()
    )


@pytest.mark.parametrize(
    ("rows", "taken"), [(1, [[0]]), (4, [[2], [3]]), (6, [[0, 1, 2], [3, 4, 5]])]
)
def test_under_shards_rows_that_do_not_split_evenly_are_taken_by_every_process(
    make_pico_pipeline, monkeypatch, rows, taken
):
    """Two parts, on two processes; the mean of equal gradients is the gradient."""
    monkeypatch.setattr("erase.training.saliency.processes", Two)
    config = TunedConfig(train=TrainConfig(batch_size=rows, accumulation=2))
    seen = []
    work = _training_pass(
        task_of(make_pico_pipeline()),
        config,
        lambda step: torch.arange(rows),
        lambda batch: seen.append(batch.tolist()) or torch.ones(()),
        joint=True,
    )
    assert sum(work.loss(0, part) for part in range(work.parts)) == 1
    assert seen == taken


@pytest.mark.parametrize(
    ("setting", "value"),
    [("samples", 0), ("alpha", -1), ("alpha", float("inf")), ("dampening", -1)],
)
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ErasureError, match=setting):
        replace(get_method("ssd").config, **{setting: value})
