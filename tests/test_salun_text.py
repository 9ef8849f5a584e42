"""`salun-text`: where its training begins."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from erase.attacks.relearning import changed_to
from erase.methods import get_method
from erase.objectives.remap import Remap
from erase.prompts.errors import ErasureError
from tests.bare import SGD, task_of

TEXT = replace(get_method("salun-text").config, train=SGD, prox_text=0.0)


@pytest.fixture
def task(make_pico_pipeline):
    return task_of(make_pico_pipeline())


def test_training_may_begin_where_uce_ends(task):
    """And goes on from there: the first loss is that of UCE's weights, and steps lower it."""
    closed = get_method("uce").edit(task, get_method("uce").config).values
    still = replace(TEXT, start="uce", train=replace(SGD, steps=1, lr=1e-30))
    begun = get_method("salun-text").edit(task, still)
    base = task.model.parameters()
    assert begun.values.keys() == closed.keys()
    for name, value in begun.values.items():
        assert torch.equal(value, closed[name]) and not torch.equal(value, base[name])

    remap = Remap(task, still)
    original = {name: base[name].detach().clone() for name in closed}

    @contextmanager
    def of_base():
        with changed_to(task.model, original):
            yield

    with torch.no_grad(), changed_to(task.model, closed):
        first = sum(remap.loss(remap.batches(0), of_base).values())
    assert begun.losses[0] == pytest.approx(float(first), rel=1e-4)
    trained = get_method("salun-text").edit(task, replace(still, train=replace(SGD, lr=1e-2)))
    assert trained.losses[0] == begun.losses[0]
    assert any(not torch.equal(value, closed[name]) for name, value in trained.values.items())


def test_an_unknown_start_is_refused():
    with pytest.raises(ErasureError, match="start.*esd.*base, uce"):
        replace(TEXT, start="esd")


def test_a_closed_form_answers_for_what_is_given_text_states_alone(task):
    with pytest.raises(ErasureError, match="use scope text_in"):
        get_method("salun-text").edit(task, replace(TEXT, start="uce", scope="full"))
