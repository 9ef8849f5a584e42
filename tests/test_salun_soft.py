"""SalUn-soft against its equation, written here once more on the bare UNet; and what it leaves."""

from dataclasses import replace

from erase.methods import get_method
from erase.training.config import MaskConfig, TrainConfig
from tests.bare import (
    ANCHORS,
    PROMPTS,
    RETAINED,
    SGD,
    SIZE,
    Bare,
    check,
    drawn_by_remap,
    mean,
    task_of,
)

SOFT = get_method("salun-soft").config


def test_salun_soft_takes_the_steps_of_its_equation(make_pico_pipeline):
    """Forget to the base's prediction under the anchor, retain to the base's own, then the proximal
    step; the timesteps and the noise of retain rows are drawn first."""
    bare, task, prox = Bare(make_pico_pipeline()), task_of(make_pico_pipeline()), 2e-5

    def loss(step):
        retained, forgotten = drawn_by_remap(step)
        rows = [(*row[:3], RETAINED[row[3]], RETAINED[row[3]]) for row in retained]
        rows += [(*row[:3], PROMPTS[row[3]], ANCHORS[row[3]]) for row in forgotten]
        targets = [bare.at_base(bare.predict, *row[:3], row[4]) for row in rows]
        errors = [bare.error(*row[:4], target) for row, target in zip(rows, targets, strict=True)]
        return 0.7 * mean(errors[:SIZE]) + mean(errors[SIZE:])

    config = replace(SOFT, scope="xattn", alpha=0.7, retain_dropout=0.0, prox_l1=prox, train=SGD)
    found = get_method("salun-soft").edit(task, config).values
    expected = bare.train("attn2", loss, prox)
    check(found, expected)
    base = task.model.parameters()
    moved = mean(float((found[name] != base[name]).float().mean()) for name in expected)
    assert 0.05 < moved < 0.95, "the step is to stop some weights and not others"


def test_salun_soft_is_sparse_without_a_mask(make_pico_pipeline):
    task, train = task_of(make_pico_pipeline()), TrainConfig(steps=4, batch_size=2, lr=1e-3)
    soft = replace(SOFT, train=train, prox_l1=0.6)
    dense = replace(get_method("salun-half").config, train=train, mask=MaskConfig(density=1.0))
    base, shares = task.model.parameters(), []
    for name, config in (("salun-soft", soft), ("salun-half", dense)):
        found = get_method(name).edit(task, config)
        assert found.mask is None
        changed = sum(int((value != base[n]).sum()) for n, value in found.values.items())
        shares.append(changed / sum(value.numel() for value in found.values.values()))
    assert 0 < shares[0] < 0.5 < shares[1]
