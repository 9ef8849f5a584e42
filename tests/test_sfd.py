"""SFD without data: its equation, written here once more on the bare UNet, of what the model makes
of noise in one step."""

from dataclasses import replace

import pytest
import torch

from erase.latents.latent_set import epoch_rows
from erase.methods import get_method
from erase.models import wrap
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.task import Task
from erase.training.config import MaskConfig
from tests.bare import CONCEPT, RETAINED, SGD, SIZE, Bare, check, mean

SPEC = replace(CONCEPT, templates=("a {}", "a red {}", "{} art"), retain=RETAINED[:2])
INIT, LOWEST, ALPHA = 400, 100, 0.7


class NoData:
    """Whoever asks for latents fails."""

    def forget(self, anchor_share=0.0):
        raise AssertionError("latents were asked for")

    def retain(self):
        raise AssertionError("latents were asked for")


@pytest.fixture
def task(make_pico_pipeline):
    return Task(wrap(make_pico_pipeline()), [SPEC], NoData())


def drawn(step):
    """Pure noise, noise, timestep and the prompts of each row, as they come from one stream."""
    generator = torch.Generator().manual_seed(step)
    dropped = torch.rand(SIZE, generator=generator) < 0.5
    pairs = SPEC.pairs()
    named = [pairs[i] for i in epoch_rows(len(pairs), step * SIZE, SIZE, 0)]
    texts = [SPEC.retain[i] for i in epoch_rows(len(SPEC.retain), step * SIZE, SIZE, 1)]
    texts = ["" if drop else text for text, drop in zip(texts, dropped, strict=True)]
    for prompts in (named, [(text, text) for text in texts]):
        pure, noise = (torch.randn(SIZE, 4, 8, 8, generator=generator) for _ in range(2))
        t = torch.randint(LOWEST, 1000 - LOWEST, (SIZE,), generator=generator)
        yield list(zip(pure, noise, t, prompts, strict=True))


def test_sfd_takes_the_steps_of_its_equation(task, make_pico_pipeline):
    bare = Bare(make_pico_pipeline())
    init = torch.tensor(INIT)
    signal = bare.schedule.alphas_cumprod[INIT]

    def made(pure, prompt):
        """x_0 of x_t = sqrt(1 - signal) pure, which holds no signal."""
        with torch.no_grad():
            found = bare.predict(torch.zeros(4, 8, 8), pure, init, prompt)
        return (1 - signal).sqrt() * (pure - found) / signal.sqrt()

    def known(pure, noise, t, prompts):
        latent = made(pure, prompts[0])
        target = bare.at_base(bare.predict, latent, noise, t, prompts[1])
        return latent, noise, t, prompts[0], target

    def loss(step):
        forget, retain = ([known(*row) for row in rows] for rows in drawn(step))
        kept = mean(bare.error(*row) for row in retain)
        return mean(bare.error(*row) for row in forget) + ALPHA * kept

    config = replace(
        get_method("sfd").config,
        scope="xattn",
        alpha=ALPHA,
        init=INIT / 1000,
        lowest=LOWEST / 1000,
        retain_dropout=0.5,
        train=SGD,
    )
    check(get_method("sfd").edit(task, config).values, bare.train("attn2", loss))


@pytest.mark.parametrize("name", ["sfd", "hirm"])
def test_each_concept_comes_equally_often_however_few_its_prompts(task, monkeypatch, name):
    steps = []
    monkeypatch.setattr(
        f"erase.methods.{name}.fine_tune", lambda task, loss, batches, config: steps.append(batches)
    )
    both = Task(task.model, [SPEC, ConceptSpec("moon", "star", templates=("{}",))], NoData())
    config = replace(get_method(name).config, train=replace(SGD, batch_size=5))
    get_method(name).edit(both, config)
    of_step = {"sfd": lambda batch: batch[0][3], "hirm": lambda batch: batch[0]}[name]
    prompts = [prompt for step in range(6) for prompt in of_step(steps[0](step))]
    assert len(prompts) == 30 and prompts.count("moon") == 15
    of_heart = [prompt for prompt in prompts if prompt != "moon"]
    assert {of_heart.count(prompt) for prompt, _ in SPEC.pairs()} == {15 // len(SPEC.pairs())}


@pytest.mark.parametrize("name", ["sfd", "hirm"])
def test_a_mask_by_the_objective_alone_makes_no_latent(task, name):
    """`NoData` refuses."""
    mask = MaskConfig(rule="remap", density=0.3, batches=2)
    config = replace(get_method(name).config, mask=mask, train=replace(SGD, steps=1))
    assert get_method(name).edit(task, config).mask.count()


def test_sfd_without_retained_prompts_is_refused(task):
    with pytest.raises(ErasureError, match="retained prompts, and there are none"):
        get_method("sfd").edit(
            Task(task.model, [replace(SPEC, retain=())], NoData()), get_method("sfd").config
        )
