"""FID and KID of the retained prompts' images: to the base's images, or to a folder of others.

FID: Heusel et al. 2017. KID: Bińkowski et al. 2018. Inception and its preprocessing are those of
torch-fidelity, whose features agree with the original TensorFlow ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from erase.eval.canvas.judges import load_classifier
from erase.eval.case import Case
from erase.eval.evaluators import Evaluator
from erase.eval.evaluators.labelled import of_canvas
from erase.eval.evaluators.published import needs, published_weights
from erase.eval.evaluators.retained import (
    in_sizes,
    reference_features,
    reference_files,
    retained,
    retained_pairs,
)
from erase.eval.metrics.distances import frechet_interval, mmd, polynomial
from erase.eval.scores import Score
from erase.parallel.processes import default_device, in_shares
from erase.prompts.errors import COUNT, ErasureError, check_names, check_ranges, reason

WIDTHS = {"canvas": 128, "inception": 2048}
"""features -> how many there are"""
KID_SCALE = 1000


@dataclass
class Config:
    """fid: FID and KID between base and erased, of prompts that must stay."""

    features: str | None = None
    """`inception`, or `canvas` (the embedded world's classifier before its heads); default: canvas
    for the embedded world's prompts, else inception. Distances in different features cannot be
    compared"""
    weights: str | None = None
    """file of Inception's weights as torch-fidelity publishes them; default: torch's cache, or the
    network once"""
    frechet: bool | None = None
    """score FID beside KID; default: where there are more images than features. With fewer, the
    covariances are singular and FID is mostly its own bias; KID has none"""
    reference: str | None = None
    """folder of images to compare with too, such as real ones (default: none)"""
    batch_size: int = 64
    """images looked at together; no score depends on it"""
    device: str = "auto"
    """where Inception runs; `auto` is this process's GPU if there is one"""

    def __post_init__(self) -> None:
        check_ranges(self, {"batch_size": COUNT}, "fid")
        if self.features is not None:
            check_names(self, {"features": tuple(WIDTHS)})


def settle(case: Case, config: Config, named: bool) -> Config:
    """Features by the prompts; FID where there are more images than features."""
    features = config.features or ("canvas" if of_canvas(case) else "inception")
    frechet = config.frechet
    if frechet is None:
        frechet = len(retained(case)) > WIDTHS[features]
    return replace(config, features=features, frechet=frechet)


def check(case: Case, config: Config) -> None:
    """Refuse what `evaluate` would refuse, weights and folders that are not there among it."""
    retained_pairs(case)
    load_features(settle(case, config, True))
    if config.reference is not None:
        reference_files(config.reference)


def evaluate(case: Case, config: Config) -> list[Score]:
    """`FID to base` and `KID x 1000 to base`; the same `to reference` where a folder is given.

    Returns:
        Distances over the prompts that ask for no forgotten concept, lower is better, n images,
        each with a jackknife's interval. Those to the base are paired by prompt and seed, and are
        zero for the base itself.

    Raises:
        ErasureError: too few such prompts, weights that cannot be had, a folder without images.
    """
    config = settle(case, config, True)
    look, pairs = load_features(config), retained_pairs(case)

    def features(rows: range) -> tuple[np.ndarray, np.ndarray]:
        return pairs.features(rows, look)

    parts = in_shares(len(pairs.rows), config.batch_size, features, "FID", "pair")
    base, own = (np.concatenate(part) for part in zip(*parts, strict=True))
    scores = _scores("base", base, own, config, paired=True)
    if config.reference is not None:
        others = reference_features(config.reference, look, config.batch_size)
        scores += _scores("reference", others, own, config, paired=False)
    return scores


def _scores(
    to: str, first: np.ndarray, own: np.ndarray, config: Config, *, paired: bool
) -> list[Score]:
    name = config.features or ""
    evaluator = f"{name} features ({WIDTHS[name]})"
    if name == "inception":
        evaluator += f", torch-fidelity {version('torch-fidelity')}"
    kid = [KID_SCALE * value for value in mmd(first, own, polynomial, paired=paired)]
    found = {f"KID x {KID_SCALE} to {to}": (kid, evaluator)}
    if config.frechet:
        singular = ", singular covariances" * (min(len(first), len(own)) <= WIDTHS[name])
        fid = list(frechet_interval(first, own, paired))
        found = {f"FID to {to}": (fid, evaluator + singular)} | found
    return [
        Score(name, value, len(own), False, low, high, "", judge)
        for name, ((value, low, high), judge) in found.items()
    ]


class Look:
    """Features of images by one network."""

    def __init__(self, network: Any, scale: float, device: str = "cpu") -> None:
        """
        Args:
            network: (n, 3, H, W) -> (n, d).
            scale: what bytes are multiplied with for it; 0: they stay bytes.
        """
        self.network, self.scale, self.device = network, scale, device

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Features, (n, d), float32."""
        return in_sizes(self._of_one_size, images)

    def _of_one_size(self, pixels: Tensor) -> Tensor:
        shown = pixels.to(self.device)
        features: Tensor = self.network(shown.float() * self.scale if self.scale else shown)
        return features.cpu()


def load_features(config: Config) -> Look:
    """The network that `config` names; loaded once.

    Raises:
        ErasureError: torch-fidelity or Inception's weights are absent.
    """
    if config.features == "canvas":
        return Look(load_classifier().pooled, 1 / 255)
    device = str(default_device()) if config.device == "auto" else config.device
    return _load_inception(config.weights, device)


@cache
def _load_inception(path: str | None, device: str) -> Look:
    with needs("torch-fidelity"):
        from torch_fidelity.feature_extractor_inceptionv3 import (
            URL_INCEPTION_V3,
            FeatureExtractorInceptionV3,
        )

    weights, file = BytesIO(), published_weights("Inception", URL_INCEPTION_V3, path, "fid.weights")
    # the library unpickles whatever file it is given, so it gets one of ours
    torch.save(file, weights)
    weights.seek(0)
    try:
        with torch.random.fork_rng(devices=[]):  # it draws weights before it loads them
            network = FeatureExtractorInceptionV3("inception", ["2048"], weights).to(device)
    except RuntimeError as error:
        raise ErasureError(
            f"{path or URL_INCEPTION_V3} holds no weights of torch-fidelity's Inception "
            f"({reason(error)}); give the file of {URL_INCEPTION_V3} with fid.weights"
        ) from error
    return Look(lambda images: network(images)[0], 0, device)


FID = Evaluator("fid", Config(), evaluate, check, settle=settle)
