"""Concept ablation against its equation, written here once more on the bare UNet."""

from dataclasses import replace

import torch

from erase.latents.latent_set import epoch_rows
from erase.methods import get_method
from tests.bare import (
    ANCHORS,
    FORGET,
    PROMPTS,
    RETAIN,
    RETAINED,
    SGD,
    SIZE,
    Bare,
    check,
    mean,
    task_of,
)


def test_concept_ablation_follows_the_anchor_as_it_is_now(make_pico_pipeline):
    """The target is the present model's own prediction, without gradient; the timesteps and the
    noise of retain rows are drawn before those of forget rows."""
    bare, task = Bare(make_pico_pipeline()), task_of(make_pico_pipeline())

    def loss(step):
        generator, batches = torch.Generator().manual_seed(step), []
        for points, seed in ((RETAIN, 1), (FORGET, 0)):
            rows = epoch_rows(len(points), step * SIZE, SIZE, seed)
            t = torch.randint(1000, (SIZE,), generator=generator)
            noise = torch.randn((SIZE, 4, 8, 8), generator=generator)
            batches.append([(points.latents[r], noise[i], t[i], r) for i, r in enumerate(rows)])
        kept = mean(bare.error(*row[:3], RETAINED[row[3]]) for row in batches[0])
        forgot = []
        for row in batches[1]:
            target = bare.predict(*row[:3], ANCHORS[row[3]]).detach()
            forgot.append(bare.error(*row[:3], PROMPTS[row[3]], target))
        return mean(forgot) + kept

    config = replace(get_method("concept-ablation").config, train=SGD)
    found = get_method("concept-ablation").edit(task, config).values
    check(found, bare.train(r"attn2\.to_[kv]\.", loss))
