"""FIA, "Forget It All": contrastive pruning of the feed-forward layers (ICML 2026,
https://github.com/kaiyuan02415/Forget-It-All).

Weights of the second feed-forward layers whose inputs rise with the concept, beyond what they vary
by themselves, become 0. No step is taken: for many concepts at once, in seconds each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from erase.attacks.pseudo_token import nameless
from erase.latents.latent_set import epoch_rows
from erase.methods import Method
from erase.parallel.processes import progress
from erase.prompts.errors import COUNT, FINITE, FRACTION, check_ranges
from erase.task import Edit, Task

PAPER = "https://github.com/kaiyuan02415/Forget-It-All"


@dataclass
class FIAConfig:
    """Settings of FIA."""

    scope: str = r"^(unet|transformer)\..*\bff\.net\.2\.weight$"
    """linear layers that are pruned; FIA's table has the second of the feed-forward as the best"""
    ratio: float = 0.007
    """r2: share of each output's weights, and of each layer's, that a concept may take; 0.03 for
    what is hard to erase"""
    often: float = 0.05
    """r1: share of a layer's weights that count as used at a step"""
    shared: float = 0.6
    """alpha: of several concepts, what so large a share of them takes belongs to none, and stays"""
    samples: int = 10
    """prompts of each concept, and as many without its name, from the same seeds"""
    steps: int = 50
    """of sampling"""
    early: int = 10
    """first steps that are looked at"""
    guidance: float = 7.5

    def __post_init__(self) -> None:
        shares = dict.fromkeys(("ratio", "often", "shared"), FRACTION)
        check_ranges(self, {**shares, **dict.fromkeys(("samples", "steps", "early"), COUNT)})
        check_ranges(self, {"early": (1, self.steps), "guidance": FINITE})


@contextmanager
def listening(task: Task, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Within the block, the norm of each input of these layers over the places of an image is added
    to its list, shape (n, inputs)."""
    heard: dict[str, list[Tensor]] = {name: [] for name in names}
    with ExitStack() as hooks:
        for name in names:
            part, _, path = name.removesuffix(".weight").partition(".")
            layer = task.model.component(part).get_submodule(path)
            keep = heard[name].append
            hook = layer.register_forward_pre_hook(
                lambda _, inputs, keep=keep: keep(inputs[0].float().norm(dim=1).cpu())
            )
            hooks.callback(hook.remove)
        yield heard


@torch.no_grad()
def input_norms(
    task: Task, names: Sequence[str], prompts: Sequence[str], config: FIAConfig
) -> dict[str, Tensor]:
    """|X_j| of each layer at each early step of sampling each prompt, shape (n, early, inputs)."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for row, prompt in enumerate(progress...):
        ...
