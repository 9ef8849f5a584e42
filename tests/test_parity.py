"""Parity with SalUn's equations, against a literal, slow reimplementation written here from the
paper and the notes on its code.

The reference functions use plain torch on the bare UNet: one forward pass per prediction, no cache,
no packing, no batching of forget with retain rows.
"""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from erase.latents.latent_set import Given, LatentSet, epoch_rows
from erase.losses import guided
from erase.methods.salun import METHODS, SalUnConfig, SalUnHalfConfig
from erase.models.scopes import select
from erase.models.sd import StableDiffusion
from erase.objectives.remap import Remap
from erase.prompts.concepts import ConceptSpec
from erase.task import Task
from erase.training.config import MaskConfig, TrainConfig
from erase.training.loop import fit
from erase.training.saliency import compute_saliency
from erase.training.trainable import Trainable

FORGET, ANCHOR = "a red heart", "a red star"


# ---- the reference -------------------------------------------------------------------------------


def reference_alphas():
    betas = [
        ((1000 - 1 - i) * math.sqrt(0.00085) + i * math.sqrt(0.012)) / (1000 - 1)
        for i in range(1000)
    ]
    alphas, product = [], 1.0
    for beta in betas:
        product *= 1 - beta * beta
        alphas.append(product)
    return torch.tensor(alphas, dtype=torch.float64).float()


def reference_noisy(x0, noise, t):
    alphas = reference_alphas()
    return torch.stack(
        [
            alphas[k].sqrt() * x + (1 - alphas[k]).sqrt() * n
            for x, n, k in zip(x0, noise, t, strict=True)
        ]
    )


def reference_saliency(unet, batches, text, null, detach_null=False):
    """|sum of gradients| of -MSE(noise, 8.5 eps_c - 7.5 eps_null), over every UNet weight."""
    params = dict(unet.named_parameters())
    sums = {name: torch.zeros_like(p) for name, p in params.items()}
    for xt, noise, t in batches:
        n = len(xt)
        conditional = unet(xt, t, text.expand(n, -1, -1)).sample
        unconditional = unet(xt, t, null.expand(n, -1, -1)).sample
        unconditional = unconditional.detach() if detach_null else unconditional
        loss = -((noise - ((1 + 7.5) * conditional - 7.5 * unconditional)) ** 2).mean()
        for name, grad in zip(
            params, torch.autograd.grad(loss, list(params.values())), strict=True
        ):
            sums[name] += grad
    return {name: total.abs() for name, total in sums.items()}


def reference_training(unet, batches, mask, alpha, lr, frozen=None, beyond=0.0):
    """Adam on MSE(eps_f, sg target) + alpha * retain MSE, gradients times mask; the target is
    eps_anchor + beyond * (eps_anchor - eps_concept) by the teacher `frozen`, None the present
    weights."""
    for p in unet.parameters():
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(unet.parameters(), lr=lr)
    for b in batches:
        teacher = frozen or unet
        with torch.no_grad():
            target = teacher(b.anchor, b.t, b.anchor_text).sample
            if beyond:
                target += beyond * (target - teacher(b.anchor, b.t, b.forget_text).sample)
            kept = frozen(b.retain, b.retain_t, b.retain_text).sample if frozen else b.retain_noise
        forgot = unet(b.forget, b.t, b.forget_text).sample
        retained = unet(b.retain, b.retain_t, b.retain_text).sample
        loss = ((forgot - target) ** 2).mean() + alpha * ((retained - kept) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        for name, p in unet.named_parameters():
            p.grad *= mask[f"unet.{name}"]
        optimizer.step()
    return {f"unet.{name}": p.detach() for name, p in unet.named_parameters()}


# ---- the world of these tests --------------------------------------------------------------------


@pytest.fixture
def setting(make_pico_pipeline):
    torch.manual_seed(0)
    pipeline = make_pico_pipeline()
    model = StableDiffusion(pipeline)
    n = 11
    forget = LatentSet(
        torch.randn(n, 4, 8, 8), 0.3 * torch.rand(n, 4, 8, 8), (FORGET,) * n, (ANCHOR,) * n
    )
    retain = LatentSet(
        torch.randn(7, 4, 8, 8),
        None,
        tuple(f"a blue {o}" for o in "moon tree fish ring moon tree fish".split()),
    )
    return SimpleNamespace(model=model, unet=pipeline.unet, forget=forget, retain=retain)


CONCEPT = [ConceptSpec("heart", "star", retain=("a photo of a moon",))]


def task_of(setting):
    return Task(setting.model, CONCEPT, Given(setting.forget, setting.retain))


def remap_of(setting, config):
    return Remap(task_of(setting), config)


def text_of(setting, prompts):
    """Text states of the bare encoder, one prompt at a time."""
    return torch.cat(
        [setting.model.pipeline().encode_prompt(p, "cpu", 1, False)[0] for p in prompts]
    )


def plain(setting, remap, batch):
    """What a batch of ours holds, as single tensors."""
    forget, anchor, retain = batch.forget, batch.anchor, batch.retain
    n, kept = len(forget), [remap.retain_set.prompts[row] for row in batch.retain_rows]
    return SimpleNamespace(
        forget=forget.noisy, anchor=anchor.noisy, t=forget.t,
        retain=retain.noisy, retain_t=retain.t, retain_noise=retain.target,
        forget_text=text_of(setting, [FORGET] * n), anchor_text=text_of(setting, [ANCHOR] * n),
        retain_text=text_of(setting, kept),
    )  # fmt: skip


def saliency_batches(setting, size=4):
    """What compute_saliency draws, drawn here once more: per batch its latents, then t, then noise,
    from the batch's own seed."""
    for start in range(0, len(setting.forget), size):
        rows = torch.arange(start, min(start + size, len(setting.forget)))
        generator = torch.Generator().manual_seed(start)
        x0 = setting.forget.latents[rows] + setting.forget.std[rows] * torch.randn(
            (len(rows), 4, 8, 8), generator=generator
        )
        t = torch.randint(1000, (len(rows),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        yield reference_noisy(x0, noise, t), noise, t


def our_saliency(setting):
    return compute_saliency(task_of(setting), SalUnConfig(mask=MaskConfig(batch_size=4)))


# ---- the parity list -----------------------------------------------------------------------------


def test_1_noise_schedule_and_forward_process(setting):
    x0 = torch.randn(5, 4, 8, 8)
    noise = torch.randn(5, 4, 8, 8)
    t = torch.tensor([0, 1, 500, 998, 999])
    assert torch.allclose(
        setting.model.add_noise(x0, noise, t), reference_noisy(x0, noise, t), atol=1e-6
    )


def test_2_saliency_has_both_guidance_branches_live(setting):
    text, null = text_of(setting, [FORGET]), text_of(setting, [""])
    setting.unet.requires_grad_(True)
    expected = reference_saliency(setting.unet, saliency_batches(setting), text, null)
    detached = reference_saliency(
        setting.unet, saliency_batches(setting), text, null, detach_null=True
    )
    ours = our_saliency(setting).values
    scale = max(v.max() for v in expected.values())
    assert all(
        torch.allclose(ours[f"unet.{name}"], value, rtol=1e-3, atol=1e-5 * scale)
        for name, value in expected.items()
    )
    assert not all(
        torch.allclose(ours[f"unet.{name}"], value, rtol=1e-2, atol=1e-4 * scale)
        for name, value in detached.items()
    )
    c, u = torch.tensor(2.0), torch.tensor(1.0)
    assert guided(c, u, 7.5) == 8.5 * c - 7.5 * u


def test_4_5_mask_keeps_the_highest_int_n_rho_over_all_unet_weights(setting):
    saliency = our_saliency(setting)
    mask = saliency.cut(0.5)
    total = sum(p.numel() for p in setting.unet.parameters())
    assert mask.size == total and mask.count() == int(total * 0.5)
    lowest_kept = min(
        v[mask[name]].min() for name, v in saliency.values.items() if mask[name].any()
    )
    highest_dropped = max(
        v[~mask[name]].max() for name, v in saliency.values.items() if (~mask[name]).any()
    )
    assert lowest_kept >= highest_dropped


def test_6_anchor_target_is_from_current_weights_and_takes_no_gradient(setting):
    params = select(setting.model.parameters(), "full")
    losses = {}
    for source in ("current", "frozen"):
        config = SalUnHalfConfig(
            anchor_from=source, retain_target="noise", train=TrainConfig(batch_size=4)
        )
        remap = remap_of(setting, config)
        batch = remap.batches(0)
        trainable = Trainable(params)
        before = sum(remap.loss(batch, trainable.base).values()).item()
        for value in trainable.values.values():
            value.data += 0.02
        trainable.put()
        losses[source] = (before, sum(remap.loss(batch, trainable.base).values()).item())
        trainable.close()
    assert losses["current"][0] == losses["frozen"][0]  # at the base, both teachers are the same
    assert losses["current"][1] != losses["frozen"][1]  # one step away, they are not


def test_7_forget_and_anchor_latents_are_independent_samples(setting):
    paper = remap_of(setting, METHODS["salun-paper"].config).batches(0)
    shared = remap_of(setting, METHODS["salun"].config).batches(0)
    apart = paper.forget.noisy - paper.anchor.noisy
    assert apart.any() and torch.equal(shared.forget.noisy, shared.anchor.noisy)
    # the same noise and timestep: the difference is the posterior's alone, scaled by the signal
    assert torch.equal(paper.forget.t, paper.anchor.t)
    signal = reference_alphas()[paper.forget.t].sqrt().view(-1, 1, 1, 1)
    assert (apart / signal).abs().max() < 0.3 * 8


def test_8_loss_is_forget_plus_alpha_times_noise_mse(setting):
    remap = remap_of(setting, METHODS["salun-paper"].config)
    batch = remap.batches(0)
    terms = remap.loss(batch, nullcontext)
    b, unet = plain(setting, remap, batch), setting.unet
    forgot = unet(b.forget, b.t, b.forget_text).sample
    target = unet(b.anchor, b.t, b.anchor_text).sample
    retained = unet(b.retain, b.retain_t, b.retain_text).sample
    assert torch.allclose(terms["forget"], ((forgot - target) ** 2).mean(), rtol=1e-5)
    assert torch.allclose(
        terms["retain"], 0.1 * ((retained - b.retain_noise) ** 2).mean(), rtol=1e-5
    )


@pytest.mark.parametrize("preset", ["salun-paper", "salun"])
def test_9_10_trajectory_of_the_masked_training(setting, make_pico_pipeline, preset):
    """Ten steps equal the literal loop's; frozen weights bit for bit, masked-in ones move."""
    config = METHODS[preset].config
    config = SalUnConfig(**{**vars(config), "train": TrainConfig(steps=10, lr=1e-4, batch_size=4)})
    params = select(setting.model.parameters(), "full")
    mask = our_saliency(setting).cut(0.5)
    remap = remap_of(setting, config)
    batches = [plain(setting, remap, remap.batches(step)) for step in range(10)]
    frozen = make_pico_pipeline().unet if preset == "salun" else None
    expected = reference_training(
        make_pico_pipeline().unet, batches, mask, config.alpha, 1e-4, frozen, config.beyond
    )
    base = {name: p.detach().clone() for name, p in params.items()}
    fitted = fit(params, remap.loss, remap.batches, config, mask).values
    for name, value in fitted.items():
        # Adam normalises by |g|: coordinates with gradients at rounding level take steps of either
        # sign, so a few may differ by 2 * lr a step
        assert (value - expected[name]).abs().max() <= 2e-3
        assert torch.equal(value[~mask[name]], base[name][~mask[name]])
    moved = torch.cat([(fitted[name] != base[name])[mask[name]] for name in fitted]).float().mean()
    close = (
        torch.cat([((fitted[name] - expected[name]).abs() < 1e-5).reshape(-1) for name in fitted])
        .float()
        .mean()
    )
    assert moved > 0.99 and close > 0.995


def test_11_every_forget_row_once_per_epoch():
    for shuffle in (True, False):
        stream = torch.cat(
            [epoch_rows(11, step * 4, 4, seed=0, shuffle=shuffle) for step in range(11)]
        )
        for epoch in stream.view(4, 11):
            assert sorted(epoch.tolist()) == list(range(11))
    assert epoch_rows(11, 0, 11, 0, shuffle=False).tolist() == list(range(11))
    # a new order in each epoch
    assert epoch_rows(11, 0, 11, 0).tolist() != epoch_rows(11, 11, 11, 0).tolist()


def test_12_xattn_is_attn2_and_a_full_mask_restricted_to_it_has_another_density(setting):
    mask = our_saliency(setting).cut(0.5)
    chosen = select(setting.model.parameters(), "xattn")
    assert chosen and set(chosen) == {name for name in mask.bits if "attn2" in name}
    density = sum(int(mask[name].sum()) for name in chosen) / sum(
        p.numel() for p in chosen.values()
    )
    assert abs(density - 0.5) > 0.02


def test_13_published_settings():
    paper = METHODS["salun-paper"].config
    mask = paper.mask
    assert (mask.rule, mask.density, mask.guidance, mask.batch_size) == ("forget", 0.5, 7.5, 8)
    assert paper.scope == "full"
    assert (
        paper.alpha,
        paper.train.lr,
        paper.train.batch_size,
        paper.train.steps,
        paper.train.optimizer,
    ) == (
        0.1,
        1e-5,
        8,
        100,
        "Adam",
    )
    assert (paper.anchor_from, paper.retain_target, paper.share_latents) == (
        "current",
        "noise",
        False,
    )
    assert (paper.anchor_latents, paper.retain_dropout) == (0.0, 0.0)
    from erase.prompts.concepts import load_concepts

    nudity = load_concepts("nudity-salun")[0]
    assert nudity.pairs() == [("a photo of a nude person", "a photo of a person wearing clothes")]
    assert nudity.retain == ("a photo of a person wearing clothes",)
    classes = load_concepts("imagenette-salun")
    assert [c.anchor for c in classes] == [classes[(i + 1) % 10].target for i in range(10)]
    assert classes[0].pairs()[0][0] == "an image of a tench"


def test_mask_is_what_keeps_weights_not_luck(setting):
    """Regression for the public code's `n in parameters`: without a mask far more weights move than
    with one."""
    counts = {}
    for rule in ("forget", "none"):
        config = SalUnConfig(
            mask=MaskConfig(rule=rule, density=0.1), train=TrainConfig(steps=2, batch_size=4)
        )
        edit = METHODS["salun"].edit(task_of(setting), config)
        base = setting.model.parameters()
        counts[rule] = sum(int((value != base[name]).sum()) for name, value in edit.values.items())
    assert (
        counts["forget"] <= 0.1 * sum(p.numel() for p in setting.unet.parameters()) < counts["none"]
    )
