"""The rows of the classifier bench: ways to unlearn, and what each may choose from.

Everything that takes gradient steps does so in `erase.training.loop.fit`, and every mask is cut by
`erase.training.rules` from the statistics of `erase.training.statistics`, as for diffusion models.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from erase.latents.latent_set import epoch_rows
from erase.mask import SaliencyMask
from erase.scripts.bench.classifier_data import CLASSES, Samples, Split, network, split
from erase.training.config import TrainConfig, TunedConfig
from erase.training.loop import Batches, LossFn, fit
from erase.training.rules import RULES, scores
from erase.training.statistics import Accumulator, Statistics
from erase.training.trainable import gradients_on

TRAIN = TrainConfig(steps=500, lr=3e-3, schedule="linear", batch_size=32)
"""of the base and of Retrain"""
STEPS, SIZE = 50, 32
"""of unlearning: steps; forget rows, and retain rows, of each"""
BATCHES = 24
"""batches whose gradients the rules look at, as `mask.batches` has it"""
RETRAIN_SEED, AGAIN_SEED = 1_000, 2_000
"""beside the seed of the world: Retrain starts at other weights than the base, and in another
order"""
DENSITIES = (0.01, 0.1, 0.5)
MATCHED = "matched-random, "
CONTROLS = (f"{MATCHED}benefit", "random")
FAST, SLOW = (1e-3, 3e-3, 1e-2, 3e-2), (1e-5, 3e-5, 1e-4, 3e-4)
"""learning rates to choose from, of descent and of ascent"""
TERMS = {"objective": "forget", "retain": "retain"}
"""source of statistics -> term of the training's loss"""


@dataclass(frozen=True)
class Batch:
    """Rows of one step."""

    forget: Tensor
    labels: Tensor
    wrong: Tensor
    """labels drawn uniformly from the others (Fan et al., eq. 5)"""
    retain: Tensor
    retain_labels: Tensor
    progress: Tensor
    """the fraction of the steps that is done, a copy per row"""
    share: Tensor
    """forgotten images over retained ones, a copy per row"""


@dataclass(frozen=True)
class World:
    """One split, its base and its Retrain; what costs time is made when it is asked for."""

    scenario: str
    seed: int

    @cached_property
    def split(self) -> Split:
        return split(self.scenario, self.seed)

    @cached_property
    def base(self) -> nn.Module:
        """Trained on everything."""
        return trained(self.split.train, self.seed)

    @cached_property
    def retrain(self) -> tuple[nn.Module, float]:
        """Trained without what is forgotten: the exact answer, and its CPU seconds."""
        return retrained(self, RETRAIN_SEED)

    def batch(self, step: int) -> Batch:
        """The rows of a step, a function of it alone."""
        forget = _rows(self.split.forget, step, self.seed)
        retain = _rows(self.split.retain, step, self.seed + 1)
        generator = torch.Generator().manual_seed(~(self.seed * 1_000_003 + step))
        shift = torch.randint(1, CLASSES, forget.labels.shape, generator=generator)
        wrong = (forget.labels + shift) % CLASSES
        progress = torch.full((SIZE,), step / STEPS)
        share = torch.full((SIZE,), len(self.split.forget) / len(self.split.retain))
        return Batch(
            forget.images, forget.labels, wrong, retain.images, retain.labels, progress, share
        )


@cache
def statistics(world: World, source: str) -> tuple[Mapping[str, Mapping[str, Tensor]], float]:
    """Sum and sum of squares of the gradients of one source, and the CPU seconds that they took.

    Sources: `forget`, one pass over the forgotten images, minus their loss (SalUn, eq. 3);
    `objective` and `retain`, batches of training with random labels; and, image by image,
    `forget-each` and `train-each`.
    """
    net = copy.deepcopy(world.base)
    params = dict(net.named_parameters())
    started = time.process_time()
    totals = Accumulator(params, None, ("sum", "square"))
    with gradients_on(params), totals.collecting():
        for loss in _losses(world, source, net):
            loss.backward()
    return totals.finish(), time.process_time() - started


def _losses(world: World, source: str, net: nn.Module) -> Iterator[Tensor]:
    """One per batch of a source."""
    if source in TERMS:
        for batch in map(world.batch, range(BATCHES)):
            yield terms(net, batch, {}, "random-label")[TERMS[source]]
        return
    samples = world.split.train if source == "train-each" else world.split.forget
    size, sign = (SIZE, -1) if source == "forget" else (1, 1)
    for each in torch.arange(len(samples)).split(size):
        part = samples[each]
        yield sign * cross_entropy(net(part.images), part.labels)


def _rows(samples: Samples, step: int, seed: int) -> Samples:
    """The samples of one step; every epoch holds each once."""
    return samples[epoch_rows(len(samples), step * SIZE, SIZE, seed)]


@dataclass(frozen=True)
class Row:
    """A way to unlearn."""

    settings: tuple[dict[str, float], ...]
    """what it may choose from: an equal number for every row; none where there is nothing to
    choose"""
    unlearn: Callable[[World, Mapping[str, float]], tuple[nn.Module, float]]
    """(world, setting) -> network, and the CPU seconds that it took"""


def trained(samples: Samples, seed: int) -> nn.Module:
    """A network trained on these images from the start."""
    net = network(seed)

    def batches(step: int) -> tuple[Tensor, Tensor]:
        drawn = _rows(samples, step, seed)
        return drawn.images, drawn.labels

    def loss(batch: tuple[Tensor, Tensor], base: object) -> dict[str, Tensor]:
        images, labels = batch
        return {"retain": cross_entropy(net(images), labels)}

    return stepped(net, loss, batches, TRAIN)


def stepped(
    net: nn.Module,
    loss: LossFn,
    batches: Batches,
    train: TrainConfig,
    mask: SaliencyMask | None = None,
) -> nn.Module:
    """A copy of the network after the steps of the project's loop; `loss` runs the network itself,
    which is left as it was found."""
    fitted = fit(dict(net.named_parameters()), loss, batches, TunedConfig(train=train), mask)
    return with_values(net, fitted.values)


@torch.no_grad()
def with_values(net: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the network with other values."""
    other = copy.deepcopy(net)
    for name, param in other.named_parameters():
        param.copy_(values[name])
    return other


def terms(
    net: nn.Module, batch: Batch, setting: Mapping[str, float], kind: str
) -> dict[str, Tensor]:
    """The terms of the loss of one step.

    fine-tune: cross entropy of retained images. ascent: minus that of forgotten ones (Thudi et al.
    2022). l1-sparse: fine-tune + gamma (1 - progress) |theta|_1 (Jia et al. 2023, with the
    decreasing gamma that they found best). random-label: share x cross entropy of forgotten images
    under wrong labels + that of retained ones, so that each image counts the same (Golatkar et al.
    2020; under a mask, Fan et al. 2024, eq. 5).
    """
    if kind == "ascent":
        return {"forget": -cross_entropy(net(batch.forget), batch.labels)}
    found = {"retain": cross_entropy(net(batch.retain), batch.retain_labels)}
    if kind == "random-label":
        found["forget"] = batch.share[0] * cross_entropy(net(batch.forget), batch.wrong)
    if kind == "l1-sparse":
        norm = sum(param.abs().sum() for param in net.parameters())
        found["sparse"] = setting["gamma"] * (1 - batch.progress[0]) * norm
    return found


def tuned(
    world: World, setting: Mapping[str, float], kind: str, mask: SaliencyMask | None = None
) -> tuple[nn.Module, float]:
    """Gradient steps on the losses of `terms`."""
    net = copy.deepcopy(world.base)
    started = time.process_time()
    train = TrainConfig(steps=STEPS, lr=setting["lr"], schedule="linear", batch_size=SIZE)
    done = stepped(net, lambda b, base: terms(net, b, setting, kind), world.batch, train, mask)
    return done, time.process_time() - started


def masked(
    world: World, setting: Mapping[str, float], rule: str, density: float
) -> tuple[nn.Module, float]:
    """SalUn: random labels, where a rule's mask lets weights change."""
    like = rule.removeprefix(MATCHED)
    found, before = gathered(world, RULES[like].needs if like in RULES else ())
    started = time.process_time()
    params = dict(world.base.named_parameters())
    if rule == "random":
        mask = SaliencyMask.random(params, density, world.seed)
    else:
        mask = scores(found, like, params).cut(density)
    if rule.startswith(MATCHED):
        mask = mask.matched_random(world.seed)
    cutting = time.process_time() - started
    net, seconds = tuned(world, setting, "random-label", mask)
    return net, before + cutting + seconds


def gathered(world: World, needs: tuple[str, ...]) -> tuple[Statistics, float]:
    """The statistics that a rule needs, and the CPU seconds that their sources took."""
    found, seconds = {}, 0.0
    for source in dict.fromkeys(name.partition(".")[0] for name in needs):
        kinds, took = statistics(world, source)
        seconds += took
        found |= {f"{source}.{kind}": values for kind, values in kinds.items()}
    return Statistics(found), seconds


def dampened(world: World, setting: Mapping[str, float]) -> tuple[nn.Module, float]:
    """Selective Synaptic Dampening (Foster et al., AAAI 2024): see `dampen`; importance is the mean
    squared gradient, image by image."""
    whole, first = statistics(world, "train-each")
    part, second = statistics(world, "forget-each")
    started = time.process_time()
    values = {}
    for name, value in world.base.named_parameters():
        own = part["square"][name] / len(world.split.forget)
        every = whole["square"][name] / len(world.split.train)
        values[name] = dampen(value.detach(), own, every, setting["alpha"], setting["strength"])
    return with_values(world.base, values), first + second + time.process_time() - started


def dampen(value: Tensor, own: Tensor, every: Tensor, alpha: float, strength: float) -> Tensor:
    """Weights whose importance to the forgotten samples is more than `alpha` times that to all are
    multiplied by min(strength x every / own, 1)."""
    factor = (strength * every / own.clamp_min(torch.finfo(own.dtype).tiny)).clamp_max(1)
    return torch.where(own > alpha * every, factor * value, value)


def retrained(world: World, shift: int) -> tuple[nn.Module, float]:
    """Trained without what is forgotten, from weights and in an order of the world's seed + shift;
    and the CPU seconds."""
    started = time.process_time()
    net = trained(world.split.retain, world.seed + shift)
    return net, time.process_time() - started


def grid(options: Mapping[str, Sequence[float]]) -> tuple[dict[str, float], ...]:
    """All combinations."""
    return tuple(dict(zip(options, each, strict=True)) for each in product(*options.values()))


def rows() -> dict[str, Row]:
    """Name -> row of the table."""
    fast, slow = grid({"lr": FAST}), grid({"lr": SLOW})
    sparse = grid({"lr": (3e-3, 1e-2), "gamma": (3e-4, 3e-3)})
    dampening = grid({"alpha": (1.0, 3.0, 10.0, 30.0), "strength": (1.0,)})
    plain = {
        "Retrain": Row(({},), lambda world, setting: world.retrain),
        "Retrain, other start": Row(({},), lambda world, setting: retrained(world, AGAIN_SEED)),
        "nothing": Row(({},), lambda world, setting: (world.base, 0.0)),
        "fine-tune": Row(fast, partial(tuned, kind="fine-tune")),
        "gradient ascent": Row(slow, partial(tuned, kind="ascent")),
        "L1-sparse": Row(sparse, partial(tuned, kind="l1-sparse")),
        "SSD": Row(dampening, dampened),
        "random label (no mask)": Row(fast, partial(tuned, kind="random-label")),
    }
    masks = {
        f"SalUn, {rule} {100 * density:g} %": Row(fast, partial(masked, rule=rule, density=density))
        for density in DENSITIES
        for rule in (*RULES, *CONTROLS)
    }
    return plain | masks
