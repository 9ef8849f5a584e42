"""Deterministic sampling over any model's `predict`, forwards and backwards, and open at each step.

DDIM (Song et al., ICLR 2021, https://arxiv.org/abs/2010.02502); for flow matching the same steps
are Euler's. With x_t = a x_0 + b noise, and the prediction y = c x_0 + d noise, a step to another
level (a', b') is linear: x' = a' x_0 + b' noise, both solved from x_t and y. The four factors are
asked of the model itself, so no family needs code here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from erase.losses import guided
from erase.models import Cond, DiffusionModel

Between = Callable[[Tensor, "Level"], Tensor]
"""(state, its noise level) -> the state to go on from"""


@dataclass(frozen=True)
class Level:
    """A noise level: x = signal x_0 + sigma noise, y = c x_0 + d noise."""

    t: int | None
    """training timestep; None: no noise at all"""
    signal: float = 1.0
    sigma: float = 0.0
    c: float = 0.0
    d: float = 1.0

    @classmethod
    def of(cls, model: DiffusionModel, t: int) -> Level:
        """The level of a training timestep."""
        one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
        at = torch.tensor([t])
        pairs = ((one, zero), (zero, one))
        signal, sigma = (float(model.add_noise(*pair, at)) for pair in pairs)
        c, d = (float(model.target(*pair, at)) for pair in pairs)
        return cls(t, signal, sigma, c, d)

    def parts(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x_0 and noise, as the prediction y at x has them."""
        size = self.signal * self.d - self.sigma * self.c
        return (self.d * x - self.sigma * y) / size, (self.signal * y - self.c * x) / size

    def step(self, to: Level) -> tuple[float, float]:
        """The factors of x and y in the state at another level."""
        size = self.signal * self.d - self.sigma * self.c
        return (
            (to.signal * self.d - to.sigma * self.c) / size,
            (to.sigma * self.signal - to.signal * self.sigma) / size,
        )


def levels(model: DiffusionModel, steps: int) -> list[Level]:
    """The levels of a sampling, from pure noise to none, steps + 1 in all: timesteps from the last
    down, evenly spread ("trailing"; Lin et al. 2024, table 2), and the end."""
    times = [round(model.timesteps * (steps - i) / steps) - 1 for i in range(steps)]
    return [*(Level.of(model, t) for t in times), Level(None)]


def start_noise(model: DiffusionModel, seeds: Sequence[int]) -> Tensor:
    """Noise as `DiffusionModel.sample` draws it, one seed each, shape (n, *latent_shape)."""
    draws = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        draws.append(torch.randn((1, *model.latent_shape), generator=generator))
    return torch.cat(draws).to(model.device)


def noised_to(level: Level, latents: Tensor, noise: Tensor) -> Tensor:
    """Latents at a noise level."""
    return level.signal * latents + level.sigma * noise


@dataclass(frozen=True)
class Walker:
    """A model under prompts, one per row."""

    model: DiffusionModel
    cond: Cond
    null: Cond | None
    """of classifier-free guidance; None: there is none"""
    guidance: float

    @classmethod
    def under(cls, model: DiffusionModel, prompts: Sequence[str], guidance: float) -> Walker:
        """Under these prompts; without guidance where it is 1, or where all prompts are empty."""
        plain = guidance == 1 or not any(prompts)
        rows = torch.zeros(len(prompts), dtype=torch.long)
        null = None if plain else model.encode([""])[rows]
        return cls(model, model.encode(list(prompts)), null, guidance)

    @torch.no_grad()
    def predict(self, x: Tensor, level: Level) -> Tensor:
        """The guided prediction at a level."""
        assert level.t is not None, "nothing is predicted where there is no noise"
        t = torch.full((len(x),), level.t, device=x.device)
        if self.null is None:
            return self.model.predict(x, t, self.cond)
        both = self.model.predict(torch.cat([x, x]), t.repeat(2), self.cond.cat(self.null))
        cond, null = both.chunk(2)
        return guided(cond, null, self.guidance - 1)

    def forwards(self, x: Tensor, path: Sequence[Level], between: Between | None = None) -> Tensor:
        """From a state at the first level of a path to its last."""
        for here, there in zip(path, path[1:], strict=False):
            own, predicted = here.step(there)
            x = own * x + predicted * self.predict(x, here)
            x = between(x, there) if between else x
        return x

    def backwards(self, x: Tensor, path: Sequence[Level], iterations: int = 1) -> Tensor:
        """From a state at the last level of a path to the state at the first that `forwards` leads
        back from.

        Each step solves for the noisier state by fixed-point iteration, from the state itself (one
        iteration: DDIM inversion; more: Pan et al., ICCV 2023, https://arxiv.org/abs/2309.04907).
        """
        for there, here in zip(path[::-1], path[-2::-1], strict=False):
            own, predicted = here.step(there)
            end = x
            for _ in range(iterations):
                x = (end - predicted * self.predict(x, here)) / own
        return x

    def stochastic(
        self, x: Tensor, path: Sequence[Level], eta: float, seeds: Sequence[int]
    ) -> Tensor:
        """`forwards` with fresh noise at each step: eta 0 adds none, 1 as much as DDPM (eq. 16 of
        DDIM).

        Above 1 the states hold more noise than the model was trained at, where the direction to x_t
        has no more left to give. For models with signal^2 + sigma^2 = 1.
        """
        streams = [torch.Generator().manual_seed(~seed) for seed in seeds]
        for here, there in zip(path, path[1:], strict=False):
            clean, noise = here.parts(x, self.predict(x, here))
            ratio = max(0.0, 1 - (here.signal / there.signal) ** 2)
            fresh = eta * there.sigma / here.sigma * sqrt(ratio)
            x = there.signal * clean + sqrt(max(0.0, there.sigma**2 - fresh**2)) * noise
            if fresh:
                draws = [torch.randn(x.shape[1:], generator=stream) for stream in streams]
                x = x + fresh * torch.stack(draws).to(x)
        return x


def preserves_variance(level: Level) -> bool:
    """Whether signal^2 + sigma^2 = 1, as DDIM's eta asks for; flow matching's levels do not."""
    return abs(level.signal**2 + level.sigma**2 - 1) < 1e-3
