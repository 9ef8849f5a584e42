"""Concept ablation against its equation, written here once more on the bare UNet."""

import re
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler

from erase.latents.latent_set import LatentSet, epoch_rows
from erase.latents.prepare import Given
from erase.methods import get_method
from erase.models import wrap
from erase.prompts.concepts import ConceptSpec
from erase.task import Task
from erase.training.config import TrainConfig

CONCEPT = ConceptSpec("heart", "mushroom", retain=("a moon",))
SIZE, STEPS, LR = 2, 3, 0.1
SGD = TrainConfig(steps=STEPS, lr=LR, batch_size=SIZE, optimizer="SGD")
PROMPTS = ("a heart", "a red heart", "a heart")
ANCHORS = ("a mushroom", "a red mushroom", "a mushroom")
RETAINED = ("a moon", "a blue tree", "a moon", "a fish")


def latents(n, seed):
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


FORGET = LatentSet(latents(3, 0), None, PROMPTS, ANCHORS)
RETAIN = LatentSet(latents(4, 1), None, RETAINED)


@pytest.fixture
def model(make_pico_pipeline):
    return wrap(make_pico_pipeline())


@pytest.fixture
def task(model):
    return Task(model, [CONCEPT], Given(FORGET, RETAIN))


class Bare:
    """The pico UNet alone, trained by SGD on a loss of single predictions."""

    def __init__(self, pipeline):
        self.pipeline, self.unet = pipeline, pipeline.unet
        self.schedule = DDIMScheduler.from_config(pipeline.scheduler.config)

    def error(self, latent, noise, t, prompt, target=None):
        """Mean squared error of one latent's prediction against its noise, or another target."""
        found = self.predict(latent, noise, t, prompt)
        return (found - (noise if target is None else target)).square().mean()

    def predict(self, latent, noise, t, prompt):
        noisy = self.schedule.add_noise(latent[None], noise[None], t[None])
        text = self.pipeline.encode_prompt(prompt, "cpu", 1, False)[0]
        return self.unet(noisy, t[None], text).sample[0]

    def train(self, pattern, loss):
        """SGD of `loss(step)` over the parameters whose names match the pattern."""
        for step in range(STEPS):
            trained = [p for name, p in self.unet.named_parameters() if re.search(pattern, name)]
            value = loss(step)
            slopes = torch.autograd.grad(value, [p.requires_grad_(True) for p in trained])
            with torch.no_grad():
                for p, slope in zip(trained, slopes, strict=True):
                    p -= LR * slope
        named = self.unet.named_parameters()
        return {f"unet.{name}": p.detach() for name, p in named if re.search(pattern, name)}


def check(found, expected):
    assert expected and expected.keys() <= found.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=2e-6), name


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_concept_ablation_follows_the_anchor_as_it_is_now(task, make_pico_pipeline):
    """The target is the present model's own prediction, without gradient; the timesteps and the
    noise of retain rows are drawn before those of forget rows."""
    bare = Bare(make_pico_pipeline())

    def loss(step):
        generator, batches = torch.Generator().manual_seed(step), []
        for points, seed in ((RETAIN, 1), (FORGET, 0)):
            rows = epoch_rows(len(points), step * SIZE, SIZE, seed)
            t = torch.randint(1000, (SIZE,), generator=generator)
            noise = torch.randn((SIZE, 4, 8, 8), generator=generator)
            batches.append([(points.latents[r], noise[i], t[i], r) for i, r in enumerate(rows)])
        kept = mean(bare.error(*row[:3], RETAINED[row[3]]) for row in batches[0])
        forgot = []
        for row in batches[1]:
            target = bare.predict(*row[:3], ANCHORS[row[3]]).detach()
            forgot.append(bare.error(*row[:3], PROMPTS[row[3]], target))
        return mean(forgot) + kept

    config = replace(get_method("concept-ablation").config, train=SGD)
    found = get_method("concept-ablation").edit(task, config).values
    check(found, bare.train(r"attn2\.to_[kv]\.", loss))
