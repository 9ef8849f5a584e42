"""The columns of the classifier bench: UA, RA, TA, MIA and the average gap to Retrain (Fan et al.,
ICLR 2024, section 5.1)."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

import torch
from torch import Tensor, nn

from erase.scripts.bench.classifier_data import Samples, Split

COLUMNS = ("UA", "RA", "TA", "MIA")


def scores(net: nn.Module, split: Split) -> dict[str, float]:
    """All columns of one network, in percent.

    UA: forgotten images that are classified wrong. RA, TA: retained and test images that are
    classified right. MIA: `mia`, over as many retained images as test images.
    """
    count = torch.arange(min(len(split.retain), len(split.test)))
    members, others = split.retain[count], split.test[count]
    return {
        "UA": 100 - accuracy(net, split.forget),
        "RA": accuracy(net, split.retain),
        "TA": accuracy(net, split.test),
        "MIA": mia(*(confidence(net, part) for part in (members, others, split.forget))),
    }


@torch.no_grad()
def accuracy(net: nn.Module, samples: Samples) -> float:
    """Percent of the images that are classified as labelled."""
    right = net(samples.images).argmax(1) == samples.labels
    return 100 * float(right.double().mean())


@torch.no_grad()
def confidence(net: nn.Module, samples: Samples) -> Tensor:
    """The probability that the network gives to each image's label, (n,)."""
    probabilities = net(samples.images).softmax(1)
    return probabilities.gather(1, samples.labels.unsqueeze(1)).squeeze(1)


def mia(members: Tensor, others: Tensor, forgotten: Tensor) -> float:
    """Efficacy of forgetting against a membership inference by confidence (Jia et al. 2023,
    appendix C.3; Fan et al. 2024): percent of the forgotten images that a predictor, trained to
    tell members from others, takes for others.

    The predictor is the papers': a support vector machine, RBF kernel, C = 3.

    Args:
        members: confidences of retained training images, (n,).
        others: of test images, (m,).
        forgotten: of forgotten images, (k,).
    """
    from sklearn.svm import SVC

    known = torch.cat([members, others]).unsqueeze(1).numpy()
    seen = torch.cat([torch.ones(len(members)), torch.zeros(len(others))]).numpy()
    predictor = SVC(C=3, gamma="auto", kernel="rbf").fit(known, seen)
    taken = predictor.predict(forgotten.unsqueeze(1).numpy())
    return 100 * float((taken == 0).mean())


def gap(own: Mapping[str, float], retrain: Mapping[str, float]) -> float:
    """Mean distance to Retrain over the four columns, in points."""
    return fmean(abs(own[name] - retrain[name]) for name in COLUMNS)
