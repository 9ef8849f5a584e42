"""A training of the pico model that a test kills: `killed_training.py STATE OUT [slow]`; slow
prints each step before it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import build_pico_pipeline

from erase.mask import SaliencyMask
from erase.models.scopes import select
from erase.models.sd import StableDiffusion
from erase.training.checkpoint import Checkpoint
from erase.training.config import TrainConfig, TunedConfig
from erase.training.loop import fit

state, out, slow = Path(sys.argv[1]), Path(sys.argv[2]), len(sys.argv) > 3
model = StableDiffusion(build_pico_pipeline())
params = select(model.parameters(), "full")
cond = model.encode(["a red heart"] * 4)


def batches(step):
    if slow:
        print(step, flush=True)
        time.sleep(0.3)
    return torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(step))


def loss(x, base):
    return {"forget": model.predict(x, torch.tensor([1, 2, 3, 4]), cond).square().mean()}


config = TunedConfig(train=TrainConfig(steps=8, checkpoint_every=1))
mask = SaliencyMask.random(params, 0.5, 0, {"base_fingerprint": model.fingerprint})
fitted = fit(params, loss, batches, config, mask, checkpoint=Checkpoint(state, {}))
torch.save(dict(fitted.values), out)
