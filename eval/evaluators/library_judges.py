"""Any classifier of torchvision or timm as a judge: built by name, its weights from files, its
preprocessing the library's own.

Nothing is downloaded. torchvision's published weights are used where torch.hub's folder has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from erase.eval.evaluators.judges import Judge
from erase.models.single_file.tensor_file import open_tensors
from erase.parallel.processes import default_device
from erase.prompts.class_lists import ClassList, class_lists, load_classes
from erase.prompts.errors import ErasureError, reason, unknown

LIBRARIES = ("torchvision", "timm")
OTHER = "other"
"""what an image is called whose class has no name in the list"""
Weights = str | Mapping[str, str] | None
Prepare = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class _Built:
    """A classifier of a library."""

    network: nn.Module
    """on this process's device"""
    path: Path
    """of its weights"""
    prepare: Prepare


def library_judge(judge: str, classes: str | None, weights: Weights, resize: int | None) -> Judge:
    """The judge `torchvision:NAME` or `timm:NAME`; kept, so that the next call has it at once.

    Args:
        judge: its name.
        classes: a shipped class list or a file (`erase.prompts.class_lists`). Where it names all
            outputs, the classifier is built with so many; else with as many as the library's own.
        weights: a file, one for each kind of the classes, or (torchvision) the name of published
            weights that torch.hub's folder has; None: torchvision's default ones.
        resize: squash to a square of this side, bilinear, instead of the library's resizing and
            cropping; mean and deviation stay the library's.

    Returns:
        A judge whose logits are the library's own, to the last digit, for the same image.

    Raises:
        ErasureError: an unknown library, name or list; weights that are missing, damaged, no plain
            tensors, or of another classifier.
    """
    library, _, name = judge.partition(":")
    if library not in LIBRARIES:
        raise unknown("library of a judge", library, LIBRARIES)
    if classes is None:
        raise ErasureError(
            f"the judge {judge} has no names for its outputs; set classifier.classes to one of "
            f"{', '.join(class_lists())}, or to a .yaml file"
        )
    files = tuple(weights.items()) if isinstance(weights, Mapping) else weights
    return _load(library, name, classes, files, resize)


@cache
def _load(
    library: str,
    name: str,
    classes: str,
    weights: str | tuple[tuple[str, str], ...] | None,
    resize: int | None,
) -> Judge:
    kinds, title = load_classes(classes), f"{library}:{name}"
    files = _files(title, list(kinds), weights)
    build = _torchvision if library == "torchvision" else _timm
    built: dict[str, _Built] = {}
    for kind, listed in kinds.items():
        built[kind] = build(name, listed, files.get(kind), resize)
        _fill(built[kind], title)
        _check_outputs(built[kind], f"{title} with {classes}: {kind}", listed)
    places = {kind: torch.tensor(list(listed.outputs.values())) for kind, listed in kinds.items()}
    names = {kind: [*kinds[kind].outputs, *[OTHER] * (not kinds[kind].whole)] for kind in kinds}

    def logits(images: Tensor) -> dict[str, Tensor]:
        outputs = {}
        for kind, one in built.items():
            values = one.network(images.to(default_device())).float().cpu()
            outputs[kind] = _of_names(values, places[kind], kinds[kind].whole)
        return outputs

    told = ", ".join(dict.fromkeys(one.path.name for one in built.values()))
    return Judge(f"{title} ({told})", logits, names, next(iter(built.values())).prepare)


def _of_names(values: Tensor, places: Tensor, whole: bool) -> Tensor:
    """The logits of the named outputs; behind them those without a name, the greatest first."""
    named = values[:, places]
    if whole:
        return named
    rest = values.clone()
    rest[:, places] = -torch.inf
    return torch.cat([named, rest.sort(1, descending=True).values], 1)


def _files(
    title: str, kinds: list[str], weights: str | tuple[tuple[str, str], ...] | None
) -> dict[str, str]:
    """kind -> its file, as far as any is given."""
    if isinstance(weights, str):
        if len(kinds) > 1:
            raise ErasureError(
                f"{title} judges {' and '.join(kinds)}, each by a classifier of its own; set "
                f"classifier.weights to {{{', '.join(f'{kind}: FILE' for kind in kinds)}}}"
            )
        return {kinds[0]: weights}
    files = dict(weights or ())
    for kind in files:
        if kind not in kinds:
            raise unknown("kind in classifier.weights", kind, kinds)
    return files


# ---- torchvision ---------------------------------------------------------------------------------


def _torchvision(name: str, classes: ClassList, weights: str | None, resize: int | None) -> _Built:
    from torchvision import models

    listed = models.list_models(module=models)
    if name not in listed:
        raise unknown("classifier of torchvision", name, listed)
    published = models.get_model_weights(name)
    members = {member.name: member for member in published} | {"DEFAULT": published.DEFAULT}
    urls = {Path(member.url).name: member for member in published}
    member = members.get(weights or "DEFAULT") or urls.get(Path(weights or "").name)
    path = Path(weights) if weights and weights not in members else _kept(name, member)

    transforms = (member or published.DEFAULT).transforms()
    if resize:
        prepare = _squashed(resize, transforms.mean, transforms.std)
    else:
        prepare = transforms
    count: dict[str, Any] = {"num_classes": len(classes.outputs)} if classes.whole else {}
    network = _network(lambda: models.get_model(name, weights=None, **count), name)
    return _Built(network, path, prepare)


def _kept(name: str, member: Any) -> Path:
    """Where torch.hub keeps published weights."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(member.url).name
    if not path.is_file():
        raise ErasureError(
            f"torchvision:{name} needs its weights, and nothing is downloaded here: put "
            f"{member.url} into {path.parent}, or give a file with classifier.weights"
        )
    return path


# ---- timm ----------------------------------------------------------------------------------------


def _timm(name: str, classes: ClassList, weights: str | None, resize: int | None) -> _Built:
    import timm
    from timm.data import create_transform, resolve_model_data_config

    if not timm.is_model(name):
        raise unknown("classifier of timm", name, timm.list_models())
    if weights is None:
        raise ErasureError(
            f"timm:{name} needs its weights, and nothing is downloaded here: give a file with "
            "classifier.weights"
        )
    count: dict[str, Any] = {"num_classes": len(classes.outputs)} if classes.whole else {}
    network = _network(lambda: timm.create_model(name, pretrained=False, **count), name)
    data = resolve_model_data_config(network)
    if resize:
        prepare = _squashed(resize, data["mean"], data["std"])
    else:
        prepare = create_transform(**data, is_training=False)
    return _Built(network, Path(weights), prepare)


# ---- both ----------------------------------------------------------------------------------------


def _network(build: Callable[[], nn.Module], name: str) -> nn.Module:
    """The network, with the caller's random numbers left as they were."""
    with torch.random.fork_rng(devices=[]):
        try:
            network = build()
        except Exception as error:  # a library may raise anything
            raise ErasureError(
                f"the classifier {name} cannot be built: {reason(error)}; choose another"
            ) from error
    return network.eval().requires_grad_(False).to(default_device())


def _squashed(side: int, mean: Any, std: Any) -> Prepare:
    from torchvision.transforms import Compose, Normalize, Resize, ToTensor

    squashed: Prepare = Compose([Resize((side, side)), ToTensor(), Normalize(mean, std)])
    return squashed


def _fill(built: _Built, title: str) -> None:
    """Put the file's weights into the network."""
    with open_tensors(built.path) as file:
        tensors = {key.removeprefix("module."): file.read(key) for key in file.shapes}
    try:
        built.network.load_state_dict(tensors)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise ErasureError(
            f"{built.path} does not fit {title}: {' '.join(lines)[:200] or reason(error)}; give "
            "the weights of this classifier, and the class list that it was trained with"
        ) from error


@torch.inference_mode()
def _check_outputs(built: _Built, title: str, classes: ClassList) -> None:
    """Refuse a list that names an output that the classifier has not."""
    blank = built.prepare(Image.new("RGB", (64, 64)))[None]
    count = built.network(blank.to(default_device())).shape[-1]
    for name, place in classes.outputs.items():
        if place >= count:
            raise ErasureError(
                f"{title} {name!r} is output {place}, and there are {count}, from 0; correct the "
                "class list"
            )
