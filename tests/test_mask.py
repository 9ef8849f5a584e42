"""Saliency and masks: exact count, order, ties, packing, refusal."""

import math

import pytest
import torch

from erase.mask import Saliency, SaliencyMask
from erase.models import wrap
from erase.prompts.errors import ErasureError
from erase.scripts.bench import describe_mask
from erase.tensors import CHUNK, pack, unpack
from erase.training.statistics import Statistics
from tests.families import tiny_flux, tiny_sd3, tiny_sdxl


def double_argsort(values: dict[str, torch.Tensor], density: float) -> dict[str, torch.Tensor]:
    """The reference's selection, literally: rank of each value in the descending order, kept below
    int(N * density)."""
    flat = torch.cat([v.reshape(-1) for v in values.values()])
    rank = torch.argsort(torch.argsort(-flat, stable=True), stable=True)
    kept = (rank < int(len(flat) * density)).split([v.numel() for v in values.values()])
    return {name: part.view(v.shape) for (name, v), part in zip(values.items(), kept, strict=True)}


@pytest.mark.parametrize("density", [0.003, 0.1, 0.29, 0.5, 0.7, 0.999, 1.0])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("chunk", [16, CHUNK])
def test_cut_is_the_double_argsort_with_stable_ties(monkeypatch, density, ties, chunk):
    monkeypatch.setattr("erase.tensors.CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    values = {
        f"p{i}": torch.rand(shape, generator=generator)
        for i, shape in enumerate([(7, 5), (1,), (300,), (4, 3, 2, 2)])
    }
    if ties:
        # five levels, zeros among them
        values = {name: (v * 4).floor() for name, v in values.items()}
    mask, expected = Saliency(values).cut(density), double_argsort(values, density)
    assert all(torch.equal(mask[name], expected[name]) for name in values)
    assert mask.count() == math.floor(density * mask.size)


def test_cut_is_exact_for_every_magnitude_of_float32():
    tiny, huge = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    values = {"a": torch.tensor([0.0, -0.0, 1e-45, tiny, 1.0, huge, 1.0000001])}
    order = [5, 6, 4, 3, 2, 0, 1]
    for kept in range(1, 8):
        mask = Saliency(values).cut((kept + 0.5) / 7 if kept < 7 else 1.0)["a"]
        assert set(mask.nonzero()[:, 0].tolist()) == set(order[:kept])


@pytest.mark.parametrize("shape", [(1,), (8,), (9,), (3, 5, 7), ()])
def test_packing_is_one_bit_per_weight_and_loses_nothing(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    bits = pack(mask)
    assert bits.dtype == torch.uint8 and bits.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack(bits, tuple(shape)), mask)


def test_a_mask_survives_the_disk(tmp_path):
    saliency = Saliency(
        {"a": torch.rand(100, 33), "b": torch.rand(5)}, {"base_fingerprint": "f" * 64}
    )
    for density in (0.1, 0.5):
        saliency.cut(density).save(tmp_path / "m.safetensors")
        loaded = SaliencyMask.load(tmp_path / "m.safetensors")
        assert all(
            torch.equal(loaded[name], saliency.cut(density)[name]) for name in saliency.values
        )
        assert loaded.metadata["density"] == repr(density)
    assert (tmp_path / "m.safetensors").stat().st_size < 3305 / 8 + 1000


def test_ties_go_by_the_order_of_the_parameters():
    mask = Saliency({"b": torch.ones(4), "a": torch.ones(4)}).cut(0.5)
    assert mask["b"].all() and not mask["a"].any()


SIZES = {"a": (7, 11), "b": (3,), "c": (50,), "d": (1,)}


def some_saliency(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Saliency({name: torch.rand(shape, generator=generator) for name, shape in SIZES.items()})


@pytest.mark.parametrize("density", [0.01, 0.1, 0.29, 0.5, 0.999, 1.0])
def test_the_same_share_of_every_tensor_is_exactly_the_density_in_all(density):
    saliency = some_saliency()
    mask = saliency.cut(density, "per-tensor")
    assert mask.count() == int(density * mask.size)
    for name, value in saliency.values.items():
        kept, chosen = int(mask[name].sum()), mask[name]
        assert abs(kept - density * value.numel()) < 1
        if 0 < kept < value.numel():
            assert value[chosen].min() >= value[~chosen].max()


@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
def test_the_lowest_are_the_least_salient_and_as_many(density):
    saliency = some_saliency()
    lowest = saliency.lowest(density)
    values = torch.cat([value.flatten() for value in saliency.values.values()])
    chosen = torch.cat([lowest[name].flatten() for name in saliency.values])
    assert lowest.count() == int(density * lowest.size)
    assert density == 1 or values[chosen].max() <= values[~chosen].min()


def test_every_control_is_allocated_as_it_is_told():
    generator = torch.Generator().manual_seed(0)
    sizes = {"few": 10, "many": 1000, "some": 203}
    values = {name: torch.rand(size, generator=generator) for name, size in sizes.items()}
    values["few"] *= 0.01  # the least salient, all of them
    random = SaliencyMask.random(values, 0.3, seed=0, allocation="per-tensor")
    lowest = Saliency(values).lowest(0.3, "per-tensor")
    for mask in (random, lowest):
        assert mask.count() == int(0.3 * sum(sizes.values()))
        assert all(abs(int(mask[name].sum()) - 0.3 * size) < 1 for name, size in sizes.items())
    for name, value in values.items():
        assert value[lowest[name]].max() < value[~lowest[name]].min()


def test_a_matched_random_mask_has_as_many_in_every_tensor_and_by_chance_the_same_ones():
    generator = torch.Generator().manual_seed(0)
    mask = Saliency(
        {
            "a": torch.rand(200, 50, generator=generator),
            "b": 3 * torch.rand(5000, generator=generator),
        }
    ).cut(0.3)
    one, again, other = (mask.matched_random(seed) for seed in (1, 1, 2))
    for name in mask.bits:
        assert one[name].sum() == mask[name].sum()
        share = mask[name].float().mean()
        # independent of the rule's choice
        assert abs(float((one[name] & mask[name]).float().mean()) - share**2) < 0.02
    assert one.sha256 == again.sha256 != other.sha256
    assert one.metadata["control"] == "matched-random"


@pytest.mark.parametrize("density", [0, -0.1, 1.1, 0.001])
def test_impossible_densities_are_refused(density):
    with pytest.raises(ErasureError, match="density"):
        Saliency({"a": torch.rand(100)}).cut(density)


def test_mask_refuses_other_bases_and_unknown_parameters():
    mask = Saliency({"a": torch.rand(4)}, {"base_fingerprint": "one"}).cut(0.5)
    mask.check({"a": torch.zeros(4)}, "one")
    with pytest.raises(ErasureError, match="another base"):
        mask.check({"a": torch.zeros(4)}, "two")
    with pytest.raises(ErasureError, match="does not cover b"):
        mask.check({"b": torch.zeros(4)}, "one")


def test_damaged_mask_files_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    Saliency({"a": torch.rand(400)}).cut(0.5).save(path)
    whole = path.read_bytes()
    for broken in (whole[:20], whole[:-10], b"", b"not safetensors"):
        path.write_bytes(broken)
        with pytest.raises(ErasureError, match="cannot read"):
            SaliencyMask.load(path)
    Statistics({"forget.sum": {"a": torch.rand(400)}}).save(path)
    with pytest.raises(ErasureError, match="not a mask file"):
        SaliencyMask.load(path)
    with pytest.raises(ErasureError, match="cannot read"):
        SaliencyMask.load(tmp_path / "absent.safetensors")


def test_a_mask_is_described_by_kind_of_layer(tmp_path, capsys):
    values = {
        "unet.down_blocks.0.resnets.0.conv1.weight": torch.tensor([9.0, 8.0, 0.1, 0.2]),
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.tensor(
            [7.0, 0.3]
        ),
        "unet.down_blocks.0.resnets.0.norm1.weight": torch.tensor([0.4, 0.5]),
    }
    Statistics({"forget.sum": values}).save(tmp_path / "saliency.safetensors")
    describe_mask.main([str(tmp_path / "saliency.safetensors"), "--densities", "0.375"])
    first, _, *rows = capsys.readouterr().out.splitlines()
    assert first == "3 of 8 weights may change (37.500%)"
    assert [row.split()[-3:] for row in rows[:3]] == [
        ["50.0%", "50.0%", "66.7%"],
        ["25.0%", "50.0%", "33.3%"],
        ["25.0%", "0.0%", "0.0%"],
    ]
    assert [row.split("  ")[0] for row in rows[:3]] == [
        "residual blocks' convolutions",
        "cross-attention",
        "norms",
    ]


def test_every_weight_of_the_families_has_a_kind_of_layer(make_pico_pipeline):
    names = [
        name
        for pipeline in (make_pico_pipeline(), tiny_sdxl(), tiny_sd3(), tiny_flux())
        for name in wrap(pipeline).parameters()
    ]
    others = [
        name
        for name in names
        if describe_mask.kind_of(name) == "others" and not name.startswith("text_encoder")
    ]
    assert not others
