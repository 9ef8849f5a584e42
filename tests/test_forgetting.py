"""Concept ablation, gradient ascent, NPO, SSD, Scissorhands and SalUn-soft: each against its
equations, written here once more on the bare UNet."""

import math
import re
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler

from erase.latents.latent_set import LatentSet, epoch_rows
from erase.latents.prepare import Given
from erase.losses import denoising_rows
from erase.methods import get_method
from erase.methods.npo import preference
from erase.methods.scissorhands import trimmed
from erase.methods.ssd import dampened
from erase.models import wrap
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.task import Task
from erase.training.config import MaskConfig, TrainConfig
from tests.families import FAMILIES

CONCEPT = ConceptSpec("heart", "mushroom", retain=("a moon",))
SIZE, STEPS, LR = 2, 3, 0.1
SGD = TrainConfig(steps=STEPS, lr=LR, batch_size=SIZE, optimizer="SGD")
PROMPTS = ("a heart", "a red heart", "a heart")
ANCHORS = ("a mushroom", "a red mushroom", "a mushroom")
RETAINED = ("a moon", "a blue tree", "a moon", "a fish")


def latents(n, seed):
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


FORGET = LatentSet(latents(3, 0), None, PROMPTS, ANCHORS)
RETAIN = LatentSet(latents(4, 1), None, RETAINED)


@pytest.fixture
def model(make_pico_pipeline):
    return wrap(make_pico_pipeline())


@pytest.fixture
def task(model):
    return Task(model, [CONCEPT], Given(FORGET, RETAIN))


class Bare:
    """The pico UNet alone, trained by SGD on a loss of single predictions."""

    def __init__(self, pipeline):
        self.pipeline, self.unet = pipeline, pipeline.unet
        self.schedule = DDIMScheduler.from_config(pipeline.scheduler.config)
        self.base = {k: v.detach().clone() for k, v in self.unet.state_dict().items()}

    def error(self, latent, noise, t, prompt, target=None):
        """Mean squared error of one latent's prediction against its noise, or another target."""
        found = self.predict(latent, noise, t, prompt)
        return (found - (noise if target is None else target)).square().mean()

    def predict(self, latent, noise, t, prompt):
        noisy = self.schedule.add_noise(latent[None], noise[None], t[None])
        text = self.pipeline.encode_prompt(prompt, "cpu", 1, False)[0]
        return self.unet(noisy, t[None], text).sample[0]

    def at_base(self, function, *args):
        now = {k: v.detach().clone() for k, v in self.unet.state_dict().items()}
        self.unet.load_state_dict(self.base)
        with torch.no_grad():
            found = function(*args)
        self.unet.load_state_dict(now)
        return found

    def train(self, pattern, loss):
        """SGD of `loss(step)` over the parameters whose names match the pattern."""
        for step in range(STEPS):
            trained = [p for name, p in self.unet.named_parameters() if re.search(pattern, name)]
            value = loss(step)
            slopes = torch.autograd.grad(value, [p.requires_grad_(True) for p in trained])
            with torch.no_grad():
                for p, slope in zip(trained, slopes, strict=True):
                    p -= LR * slope
        named = self.unet.named_parameters()
        return {f"unet.{name}": p.detach() for name, p in named if re.search(pattern, name)}


def drawn(points, step, seed):
    """Latent, noise, timestep and row of each of a step's rows, as `row_batches` draws them."""
    rows = epoch_rows(len(points), step * SIZE, SIZE, seed)
    generator = torch.Generator().manual_seed(step)
    t = torch.randint(1000, (SIZE,), generator=generator)
    noise = torch.randn((SIZE, 4, 8, 8), generator=generator)
    return [(points.latents[row], noise[i], t[i], row) for i, row in enumerate(rows)]


def check(found, expected):
    assert expected and expected.keys() <= found.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=2e-6), name


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# ---- gradient ascent, and the few-shot text encoder ----------------------------------------------


def test_ascent_takes_the_steps_of_its_equation(task, make_pico_pipeline):
    bare = Bare(make_pico_pipeline())

    def loss(step):
        forgot = mean(bare.error(*row[:3], PROMPTS[row[3]]) for row in drawn(FORGET, step, 0))
        kept = mean(bare.error(*row[:3], RETAINED[row[3]]) for row in drawn(RETAIN, step, 1))
        return -forgot + 0.7 * kept

    config = replace(get_method("ascent").config, scope="xattn", alpha=0.7, ceiling=1e9, train=SGD)
    check(get_method("ascent").edit(task, config).values, bare.train("attn2", loss))


def test_a_latent_above_the_ceiling_is_pushed_no_further(task):
    config = replace(get_method("ascent").config, alpha=0.0, ceiling=1e-6, train=SGD)
    found = get_method("ascent").edit(task, config)
    base = task.model.parameters()
    assert all(torch.equal(value, base[name]) for name, value in found.values.items())


def test_few_shot_moves_the_words_alone_and_the_error_rises(task):
    config = get_method("few-shot").config
    train = replace(config.train, steps=12, lr=1e-3, optimizer_args={})
    found = get_method("few-shot").edit(task, replace(config, train=train))
    assert all(name.startswith("text_encoder.") and ".mlp." in name for name in found.values)
    assert mean(found.losses[-4:]) < mean(found.losses[:4]) - 0.01


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_few_shot_finds_the_words_of_every_encoder(family):
    model = wrap(FAMILIES[family](), family)
    scope = Task(model, [CONCEPT]).weights(get_method("few-shot").config.scope)
    assert {name.split(".")[0] for name in scope} == {"text_encoder", "text_encoder_2"}


# ---- NPO -----------------------------------------------------------------------------------------


def test_npo_takes_the_steps_of_its_equation(task, make_pico_pipeline):
    bare, beta = Bare(make_pico_pipeline()), 5.0

    def loss(step):
        rows = [(*row[:3], PROMPTS[row[3]]) for row in drawn(FORGET, step, 0)]
        references = [bare.at_base(bare.error, *row) for row in rows]
        kept = mean(bare.error(*row[:3], RETAINED[row[3]]) for row in drawn(RETAIN, step, 1))
        terms = []
        for row, reference in zip(rows, references, strict=True):
            rise = bare.error(*row) - reference
            terms.append(-2 / beta * torch.log(1 / (1 + torch.exp(-beta * rise))))
        return mean(terms) + 0.7 * kept

    config = replace(get_method("npo").config, scope="xattn", beta=beta, alpha=0.7, train=SGD)
    check(get_method("npo").edit(task, config).values, bare.train("attn2", loss))


def slope_of(rise, beta):
    error = torch.tensor([1.0 + rise], dtype=torch.double, requires_grad=True)
    reference = torch.ones(1, dtype=torch.double)
    return float(torch.autograd.grad(preference(error, reference, beta), error)[0])


def test_npo_is_ascent_at_the_base_and_with_a_small_beta():
    assert slope_of(0.0, 20.0) == pytest.approx(-1)
    assert slope_of(0.5, 1e-7) == pytest.approx(-1)


def test_npo_lets_go_of_a_latent_as_its_error_rises():
    slopes = [slope_of(rise, 20.0) for rise in (-0.1, 0.0, 0.1, 0.3)]
    assert slopes == sorted(slopes) and abs(slopes[-1]) < 0.01
    assert slope_of(0.1, 20.0) == pytest.approx(-2 / (1 + math.exp(2)))


# ---- concept ablation ----------------------------------------------------------------------------


def test_concept_ablation_follows_the_anchor_as_it_is_now(task, make_pico_pipeline):
    """The target is the present model's own prediction, without gradient; the timesteps and the
    noise of retain rows are drawn before those of forget rows."""
    bare = Bare(make_pico_pipeline())

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


# ---- SSD -----------------------------------------------------------------------------------------


def test_dampening_by_hand():
    weight = torch.tensor([4.0, 4.0, 4.0, 4.0, -4.0, 4.0])
    forget = torch.tensor([1.0, 20.0, 20.0, 10.0, 40.0, 0.0])
    retain = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    expected = torch.tensor([4.0, 0.2, 0.0, 4.0, -0.1, 4.0])
    assert torch.allclose(dampened(weight, forget, retain, 10, 1), expected)
    stronger = dampened(weight, forget, retain, 0.5, 30)
    assert torch.equal(stronger[[0, 1, 3, 5]], weight[[0, 1, 3, 5]]), "none grows"


def test_ssd_dampens_by_the_gradients_of_single_latents(task, make_pico_pipeline):
    bare, config = Bare(make_pico_pipeline()), replace(get_method("ssd").config, samples=5)
    config = replace(config, scope="xattn", alpha=1.5)
    names = [name for name, _ in bare.unet.named_parameters() if "attn2" in name]
    params = dict(bare.unet.named_parameters())
    squares = {}
    for kind, points, prompts, seed in (("f", FORGET, PROMPTS, 0), ("r", RETAIN, RETAINED, 1)):
        total = {name: torch.zeros_like(params[name]) for name in names}
        for step in range(5):
            row = int(epoch_rows(len(points), step, 1, seed))
            generator = torch.Generator().manual_seed(step)
            t = torch.randint(1000, (1,), generator=generator)[0]
            noise = torch.randn((1, 4, 8, 8), generator=generator)[0]
            loss = bare.error(points.latents[row], noise, t, prompts[row])
            tensors = [params[name].requires_grad_(True) for name in names]
            for name, slope in zip(names, torch.autograd.grad(loss, tensors), strict=True):
                total[name] += slope.square()
        squares[kind] = total

    found, moved = get_method("ssd").edit(task, config).values, 0
    for name in names:
        w, f, r = params[name].detach(), squares["f"][name], squares["r"][name]
        expected = torch.where(f > 1.5 * r, w * torch.minimum(r / f, torch.ones(())), w)
        near = (f / (1.5 * r) - 1).abs() < 1e-3  # rounding decides
        value = found[f"unet.{name}"]
        assert torch.allclose(value[~near], expected[~near], rtol=1e-3, atol=1e-7)
        assert (value.abs() <= w.abs()).all()
        moved += int((value != w).sum())
    assert 0 < moved < sum(params[name].numel() for name in names)


# ---- Scissorhands --------------------------------------------------------------------------------


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


# ---- SalUn-soft ----------------------------------------------------------------------------------


def test_salun_soft_is_sparse_without_a_mask(task):
    train = TrainConfig(steps=6, batch_size=2, lr=1e-3)
    soft = replace(get_method("salun-soft").config, train=train, prox_l1=0.6)
    dense = replace(get_method("salun").config, train=train, mask=MaskConfig(density=1.0))
    base, shares = task.model.parameters(), []
    for name, config in (("salun-soft", soft), ("salun", dense)):
        found = get_method(name).edit(task, config)
        assert found.mask is None
        changed = sum(int((value != base[n]).sum()) for n, value in found.values.items())
        shares.append(changed / sum(value.numel() for value in found.values.values()))
    assert 0 < shares[0] < 0.5 < shares[1]


def test_errors_of_rows_average_to_the_error_of_all():
    one, other = latents(5, 2), latents(5, 3)
    rows = denoising_rows(one, other)
    assert rows.shape == (5,)
    assert rows.mean() == pytest.approx(float((one - other).square().mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("method", "setting", "value"),
    [
        ("ascent", "ceiling", 0),
        ("ascent", "alpha", -1),
        ("npo", "beta", 0),
        ("ssd", "samples", 0),
        ("ssd", "alpha", -1),
        ("scissorhands", "cut", 0),
        ("rece", "rounds", -1),
        ("rece", "ridge", 0),
        ("speed", "threshold", 1.5),
        ("speed", "copies", -1),
    ],
)
def test_settings_out_of_range_are_refused(method, setting, value):
    with pytest.raises(ErasureError, match=setting):
        replace(get_method(method).config, **{setting: value})
