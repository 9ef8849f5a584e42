"""FIA: forget it all (Deng et al., ICML 2026, https://arxiv.org/abs/2601.06163).

Weights of the second feed-forward layers that respond to the concept's name more than to the rest
of its prompts become 0; those that several concepts share stay. In seconds, without a step. Not
where the erasure must be sure: nothing checks it, and what attention draws stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn

from erase.attacks.pseudo_token import nameless
from erase.latents.batches import rows_at
from erase.latents.latent_set import texts_of
from erase.methods import Method
from erase.models.waiting import denoiser_at_hand
from erase.objectives.responses import linear_layers, responses
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import COUNT, check_ranges
from erase.task import Edit, Task
from erase.training.batches import rows_naming

PAPER = "https://arxiv.org/abs/2601.06163"


@dataclass
class FIAConfig:
    """Settings of FIA."""

    scope: str = (
        r"\b((ff(_context)?|img_mlp|txt_mlp)\.(net\.2|linear_out)|feed_forward\.w2)\.weight$"
    )
    """whose linear layers of the denoiser lose weights"""
    density: float = 0.01
    """r_2: of the weights of a layer, and of each of its outputs, the most that become 0"""
    often: float = 0.05
    """r_1: a timestep counts for this fraction of a layer's weights"""
    shared: float = 0.6
    """alpha: a weight that at least this fraction of the concepts, and two, would lose stays"""
    steps: int = 10
    """timesteps at which the responses are compared"""
    early: float = 0.2
    """they lie in this fraction of all timesteps, the noisiest"""
    samples: int = 32
    """latents of each concept, at most"""

    def __post_init__(self) -> None:
        check_ranges(self, dict.fromkeys(("density", "often", "shared", "early"), (1e-9, 1)))
        check_ranges(self, {"steps": COUNT, "samples": COUNT})


def top(values: Tensor, share: float) -> Tensor:
    """The largest values along the last axis, a fraction `share` of them, or one; none that is 0.
    Ties go to the lower index."""
    count = max(1, int(share * values.shape[-1]))
    places = values.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, places, True) & (values > 0)


def sensitivity(
    task: Task, concept: ConceptSpec, config: FIAConfig, layers: Mapping[str, nn.Linear]
) -> dict[str, Tensor]:
    """A = (mean_t S / max + mean_t [S among the top r_1 of the layer]) / 2 (eq. 3), of
    S = max(0, mu_c - mu_b - sigma_b) (eq. 2): c with the name in the prompts, b without."""
    latents, last, tiny = task.forget(), task.model.timesteps - 1, torch.finfo(torch.float32).tiny
    rows = rows_naming(latents, concept, latents.concept_rows())[: config.samples]
    prompts, unnamed = texts_of(latents.prompts, rows), nameless((concept,))
    strength = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
    times = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
    for k in range(config.steps):
        t = last - int(k * config.early * last / config.steps)
        seen = rows_at(task.model, latents, rows, t, task.generator(k))
        named = responses(task, layers, seen, prompts)
        rest = responses(task, layers, seen, [*map(unnamed, prompts)])
        for name in layers:
            found = named[name].above(rest[name])
            strength[name] += found / config.steps
            times[name] += top(found.flatten(), config.often).view_as(found) / config.steps
    return {n: (s / s.max().clamp_min(tiny) + times[n]) / 2 for n, s in strength.items()}


def edit(task: Task, config: FIAConfig) -> Edit:
    """W_ij = 0 where A is among the top r_2 of output i and of the layer (eq. 4-6), with
    U_ij = |W_ij| |X_j| cos(X_j, Y_i) (eq. 1); where ceil(alpha C) of C concepts meet, it stays."""
    layers, most = linear_layers(task, config.scope), ceil(config.shared * len(task.concepts))
    with denoiser_at_hand(task.model.pipeline()):
        hits = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
        for concept in task.concepts:
            for name, found in sensitivity(task, concept, config, layers).items():
                of_all = top(found.flatten(), config.density).view_as(found)
                hits[name] += top(found, config.density) & of_all
    lost = {n: ((c > 0) & (c < max(2, most))).to(layers[n].weight.device) for n, c in hits.items()}
    return Edit({n: layer.weight.detach().masked_fill(lost[n], 0) for n, layer in layers.items()})


METHODS = {"fia": Method("fia", PAPER, FIAConfig(), edit)}
