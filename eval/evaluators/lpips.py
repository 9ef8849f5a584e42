"""LPIPS between each retained prompt's image and the base's of the same seed (Zhang et al. 2018),
by the library `lpips`, version 0.1 of its heads.

The heads come with the library; the trunk is torchvision's, trained on ImageNet.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import chain

import torch
from torch import Tensor

from erase.eval.case import Case
from erase.eval.evaluators import Evaluator
from erase.eval.evaluators.published import needs, published_weights
from erase.eval.evaluators.retained import in_sizes, retained_pairs
from erase.eval.scores import Score, mean_score
from erase.parallel.processes import default_device, in_shares
from erase.prompts.errors import COUNT, ErasureError, check_names, check_ranges

TRUNKS = ("alex", "vgg", "squeeze")


@dataclass
class Config:
    """lpips: perceptual distance to the base, of prompts that must stay."""

    trunk: str = "alex"
    """alex, vgg or squeeze: the network whose features are compared. The field reports alex"""
    weights: str | None = None
    """file of torchvision's ImageNet weights of the trunk; default: torch's cache, or the network
    once"""
    batch_size: int = 32
    """pairs looked at together; no score depends on it"""
    device: str = "auto"
    """where the network runs; `auto` is this process's GPU if there is one"""

    def __post_init__(self) -> None:
        check_ranges(self, {"batch_size": COUNT}, "lpips")
        check_names(self, {"trunk": TRUNKS})


Distance = Callable[[Tensor, Tensor], Tensor]
"""two batches of images, (n, 3, H, W) in [-1, 1] -> (n, 1, 1, 1)"""


def load_lpips(config: Config) -> Distance:
    """The network that `config` names; loaded once.

    Raises:
        ErasureError: the library or the trunk's weights are absent, or the weights of another
            network.
    """
    device = str(default_device()) if config.device == "auto" else config.device
    return _load(config.trunk, config.weights, device)


@cache
def _load(trunk: str, path: str | None, device: str) -> Distance:
    with needs("lpips"):
        from lpips import LPIPS as Network
    from torchvision import models

    weights = {
        "alex": models.AlexNet_Weights,
        "vgg": models.VGG16_Weights,
        "squeeze": models.SqueezeNet1_1_Weights,
    }[trunk].IMAGENET1K_V1
    tensors = published_weights(f"LPIPS's trunk {trunk}", weights.url, path, "lpips.weights")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it draws weights first, by torchvision's old arguments
        network = Network(net=trunk, pnet_rand=True, verbose=False)
    own = {}
    for key in network.net.state_dict():  # slice2.3.weight is features.3.weight
        name = f"features.{key.partition('.')[2]}"
        if name not in tensors:
            raise ErasureError(
                f"{path or weights.url} has no {name}, so it is not torchvision's {trunk}; give "
                f"the file of {weights.url}"
            )
        own[key] = tensors[name]
    network.net.load_state_dict(own)
    found: Distance = network.to(device).eval().requires_grad_(False)
    return found


def check(case: Case, config: Config) -> None:
    """Refuse what `evaluate` would refuse, absent weights among it."""
    retained_pairs(case)
    load_lpips(config)


def evaluate(case: Case, config: Config) -> list[Score]:
    """`LPIPS to base`: the mean over the prompts that ask for no forgotten concept, lower is
    better, n images, with Student's interval; zero for the base itself.

    Raises:
        ErasureError: too few such prompts, weights that cannot be had, an image of another size
            than the base's.
    """
    pairs, distance = retained_pairs(case), load_lpips(config)
    device = str(default_device()) if config.device == "auto" else config.device

    def apart(first: Tensor, second: Tensor) -> Tensor:
        return distance(*(side.to(device).float() / 127.5 - 1 for side in (first, second)))

    @torch.inference_mode()
    def look(rows: range) -> list[float]:
        first, second = zip(*pairs.images(rows), strict=True)
        values: list[float] = in_sizes(apart, first, second).flatten().tolist()
        return values

    values = list(
        chain.from_iterable(in_shares(len(pairs.rows), config.batch_size, look, "LPIPS", "pair"))
    )
    evaluator = f"lpips {version('lpips')} {config.trunk}"
    return [
        mean_score(
            "LPIPS to base",
            values,
            higher_is_better=False,
            evaluator=evaluator,
            cases=pairs.cases,
        )
    ]


LPIPS = Evaluator("lpips", Config(), evaluate, check)
