"""Concept ablation against its equation, written here once more on the bare UNet."""

from dataclasses import replace

from erase.methods import get_method
from tests.bare import (
    ANCHORS,
    PROMPTS,
    RETAINED,
    SGD,
    Bare,
    check,
    drawn_by_remap,
    mean,
    task_of,
)


def test_concept_ablation_follows_the_anchor_as_it_is_now(make_pico_pipeline):
    """The target is the present model's own prediction, without gradient; the timesteps and the
    noise of retain rows are drawn before those of forget rows."""
    bare, task = Bare(make_pico_pipeline()), task_of(make_pico_pipeline())

    def loss(step):
        retained, forgotten = drawn_by_remap(step)
        kept = mean(bare.error(*row[:3], RETAINED[row[3]]) for row in retained)
        forgot = []
        for row in forgotten:
            target = bare.predict(*row[:3], ANCHORS[row[3]]).detach()
            forgot.append(bare.error(*row[:3], PROMPTS[row[3]], target))
        return mean(forgot) + kept

    config = replace(get_method("concept-ablation").config, train=SGD)
    found = get_method("concept-ablation").edit(task, config).values
    check(found, bare.train(r"attn2\.to_[kv]\.", loss))
