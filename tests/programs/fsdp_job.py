"""Two processes train with and without shards; facts.pt of the working folder tells the tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from erase.models import DiffusionModel, wrap
from erase.models.scopes import select
from erase.parallel.fsdp import BF16, Shards, check_sharded
from erase.parallel.processes import in_shares, processes
from erase.prompts.errors import ErasureError
from erase.training.config import TrainConfig, TunedConfig
from erase.training.loop import fit
from erase.training.optimizers import make_optimizer
from erase.training.running import running
from erase.training.trainable import Base, Trainable
from tests.conftest import build_pico_pipeline
from tests.families import FAMILIES
from tests.programs.processes_job import (
    METHOD,
    OFTEN,
    erase,
    plain,
    statistics_of_base,
    stopped_in_step,
)
from tests.shards import (
    HALF,
    LAUNCHES,
    PLAIN,
    POSSIBLE,
    SGD,
    SLOW,
    as_found,
    batches,
    environment_of,
    launched,
    loss_of,
    mask_of,
    train,
    with_a_lone_weight,
)

NEWER = ("sdxl", "sd3", "flux")
"""families with other denoisers than the pico model's"""
UNFIT = {
    "Adafactor": replace(SGD, optimizer="Adafactor", optimizer_args={}),
    "AdamW8bit": replace(SGD, optimizer="AdamW8bit", optimizer_args={}),
    "channels_last": replace(SGD, channels_last=True),
    "compile": replace(SGD, compile=True),
    "fp16": replace(SGD, mixed_precision="fp16"),
}
"""a word of the refusal -> settings that shards cannot do"""
OLDER = {} if BF16 else {"beside matrices in bf16; take torch 2.15 or newer": HALF.train}
ENVIRONMENTS = {None: {}, **{kind: environment_of(kind) for kind in LAUNCHES}}


def trained(model: DiffusionModel) -> dict[str, Any]:
    """Values and losses of every variant by every launch, and whether the model is as found."""
    facts: dict[str, Any] = {"trained": {}, "losses": {}, "as found": {}}
    for name, (config, density, kinds) in POSSIBLE.items():
        for kind in (None, *kinds):
            with launched(ENVIRONMENTS[kind]), as_found(model) as same:
                fitted = train(model, config, density)
            facts["trained"][name, kind] = dict(fitted.values)
            facts["losses"][name, kind] = fitted.losses
            facts["as found"][name, kind] = same["same"]
    return facts


def stale(model: DiffusionModel) -> dict[str, Tensor]:
    """What comes of a training in which nobody says that shards were written."""
    with launched(ENVIRONMENTS["fsdp-zero2"]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shards, "invalidate_gathered", lambda shards: None)
        return dict(train(model, PLAIN, 0.5).values)


def resumed(model: DiffusionModel) -> dict[str, Any]:
    """Trainings that end in the fourth step, with a state of the second, and what becomes of it."""
    stopped = {}
    for kind in (None, "fsdp"):
        with launched(ENVIRONMENTS[kind]), pytest.raises(KeyboardInterrupt):
            train(model, SLOW, 0.5, Path(f"{kind}.pt"), stop=3)
        stopped[kind] = Path(f"{kind}.pt").exists()

    states = [torch.load(f"{kind}.pt", weights_only=True) for kind in (None, "fsdp")]
    if processes().is_main_process:
        shutil.copy("fsdp.pt", "handed-over.pt")
    processes().wait_for_everyone()
    with launched(ENVIRONMENTS["fsdp"]):
        resumed = dict(train(model, SLOW, 0.5, Path("fsdp.pt")).values)
        taken_over = dict(train(model, SLOW, 0.5, Path("None.pt")).values)
    return {"stopped": stopped, "states": states, "resumed": resumed, "taken over": taken_over}


def erased() -> dict[str, Any]:
    """Two whole erasures in shards, one of them stopped in its third step and resumed."""
    train = replace(OFTEN, steps=3)
    with launched(ENVIRONMENTS["fsdp"]):
        whole = erase("whole", train, METHOD.mask)
        stopped = stopped_in_step(2, "stopped", train, METHOD.mask)
        again = erase("stopped", train, METHOD.mask)
    return {"erased": (whole.sha256, again.sha256), "erasure stopped": stopped}


def bytes_held(model: DiffusionModel) -> list[int]:
    """Bytes of weights, of what is trained, and of Adam's moments, here and after one step."""
    params = select(model.parameters(), "full")
    with running(model, params, SGD) as active:
        trainable = Trainable(params, mask_of(model, 0.5), active)
        sum(loss_of(model)(batches(0), trainable.base).values()).backward()
        values = list(trainable.values.values())
        optimizer = make_optimizer(values, "Adam", 1e-3, {}, fuse=True)
        optimizer.step()

        entries = [entry for state in optimizer.state.values() for entry in state.values()]
        moments = [entry for entry in entries if entry.dim()]
        weights = [active.layout.local(param) for param in active.params.values()]
        gradients = [value.grad for value in values]
        mine = [*values, *gradients, *trainable._base.values(), *trainable._where.values()]
        held = [sum(map(_bytes, group)) for group in (weights, mine, moments)]
        trainable.close()
    return held


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def one_step(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """What a step of plain SGD changes of a family's denoiser: minus its gradient."""
    model = wrap(pipeline)
    cond, t = model.encode(["a red heart"]), torch.tensor([300])
    generator = torch.Generator().manual_seed(processes().process_index)
    x = torch.randn(1, *model.latent_shape, generator=generator)

    def loss(batch: None, base: Base) -> dict[str, Tensor]:
        return {"forget": model.predict(x, t, cond).square().mean()}

    params = select(model.parameters(), "full")
    config = TunedConfig(train=TrainConfig(steps=1, batch_size=2, lr=1.0, optimizer="SGD"))
    with running(model, params, config.train) as active:
        fitted = fit(params, loss, lambda step: None, config, active=active)
    return {name: value - params[name].detach() for name, value in fitted.values.items()}


def refusals(model: DiffusionModel) -> dict[str, str]:
    """What is said of settings that shards cannot do."""
    found = {}
    for name, config in {**UNFIT, **OLDER}.items():
        found[name] = _refused(lambda config=config: check_sharded(config))
    found["text_encoder"] = _refused(lambda: train(model, replace(PLAIN, scope="text_encoder")))
    found["lora_rank"] = _refused(lambda: train(model, replace(PLAIN, lora_rank=2)))
    return found


def _refused(work: Callable[[], Any]) -> str:
    with pytest.raises(ErasureError) as error:
        work()
    return str(error.value)


def main() -> None:
    model = with_a_lone_weight(build_pico_pipeline())
    facts = {**trained(model), "stale": stale(model), **resumed(model), **erased()}

    for kind in (None, "fsdp"):
        with launched(ENVIRONMENTS[kind]):
            held = bytes_held(model)
            facts["bytes", kind] = in_shares(2, 1, lambda _, held=held: held, "bytes", "process")
            facts["statistics", kind] = plain(statistics_of_base())
            facts["families", kind] = {name: one_step(FAMILIES[name]()) for name in NEWER}
    with launched(ENVIRONMENTS["fsdp"]):
        facts["refused"] = refusals(model)
        facts["odd"] = in_shares(3, 1, lambda _: processes().process_index, "odd", "row", pad=True)

    if processes().is_main_process:
        model.pipeline().save_pretrained("after")
        torch.save(facts, "facts.pt")


if __name__ == "__main__":
    main()
