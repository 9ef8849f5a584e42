"""A critic of latents: which of two distributions does each patch come from?"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erase.parallel.processes import reduce_all

WIDTH = 64
"""channels of the first layer; twice as many follow"""


class Critic:
    """A PatchGAN (Isola et al., CVPR 2017) over latents, with its optimizer; its weights take
    gradient within `learn_from` alone."""

    def __init__(self, channels: int, lr: float, seed: int, device: torch.device) -> None:
        """
        Args:
            channels: of a latent.
            lr: of Adam.
            seed: of the weights it begins with.
            device: of the latents.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # normalised row by row: a batch may be cut into parts without changing the result
            self.net = nn.Sequential(
                nn.Conv2d(channels, WIDTH, 3, stride=2, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, padding=1),
                nn.GroupNorm(8, 2 * WIDTH),
                nn.LeakyReLU(0.2),
                nn.Conv2d(2 * WIDTH, 1, 3, padding=1),
            )
        self.net.to(device).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=lr)

    def verdict(self, latents: Tensor, label: float) -> Tensor:
        """Cross-entropy of calling every patch of these latents `label` (0: anchor, 1: target)."""
        logits = self.net(latents).float()
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))

    def learn_from(self, anchors: Tensor, targets: Tensor) -> None:
        """One step towards calling the first 0 and the second 1, by what all processes see."""
        self.net.requires_grad_(True)
        try:
            (self.verdict(anchors, 0.0) + self.verdict(targets, 1.0)).backward()
            reduce_all((p.grad for p in self.net.parameters() if p.grad is not None), "mean")
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad()
            self.net.requires_grad_(False)

    def state(self) -> dict[str, Any]:
        optimizer = self.optimizer.state_dict()
        return {"net": self.net.state_dict(), "moments": optimizer["state"]}

    def restore(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["moments"], "param_groups": groups})
