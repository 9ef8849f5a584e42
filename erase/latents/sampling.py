"""Training latents that the model makes itself: finished images, or noisy states of the
trajectories that lead to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from erase.models import PRECISIONS, Cond, DiffusionModel, autocast
from erase.models.half_precision import stand_ins
from erase.models.pipelines import denoiser
from erase.models.waiting import CPU, Waiting, waiting
from erase.parallel.processes import in_shares
from erase.prompts.errors import ErasureError

Points = tuple[Tensor, Tensor | None, Tensor | None]
"""latents (n, c, h, w); in trajectory mode the noise on each of them, same shape, and the timesteps
that go with it, (n,)"""


def sample_points(
    model: DiffusionModel,
    prompts: tuple[str, ...],
    seed: int,
    *,
    steps: int,
    guidance: float,
    trajectory: int,
    precision: str,
    batch_size: int,
    what: str,
    power: float = 1.0,
) -> Points:
    """Sample one image per prompt, without decoding it.

    Args:
        model: the base.
        prompts: one image each, with the seeds from `seed` on.
        steps: of the sampler.
        guidance: its guidance scale.
        trajectory: 0: the finished latents. k: k rows per image (as many as there are steps, at
            most), image by image: its latents, and the noise of one of its noisy states.
        precision: no, bf16 or fp16.
        batch_size: images at a time.
        what: for the progress bar.
        power: of the noisy states, as in `LatentSet.draw_noise`.

    Raises:
        ErasureError: latents that are not finite.
    """
    each = min(trajectory, steps)
    parts = waiting(model.pipeline())
    known = _encoded(model, prompts, precision) if parts else None

    def sample(rows: range) -> tuple[Tensor, Tensor, Tensor]:
        texts, seeds = [prompts[row] for row in rows], [seed + row for row in rows]
        batch = known(texts) if known else texts
        with autocast(model.device, precision):
            if not each:
                return (
                    model.sample(batch, seeds, steps, guidance).float().cpu(),
                    torch.empty(0),
                    torch.empty(0),
                )
            latents, noise, t = model.trajectory(batch, seeds, steps, guidance)
        noise, t = choose_states(noise, t, each, seeds[0], model.timesteps, power)
        return latents.float().cpu(), noise.float().cpu(), t.cpu()

    with _alone(model, parts, precision) if parts else nullcontext():
        found = in_shares(len(prompts), batch_size, sample, f"{what} latents", "img")
    latents, noise, t = (torch.cat(column) for column in zip(*found, strict=True))
    if not (latents.isfinite().all() and noise.isfinite().all()):
        raise ErasureError(
            f"the model sampled latents that are not finite, at latents.guidance {guidance:g} with "
            f"latents.mixed_precision {precision}; take bf16 or no, load the model in float32, or "
            "lower the guidance"
        )
    return (latents.repeat_interleave(each, 0), noise, t) if each else (latents, None, None)


def _encoded(
    model: DiffusionModel, prompts: Sequence[str], precision: str
) -> Callable[[list[str]], tuple[Cond, Cond]]:
    """The states of all prompts, kept in main memory: the text encoders run once and leave."""
    texts = list(dict.fromkeys(["", *prompts]))
    with torch.no_grad(), autocast(model.device, precision):
        states = [model.encode([text]).to(CPU) for text in texts]
    known = dict(zip(texts, states, strict=True))
    return lambda batch: (
        Cond.stack([known[text] for text in batch]),
        Cond.stack([known[""]] * len(batch)),
    )


@contextmanager
def _alone(model: DiffusionModel, parts: Waiting, precision: str) -> Iterator[None]:
    """The denoiser on the device, in the precision of its products, and no other part."""
    device, module = model.device, denoiser(model.pipeline())
    with (
        parts.held([module]),
        stand_ins({"denoiser": module}, PRECISIONS[precision], device, away=True),
    ):
        # by the first weight a pipeline tells in which precision it gives its latents
        first = next(module.parameters())
        first.data = first.data.float()
        yield


def choose_states(
    noise: Tensor, t: Tensor, each: int, seed: int, timesteps: int, power: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`each` states of every trajectory, spread evenly over the timesteps as training draws them.

    A state's noise stands for all timesteps down to the next state's (the first state's, of pure
    noise, for those above too): one of them is drawn, so that training sees more than the sampler's
    few.

    Args:
        noise: of each state, shape (steps, n, c, h, w).
        t: of each state, falling, shape (steps,).
        each: states per trajectory.
        seed: of the choice.
        timesteps: of training, in all.
        power: p, as in `LatentSet.draw_noise`.

    Returns:
        noise, shape (n * each, c, h, w), and timesteps, shape (n * each,), trajectory by
        trajectory.
    """
    n = noise.shape[1]
    generator = torch.Generator().manual_seed(seed)
    within = torch.rand(n, each, generator=generator, dtype=torch.float64)
    places = (torch.arange(each) + within) / each
    times = (timesteps * places ** (1 / power)).long().clamp_max(timesteps - 1)
    # falling: the states that stand for a timestep begin behind those whose successor lies above it
    state = (times[..., None] < t[1:].cpu() + 1).sum(-1)
    return noise[state.to(noise.device), torch.arange(n, device=noise.device)[:, None]].flatten(
        0, 1
    ), times.flatten()
