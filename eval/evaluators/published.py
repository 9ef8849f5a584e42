"""What an evaluator takes from elsewhere: a library that is an extra, and published weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from erase.models.single_file.tensor_file import open_tensors
from erase.prompts.errors import ErasureError, reason


@contextmanager
def needs(package: str) -> Iterator[None]:
    """Turn a missing library in the block into one sentence."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ErasureError(
            f"this score needs {package}, which is not installed ({reason(error)}); install "
            "concept-erasure-toolkit[metrics]"
        ) from error


def published_weights(what: str, url: str, path: str | None, option: str) -> dict[str, Tensor]:
    """Tensors by name, read without running anything in the file.

    Args:
        what: names them in errors.
        url: where they were published; they are kept in torch's own cache, and their name holds
            their hash, which is compared.
        path: a file of them instead; None: from the cache, or else the network.
        option: that takes such a path.

    Raises:
        ErasureError: a file that cannot be read, or weights that cannot be had.
    """
    if path is not None:
        with open_tensors(path) as file:
            return {key: file.read(key) for key in file.shapes}
    try:
        weights: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except Exception as error:  # urllib, the system and torch's reader each raise their own kinds
        raise ErasureError(
            f"the weights of {what} are not at hand and cannot be fetched ({reason(error)}); give "
            f"the file of {url} with {option}"
        ) from error
    return weights
