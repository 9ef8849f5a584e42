"""SalUn against free embeddings, our own preset: SalUn's mask and target (Fan et al., ICLR 2024) in
the rounds of STEREO (Srivatsan et al., CVPR 2025, https://arxiv.org/abs/2408.16807).

The concept is erased; embeddings are found under which it is still drawn; it is erased under these,
too; and so on, from where it stands. Four times as long as `salun`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from erase.attacks.pseudo_token import PseudoTokenConfig, find_pseudo_token, predict_behind
from erase.attacks.relearning import changed_to
from erase.latents.latent_set import texts_of
from erase.losses import remap
from erase.methods import Method
from erase.methods.salun import SalUnConfig
from erase.objectives.remap import Remap, RemapBatch
from erase.prompts.errors import COUNT, POSITIVE, check_ranges
from erase.task import Edit, Task
from erase.training.fine_tune import fine_tune
from erase.training.saliency import Objective, choose_mask
from erase.training.trainable import Base

PAPER = "https://arxiv.org/abs/2310.12508"
Batch = tuple[RemapBatch, Tensor]  # and which of the embeddings each forget row is under


@dataclass
class SalUnRobustConfig(SalUnConfig):
    """Settings of SalUn in rounds."""

    alpha: float = 10.0
    rounds: int = 4
    """of finding embeddings that bring the concept back, and erasing it under them, too"""
    round_steps: int = 72
    """of training in each; those of the first erasure are in `train`"""
    round_lr: float = 5e-4
    """learning rate of the rounds"""
    attack: PseudoTokenConfig = PseudoTokenConfig(vectors=4, steps=100, lr=2e-2)
    """how they are found"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"rounds": COUNT, "round_steps": COUNT, "round_lr": POSITIVE})


class _Rounds:
    """The remap objective, under the concept's names and under what was found so far."""

    def __init__(self, task: Task, config: SalUnRobustConfig) -> None:
        self.task, self.plain = task, Remap(task, config)
        self.size, self.begin = config.train.batch_size, 0
        self.found: list[dict[str, Tensor]] = []

    def batches(self, step: int) -> Batch:
        """Those of the whole run: each round goes on where the one before ended."""
        first = (self.begin + step) * self.size
        turns = torch.arange(first, first + self.size) % max(len(self.found), 1)
        return self.plain.batches(self.begin + step), turns

    def loss(self, batch: Batch, base: Base) -> dict[str, Tensor]:
        """The remap loss; its forget term, the mean over names and embeddings."""
        rows, turns = batch
        targets = self.plain.targets(rows, base)
        terms = self.plain.terms(rows, targets)
        if self.found:
            prompts = texts_of(self.plain.forget_set.prompts, rows.forget_rows)
            found = {name: self._under(name, turns) for name in self.found[0]}
            answers = predict_behind(self.task, rows.forget, prompts, found)
            terms["forget"] = (terms["forget"] + remap(answers, targets.forget)) / 2
        return terms

    def _under(self, encoder: str, turns: Tensor) -> Tensor:
        return torch.stack([found[encoder] for found in self.found])[turns]


def edit(task: Task, config: SalUnRobustConfig) -> Edit:
    """Minimise |eps(x_t, c) - target|^2 / 2 + |eps(x_t, p_k) - target|^2 / 2 + alpha retain: target
    and retain as in SalUn, p_k = argmin_p |eps(x_t, p) - noise|^2 of what round k - 1 has left."""
    work = _Rounds(task, config)
    mask = choose_mask(task, config, Objective(work.loss, work.batches))
    done = fine_tune(task, work.loss, work.batches, config, mask=mask, part="training-0")
    losses, shown = list(done.losses), work.plain.forget_set.of_concept()
    train = replace(config.train, steps=config.round_steps, lr=config.round_lr)
    again = replace(config, train=train)
    for i in range(config.rounds):
        with changed_to(task.model, done.values):
            work.found.append(find_pseudo_token(task, shown, config.attack, restart=-1 - i))
        work.begin = len(losses)
        start, part = done.values, f"training-{i + 1}"
        done = fine_tune(task, work.loss, work.batches, again, start=start, mask=mask, part=part)
        losses += done.losses
    return Edit(done.values, losses, mask)


METHODS = {"salun-robust": Method("salun-robust", PAPER, SalUnRobustConfig(), edit)}
