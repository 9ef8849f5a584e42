"""One erasure on the bare pico UNet, for literal copies of the methods' equations."""

import re

import torch
from diffusers import DDIMScheduler

from erase.latents.latent_set import Given, LatentSet, epoch_rows
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


def task_of(pipeline):
    """The erasure, as a method sees it."""
    return Task(wrap(pipeline), [CONCEPT], Given(FORGET, RETAIN))


class Bare:
    """The pico UNet alone, trained by SGD on a loss of single predictions."""

    def __init__(self, pipeline):
        self.pipeline, self.unet = pipeline, pipeline.unet
        self.schedule = DDIMScheduler.from_config(pipeline.scheduler.config)
        self.base = {k: v.detach().clone() for k, v in self.unet.state_dict().items()}

    def error(self, latent, noise, t, prompt, target=None):
        """Mean squared error of one latent's prediction against its noise, or another target."""
        found = self.predict(latent, noise, t, prompt)
        return (found - (noise if target is None else target)).square().mean()

    def predict(self, latent, noise, t, prompt):
        noisy = self.schedule.add_noise(latent[None], noise[None], t[None])
        text = self.pipeline.encode_prompt(prompt, "cpu", 1, False)[0]
        return self.unet(noisy, t[None], text).sample[0]

    def at_base(self, function, *args):
        now = {k: v.detach().clone() for k, v in self.unet.state_dict().items()}
        self.unet.load_state_dict(self.base)
        with torch.no_grad():
            found = function(*args)
        self.unet.load_state_dict(now)
        return found

    def train(self, pattern, loss, prox=0.0):
        """SGD of `loss(step)` over the parameters whose names match the pattern; after each step,
        changes from the base shrink by the rate times `prox`, at most to 0."""
        for step in range(STEPS):
            trained = [p for name, p in self.unet.named_parameters() if re.search(pattern, name)]
            value = loss(step)
            slopes = torch.autograd.grad(value, [p.requires_grad_(True) for p in trained])
            with torch.no_grad():
                for p, slope in zip(trained, slopes, strict=True):
                    p -= LR * slope
            if prox:
                self.shrink(pattern, LR * prox)
        named = self.unet.named_parameters()
        return {f"unet.{name}": p.detach() for name, p in named if re.search(pattern, name)}

    @torch.no_grad()
    def shrink(self, pattern, threshold):
        for name, p in self.unet.named_parameters():
            if re.search(pattern, name):
                change = p - self.base[name]
                p.copy_(self.base[name] + change.sign() * (change.abs() - threshold).clamp_min(0))


def drawn(points, step, seed, generator=None):
    """Latent, noise, timestep and row of each of a step's rows, as `row_batches` draws them."""
    rows = epoch_rows(len(points), step * SIZE, SIZE, seed)
    generator = generator or torch.Generator().manual_seed(step)
    t = torch.randint(1000, (SIZE,), generator=generator)
    noise = torch.randn((SIZE, 4, 8, 8), generator=generator)
    return [(points.latents[row], noise[i], t[i], row) for i, row in enumerate(rows)]


def drawn_by_remap(step):
    """The same of the retain and of the forget rows, as the remap objective draws them: from one
    stream, the timesteps and the noise of retain rows first."""
    generator = torch.Generator().manual_seed(step)
    return [drawn(points, step, seed, generator) for points, seed in ((RETAIN, 1), (FORGET, 0))]


def check(found, expected):
    assert expected and expected.keys() <= found.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=2e-6), name


def mean(values):
    values = list(values)
    return sum(values) / len(values)
