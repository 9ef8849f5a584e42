"""What tests of whole runs share: settings of a short one, a checkpoint, and an erasure from it. A
file imports a fixture as itself, so that pytest finds it there."""

import pytest

from erase.latents.config import LatentConfig
from erase.methods.salun import SalUnConfig
from erase.prompts.canvas import canvas_concept
from erase.run import EraseConfig, erase_concept
from erase.training.config import MaskConfig, TrainConfig

DATA = LatentConfig(n_forget=6, n_retain=8, steps=2, batch_size=4)
METHOD = SalUnConfig(
    mask=MaskConfig(batch_size=4), train=TrainConfig(steps=3, batch_size=4, lr=1e-3)
)
FLAGS = (
    "--latents.n_forget 6 --latents.n_retain 8 --latents.steps 2 --latents.batch_size 4 "
    "--train.steps 3 --train.batch_size 4"
).split()


@pytest.fixture(scope="module")
def base(make_pico_pipeline, tmp_path_factory):
    """A checkpoint on disk."""
    folder = tmp_path_factory.mktemp("base") / "pico"
    make_pico_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def erased(base, tmp_path_factory):
    """A finished erasure of `heart` from it."""
    out = tmp_path_factory.mktemp("erased")
    erase_concept(
        canvas_concept("heart"), EraseConfig(model=str(base), latents=DATA), METHOD, out=out
    )
    return out
