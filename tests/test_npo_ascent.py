"""Gradient ascent and NPO, each against its equation, written here once more on the bare UNet."""

import math
from dataclasses import replace

import pytest
import torch

from erase.latents.latent_set import Given
from erase.losses import denoising_rows
from erase.methods import get_method
from erase.methods.npo import preference
from erase.models import wrap
from erase.prompts.errors import ErasureError
from erase.task import Task
from tests.bare import (
    CONCEPT,
    FORGET,
    PROMPTS,
    RETAIN,
    RETAINED,
    SGD,
    Bare,
    check,
    drawn,
    latents,
    mean,
    task_of,
)


@pytest.fixture
def task(make_pico_pipeline):
    return task_of(make_pico_pipeline())


def test_ascent_takes_the_steps_of_its_equation(task, make_pico_pipeline):
    bare = Bare(make_pico_pipeline())

    def loss(step):
        forgot = mean(bare.error(*row[:3], PROMPTS[row[3]]) for row in drawn(FORGET, step, 0))
        kept = mean(bare.error(*row[:3], RETAINED[row[3]]) for row in drawn(RETAIN, step, 1))
        return -forgot + 0.7 * kept

    config = replace(get_method("ascent").config, scope="xattn", alpha=0.7, ceiling=1e9, train=SGD)
    check(get_method("ascent").edit(task, config).values, bare.train("attn2", loss))


def test_a_latent_above_the_ceiling_is_pushed_no_further(task):
    config = replace(get_method("ascent").config, alpha=0.0, ceiling=1e-6, train=SGD)
    found = get_method("ascent").edit(task, config)
    base = task.model.parameters()
    assert all(torch.equal(value, base[name]) for name, value in found.values.items())


def test_npo_takes_the_steps_of_its_equation(task, make_pico_pipeline):
    bare, beta = Bare(make_pico_pipeline()), 5.0

    def loss(step):
        rows = [(*row[:3], PROMPTS[row[3]]) for row in drawn(FORGET, step, 0)]
        references = [bare.at_base(bare.error, *row) for row in rows]
        kept = mean(bare.error(*row[:3], RETAINED[row[3]]) for row in drawn(RETAIN, step, 1))
        terms = []
        for row, reference in zip(rows, references, strict=True):
            rise = bare.error(*row) - reference
            terms.append(-2 / beta * torch.log(1 / (1 + torch.exp(-beta * rise))))
        return mean(terms) + 0.7 * kept

    config = replace(get_method("npo").config, scope="xattn", beta=beta, alpha=0.7, train=SGD)
    check(get_method("npo").edit(task, config).values, bare.train("attn2", loss))


@pytest.mark.parametrize("name", ["ascent", "npo", "few-shot", "forget-me-not"])
def test_without_a_retain_term_no_retain_latents_are_asked_for(make_pico_pipeline, name):
    task = Task(wrap(make_pico_pipeline()), [CONCEPT], Given(FORGET, None))
    config = replace(get_method(name).config, alpha=0.0, train=replace(SGD, steps=1))
    assert get_method(name).edit(task, config).losses


def slope_of(rise, beta):
    error = torch.tensor([1.0 + rise], dtype=torch.double, requires_grad=True)
    reference = torch.ones(1, dtype=torch.double)
    return float(torch.autograd.grad(preference(error, reference, beta), error)[0])


def test_npo_is_ascent_at_the_base_and_with_a_small_beta():
    assert slope_of(0.0, 20.0) == pytest.approx(-1)
    assert slope_of(0.5, 1e-7) == pytest.approx(-1)


def test_npo_lets_go_of_a_latent_as_its_error_rises():
    slopes = [slope_of(rise, 20.0) for rise in (-0.1, 0.0, 0.1, 0.3)]
    assert slopes == sorted(slopes) and abs(slopes[-1]) < 0.01
    assert slope_of(0.1, 20.0) == pytest.approx(-2 / (1 + math.exp(2)))


def test_errors_of_rows_average_to_the_error_of_all():
    one, other = latents(5, 2), latents(5, 3)
    rows = denoising_rows(one, other)
    assert rows.shape == (5,)
    assert rows.mean() == pytest.approx(float((one - other).square().mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("method", "setting", "value"),
    [("ascent", "ceiling", 0), ("ascent", "alpha", -1), ("npo", "beta", 0), ("npo", "alpha", -1)],
)
def test_settings_out_of_range_are_refused(method, setting, value):
    with pytest.raises(ErasureError, match=setting):
        replace(get_method(method).config, **{setting: value})
