"""What tests of single-file checkpoints share: one of every family, damaged ones, and a comparison
of weights. A file imports a fixture as itself, so that pytest finds it there."""

from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from erase.models.single_file import write_single_file
from tests.families import tiny_sd1, tiny_sd2, tiny_sdxl

TINY = {
    "sd1": tiny_sd1,
    "sd2": tiny_sd2,
    "sd2-v": lambda: tiny_sd2(prediction="v_prediction"),
    "sdxl": tiny_sdxl,
}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """`made(kind)`: a pipeline, its configurations in a folder without weights, and its single
    file."""

    @cache
    def make(kind):
        root, pipeline = tmp_path_factory.mktemp(kind), TINY[kind]()
        pipeline.save_pretrained(root / "config")
        for weights in (root / "config").rglob("*.safetensors"):
            weights.unlink()
        return pipeline, root / "config", write_single_file(pipeline, root / "model.safetensors")

    return make


@pytest.fixture
def damaged(made, tmp_path):
    """`damaged(change)`: the SD 1 file with changed tensors, and its configuration."""

    def damage(change, suffix=".safetensors"):
        _, config, path = made("sd1")
        tensors = load_file(path)
        tensors = change(tensors) or tensors
        out = tmp_path / f"changed{suffix}"
        save_file(tensors, out) if suffix == ".safetensors" else torch.save(tensors, out)
        return out, config

    return damage


def networks(pipeline):
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def weights(pipeline):
    return {
        f"{part}.{name}": w
        for part, module in networks(pipeline).items()
        for name, w in module.state_dict().items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
