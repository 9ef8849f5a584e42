"""DoCo: both sides' steps against the equations, written here once more; what the critic keeps."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from erase.latents.batches import clean, noised
from erase.methods import get_method
from erase.methods.doco import Adversary
from erase.models import wrap
from erase.prompts.errors import ErasureError
from tests.bare import (
    ANCHORS,
    PROMPTS,
    RETAINED,
    SGD,
    Bare,
    check,
    drawn_by_remap,
    latents,
    mean,
    task_of,
)
from tests.families import FAMILIES

CONFIG = replace(
    get_method("doco").config, combine="sum", alpha=0.7, critic_steps=2, critic_lr=0.01, train=SGD
)


@pytest.fixture
def task(make_pico_pipeline):
    return task_of(make_pico_pipeline())


class Duel(Bare):
    """The pico UNet and a critic of its own, row by row."""

    def __init__(self, pipeline, net):
        super().__init__(pipeline)
        self.net = net.requires_grad_(True)
        self.adam = torch.optim.Adam(net.parameters(), lr=0.01)

    def seen(self, latent, noise, t, prompt):
        alpha = self.schedule.alphas_cumprod[t]
        noisy = alpha.sqrt() * latent + (1 - alpha).sqrt() * noise
        return (noisy - (1 - alpha).sqrt() * self.predict(latent, noise, t, prompt)) / alpha.sqrt()

    def doubt(self, latent, label):
        """Cross-entropy of the label, mean over patches."""
        called = torch.sigmoid(self.net(latent[None]))
        return -torch.log(called if label else 1 - called).mean()

    def criticise(self, step):
        _, forgotten = drawn_by_remap(step)
        with torch.no_grad():
            targets = [self.seen(*row[:3], PROMPTS[row[3]]) for row in forgotten]
        anchors = [self.at_base(self.seen, *row[:3], ANCHORS[row[3]]) for row in forgotten]
        self.adam.zero_grad()
        loss = mean(self.doubt(x, 0) for x in anchors) + mean(self.doubt(x, 1) for x in targets)
        loss.backward()
        self.adam.step()

    def loss(self, step):
        self.criticise(step)
        retained, forgotten = drawn_by_remap(step)
        kept = mean(self.error(*row[:3], RETAINED[row[3]]) for row in retained)
        return (
            mean(self.doubt(self.seen(*row[:3], PROMPTS[row[3]]), 0) for row in forgotten)
            + 0.7 * kept
        )


def test_both_sides_take_the_steps_of_their_equations(task, make_pico_pipeline):
    duel = Duel(make_pico_pipeline(), deepcopy(Adversary(task, CONFIG).critic.net))
    for step in range(CONFIG.critic_steps):
        duel.criticise(step)
    expected = duel.train(r"attn2\.to_[kv]\.", duel.loss)
    check(get_method("doco").edit(task, CONFIG).values, expected)


def test_the_critic_keeps_no_gradient_of_the_models_step(task):
    """Nor takes one there: what it is told comes from its own step alone."""
    adversary = Adversary(task, CONFIG)
    batch = adversary.remap.batches(0)
    adversary.learn(batch, torch.no_grad)
    before = [param.clone() for param in adversary.critic.net.parameters()]
    weight = next(iter(task.weights("xattn_kv").values())).requires_grad_(True)
    adversary.loss(batch, torch.no_grad)["forget"].backward()
    assert weight.grad.abs().sum() > 0
    weights = zip(before, adversary.critic.net.parameters(), strict=True)
    assert all(torch.equal(old, p) and p.grad is None and not p.requires_grad for old, p in weights)


def test_the_critic_learns_to_tell_two_kinds_apart(task):
    critic = Adversary(task, CONFIG).critic
    one, other = latents(8, 0), latents(8, 1) + 0.5
    start = float(critic.verdict(one, 0.0) + critic.verdict(other, 1.0))
    for _ in range(40):
        critic.learn_from(one, other)
    assert float(critic.verdict(one, 0.0) + critic.verdict(other, 1.0)) < 0.3 * start


@pytest.mark.parametrize("family", ["sd1", "sd2-v", "sd3"])
def test_the_right_answer_means_the_clean_latents(family):
    model = wrap(FAMILIES[family](), "tiny")
    x0, noise = latents(3, 0), latents(3, 1)
    if family == "sd3":
        x0, noise = (torch.cat([x] * (model.latent_shape[0] // 4), dim=1) for x in (x0, noise))
    rows = noised(model, x0, noise, torch.tensor([10, 500, 900]))
    assert torch.allclose(clean(model, rows, rows.target), x0, atol=1e-4)


@pytest.mark.parametrize(
    ("setting", "value"), [("critic_lr", 0), ("critic_steps", -1), ("alpha", -1)]
)
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ErasureError, match=setting):
        replace(CONFIG, **{setting: value})
