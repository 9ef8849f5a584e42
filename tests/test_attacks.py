"""The pseudo-token attack: its objective on a pico model, what it leaves alone, and its known
answers."""

import pytest
import torch

from erase.attacks.pseudo_token import PseudoTokenConfig, find_pseudo_token, nameless
from erase.latents.latent_set import Given, LatentSet
from erase.losses import denoising
from erase.models import wrap
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.task import Task
from erase.training.batches import row_batches

CONCEPT = ConceptSpec("heart", "star", synonyms=("love heart",), retain=("a moon",))
CONFIG = PseudoTokenConfig(vectors=2, steps=3, lr=1e-2, batch_size=4)


@pytest.fixture
def task(make_pico_pipeline):
    generator = torch.Generator().manual_seed(0)
    latents = LatentSet(
        torch.randn(6, 4, 8, 8, generator=generator), None, ("a red heart",) * 3 + ("hearts",) * 3
    )
    return Task(wrap(make_pico_pipeline()), [CONCEPT], Given(latents, latents))


def mean_error(task, prefix):
    """The attack's objective over many draws."""
    batches, found = row_batches(task, task.forget(), 6), []
    with torch.no_grad():
        for step in range(100, 120):
            rows, prompts = batches(step)
            cond = task.model.encode([nameless(task.concepts)(p) for p in prompts], prefix)
            found.append(denoising(task.model.predict(rows.noisy, rows.t, cond), rows.target))
    return float(torch.stack(found).mean())


def test_one_step_is_adams_step_along_the_gradient(task):
    one = PseudoTokenConfig(vectors=2, steps=1, lr=1e-2, batch_size=4)
    found = find_pseudo_token(task, task.forget(), one)["text_encoder"]

    table = task.model.component("text_encoder").get_input_embeddings().weight.detach()
    rows = torch.randint(len(table), (2,), generator=torch.Generator().manual_seed(task.seed))
    start = table[rows].clone().requires_grad_()
    batch, prompts = row_batches(task, task.forget(), 4, task.seed)(0)
    cond = task.model.encode([nameless(task.concepts)(p) for p in prompts], start)
    loss = (task.model.predict(batch.noisy, batch.t, cond) - batch.target).square().mean()
    (gradient,) = torch.autograd.grad(loss, [start])
    # Adam's first step is the rate times the gradient's sign, where it is not near its eps
    expected = start.detach() - 1e-2 * gradient / (gradient.abs() + 1e-8)
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_attack_lowers_its_error_and_leaves_the_model(task):
    before = {name: param.detach().clone() for name, param in task.model.parameters().items()}
    config = PseudoTokenConfig(vectors=4, steps=60, lr=3e-2, batch_size=6)
    start = find_pseudo_token(task, task.forget(), PseudoTokenConfig(steps=1, lr=1e-9))
    found = find_pseudo_token(task, task.forget(), config)
    assert mean_error(task, found) < mean_error(task, start)
    for name, param in task.model.parameters().items():
        assert torch.equal(param, before[name]) and param.grad is None


def test_the_same_again_and_another_start_otherwise(task):
    one, same, other = (
        find_pseudo_token(task, task.forget(), CONFIG, restart)["text_encoder"]
        for restart in (0, 0, 1)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.shape == (2, one.shape[1])


def test_names_are_left_out_of_prompts():
    unnamed = nameless((CONCEPT,))
    assert unnamed("A red heart image in Flat style.") == "A red image in Flat style."
    assert unnamed("two love hearts") == "two" and unnamed("a moon") == "a moon"


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"vectors": 0}, {"lr": 0.0}])
def test_an_impossible_budget_is_refused(wrong):
    with pytest.raises(ErasureError, match=next(iter(wrong))):
        PseudoTokenConfig(**wrong)


def test_a_prefix_changes_what_is_sampled(task):
    prefix = find_pseudo_token(task, task.forget(), CONFIG)
    plain = task.model.sample(["a moon"], [0], 2, 3.0)
    assert not torch.equal(plain, task.model.sample(["a moon"], [0], 2, 3.0, prefix=prefix))
    assert torch.equal(plain, task.model.sample(["a moon"], [0], 2, 3.0))
