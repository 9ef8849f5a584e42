"""EraseDiff and Scissorhands against their equations, written here once more on the bare UNet."""

import re
from dataclasses import replace

import pytest
import torch

from erase.methods import get_method
from erase.methods.scissorhands import trimmed
from erase.prompts.errors import ErasureError
from tests.bare import (
    ANCHORS,
    FORGET,
    LR,
    PROMPTS,
    RETAINED,
    SGD,
    STEPS,
    Bare,
    check,
    drawn,
    drawn_by_remap,
    mean,
    task_of,
)


@pytest.fixture
def task(make_pico_pipeline):
    return task_of(make_pico_pipeline())


class Bilevel(Bare):
    """Two losses that are weighed anew at each step."""

    def losses(self, step):
        retained, forgotten = drawn_by_remap(step)
        kept = mean(self.error(*row[:3], RETAINED[row[3]]) for row in retained)
        forgot = []
        for row in forgotten:
            target = self.predict(*row[:3], ANCHORS[row[3]]).detach()
            forgot.append(self.error(*row[:3], PROMPTS[row[3]], target))
        return mean(forgot), kept

    def trained(self, pattern):
        named = self.unet.named_parameters()
        return [p.requires_grad_(True) for name, p in named if re.search(pattern, name)]

    def down(self, pattern, slopes):
        with torch.no_grad():
            for p, slope in zip(self.trained(pattern), slopes, strict=True):
                p -= LR * slope

    def train_bilevel(self, pattern, rate, inner):
        """The algorithm with its inner loop: K steps down the forget loss tell what it comes to;
        the model is put back, and steps down L_r + lambda (L_f - what it comes to)."""
        factors = []
        for step in range(STEPS):
            state = {k: v.detach().clone() for k, v in self.unet.state_dict().items()}
            for _ in range(inner):
                forgot, _ = self.losses(step)
                self.down(pattern, torch.autograd.grad(forgot, self.trained(pattern)))
            reached = self.losses(step)[0].detach()
            self.unet.load_state_dict(state)

            params, (forgot, kept) = self.trained(pattern), self.losses(step)
            gap = forgot - reached
            f, r = (
                torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
                for loss in (gap, kept)
            )
            dot = sum((x * y).sum() for x, y in zip(f, r, strict=True))
            factor = max(0.0, rate - float(dot / sum(x.square().sum() for x in f)))
            self.down(pattern, torch.autograd.grad(kept + factor * gap, params))
            factors.append(factor)
        named = self.unet.named_parameters()
        found = {f"unet.{name}": p.detach() for name, p in named if re.search(pattern, name)}
        return found, factors

    def train_guarded(self, pattern, alpha):
        for step in range(STEPS):
            params, losses = self.trained(pattern), self.losses(step)
            f, r = (torch.autograd.grad(loss, params, retain_graph=True) for loss in losses)
            dot = sum((x * y).sum() for x, y in zip(f, r, strict=True)) * alpha
            factor = max(1.0, -float(dot / sum(x.square().sum() for x in f)))
            self.down(pattern, [alpha * y + factor * x for x, y in zip(f, r, strict=True)])
        named = self.unet.named_parameters()
        return {f"unet.{name}": p.detach() for name, p in named if re.search(pattern, name)}


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_erasediff_takes_the_steps_of_its_algorithm(task, make_pico_pipeline, rate):
    config = replace(get_method("erasediff").config, scope="xattn", barrier=rate, train=SGD)
    found = get_method("erasediff").edit(task, config).values
    expected, factors = Bilevel(make_pico_pipeline()).train_bilevel("attn2", rate, inner=2)
    check(found, expected)
    assert any(factor != rate for factor in factors), "the losses met, so that lambda was weighed"


def test_scissorhands_cuts_what_the_concept_needs_most(task, make_pico_pipeline):
    """|w sum g| of the denoising error, written out; the rest keeps its bits."""
    bare, config = Bare(make_pico_pipeline()), get_method("scissorhands").config
    config = replace(config, cut=0.1, cut_batches=2, train=SGD)
    params = {n: p for n, p in bare.unet.named_parameters() if "attn2" in n}
    total = 0
    for step in range(2):
        loss = mean(bare.error(*row[:3], PROMPTS[row[3]]) for row in drawn(FORGET, step, 0))
        tensors = [param.requires_grad_(True) for param in params.values()]
        slopes = torch.autograd.grad(loss, tensors)
        total = total + torch.cat([slope.flatten() for slope in slopes])
    weights = torch.cat([param.detach().flatten() for param in params.values()])
    count = len(weights) // 10
    expected = (weights * total).abs().topk(count).indices

    values = trimmed(task, config)
    after = torch.cat([values[f"unet.{name}"].flatten() for name in params])
    changed = (after != weights).nonzero().flatten()
    shared = set(changed.tolist()) & set(expected.tolist())
    assert len(changed) <= count and len(shared) > 0.99 * count


def test_scissorhands_repairs_from_the_cut(task):
    """A step of nothing leaves the cut, and nothing else."""
    config = replace(get_method("scissorhands").config, cut=0.1, cut_batches=2)
    config = replace(config, train=replace(SGD, lr=1e-30))
    found, start = get_method("scissorhands").edit(task, config).values, trimmed(task, config)
    assert all(torch.equal(found[name], value) for name, value in start.items())


@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_scissorhands_repairs_by_its_equation(task, make_pico_pipeline, alpha):
    """From the cut on, nearest to the gradient of the sum while the forget loss does not rise:
    grad L_r + lambda grad L_f, lambda at least 1 / alpha."""
    method = get_method("scissorhands")
    config = replace(method.config, cut=0.05, cut_batches=1, alpha=alpha, train=SGD)
    bare = Bilevel(make_pico_pipeline())
    bare.unet.load_state_dict(
        {**bare.base, **{n.removeprefix("unet."): v for n, v in trimmed(task, config).items()}}
    )
    found = method.edit(task, config).values
    check(found, bare.train_guarded("attn2", alpha))


@pytest.mark.parametrize(
    ("method", "setting", "value"),
    [("scissorhands", "cut", 0), ("scissorhands", "cut_batches", 0), ("erasediff", "barrier", -1)],
)
def test_settings_out_of_range_are_refused(method, setting, value):
    with pytest.raises(ErasureError, match=setting):
        replace(get_method(method).config, **{setting: value})


def test_a_cut_of_no_weight_is_refused_before_latents_are_made(make_pico_pipeline, monkeypatch):
    monkeypatch.setattr("erase.methods.scissorhands.Remap", lambda *_: pytest.fail("sampled"))
    config = replace(get_method("scissorhands").config, cut=1e-9)
    with pytest.raises(ErasureError, match=r"^cut 1e-09 of \d+ weights draws none anew"):
        get_method("scissorhands").edit(task_of(make_pico_pipeline()), config)
