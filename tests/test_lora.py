"""LoRA: the best of its rank, honest about what it misses, and read by stock diffusers."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from erase.delta import ErasedDelta
from erase.export.lora import extract_lora
from erase.foreign import read_erased
from erase.models import wrap
from erase.models.sd import StableDiffusion
from erase.prompts.errors import ErasureError
from tests.families import tiny_sdxl

METADATA = {
    "base_id": "pico",
    "method": "salun",
    "config": '{"erase": {}}',
    "concepts": '[{"target": "heart"}]',
}
PROMPTS = ["a red heart", "a blue moon"]


@pytest.fixture
def model(make_pico_pipeline):
    return StableDiffusion(make_pico_pipeline(), "pico")


def make(model, chosen, size=0.05, low_rank=None):
    """A delta that moves every chosen weight; of `low_rank`, if given."""
    generator = torch.Generator().manual_seed(0)
    base = {
        name: param.detach().clone()
        for name, param in model.parameters().items()
        if chosen(name, param)
    }
    erased = {}
    for name, value in base.items():
        change = torch.randn(value.shape, generator=generator)
        if low_rank:
            sides = value.flatten(1).shape
            change = torch.randn(sides[0], low_rank, generator=generator) @ torch.randn(
                low_rank, sides[1], generator=generator
            )
        erased[name] = value + size * change.reshape(value.shape)
    return ErasedDelta.between(base, erased, {**METADATA, "base_fingerprint": model.fingerprint})


def layers(name, param):
    """Weights of linear and convolutional layers, of both components."""
    return param.ndim in (2, 4) and "embedding" not in name


def everything(name, param):
    return True


def predictions(model):
    """Text states, and what the denoiser makes of them."""
    cond = model.encode(PROMPTS)
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return cond.embeddings, model.predict(x, torch.tensor([10, 700]), cond)


def change_of(model, delta, name):
    param = model.parameters()[name].detach()
    change = torch.zeros(param.shape, dtype=torch.float64)
    change[delta.where(name, tuple(param.shape))] = delta.values[name].double()
    return (change - param * (change != 0)).flatten(1)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_at_full_rank_stock_diffusers_predicts_what_the_erased_model_does(
    model, make_pico_pipeline, tmp_path, layout, as_folder
):
    """Layers of unequal rank, linear and convolutional, of the UNet and of the text encoder."""
    pytest.importorskip("peft")
    delta = make(model, layers)
    lora = extract_lora(delta, model, rank=10_000)
    assert lora.error < 1e-6 and len(set(lora.ranks.values())) > 2 and not lora.left_out
    path = tmp_path / "pytorch_lora_weights.safetensors"
    lora.save(path, layout=layout)
    before = predictions(model)
    pipeline = make_pico_pipeline()
    pipeline.load_lora_weights(tmp_path if as_folder else path)
    for base, stock, erased in zip(
        before, predictions(StableDiffusion(pipeline)), predictions(delta.apply(model)), strict=True
    ):
        assert torch.allclose(stock, erased, atol=1e-5) and not torch.allclose(
            stock, base, atol=1e-2
        )


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("kinds", ["q_proj", r"[qkv]_proj|fc\d", "fc1", "out_proj"])
def test_stock_diffusers_reads_any_layers_of_a_text_encoder(
    model, make_pico_pipeline, tmp_path, layout, kinds
):
    pytest.importorskip("peft")
    pattern = re.compile(rf"text_encoder\..*({kinds})\.weight")
    delta = make(model, lambda name, param: pattern.fullmatch(name))
    lora = extract_lora(delta, model, rank=10_000)
    lora.save(tmp_path / "lora.safetensors", layout=layout)
    pipeline = make_pico_pipeline()
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    found = predictions(StableDiffusion(pipeline))
    assert {f"{fit.name}.weight" for fit in lora.layers} == set(delta.values)
    for stock, erased in zip(found, predictions(delta.apply(model)), strict=True):
        assert torch.allclose(stock, erased, atol=1e-5)


def test_names_of_a_text_encoder_are_those_that_every_transformers_loads(model, tmp_path):
    """diffusers takes `text_model.` off, and does not add it; its settings are suffixes."""
    delta = make(model, lambda name, param: name.startswith("text_encoder") and "_proj." in name)
    extract_lora(delta, model, energy=0.5).save(tmp_path / "lora.safetensors", layout="diffusers")
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        names, told = set(file.keys()), json.loads(file.metadata()["lora_adapter_metadata"])
    assert all(name.startswith("text_encoder.text_model.encoder.layers.") for name in names)
    layers = [*told["text_encoder.target_modules"], *told["text_encoder.rank_pattern"]]
    assert len(layers) > 8 and all(name.startswith("encoder.layers.") for name in layers)


def test_two_encoders_may_have_other_ranks_in_layers_of_one_name(tmp_path):
    base = wrap(tiny_sdxl(), "xl")
    delta = make(base, lambda name, param: name.startswith("text_") and ".fc1.weight" in name)
    lora, layer = extract_lora(delta, base, rank=8), "text_encoder.encoder.layers.0.mlp.fc1"
    lora.down[layer], lora.up[layer] = lora.down[layer][:2], lora.up[layer][:, :2]
    lora.save(tmp_path / "lora.safetensors", layout="diffusers")
    found, own = read_erased(base, [tmp_path / "lora.safetensors"]), lora.as_delta(base)
    assert found.values.keys() == own.values.keys()
    assert all(torch.allclose(found.values[n], value, atol=1e-5) for n, value in own.values.items())


def test_the_error_of_a_rank_is_the_tail_of_the_spectrum(model):
    """Eckart and Young: no matrices of this rank come nearer."""
    delta = make(model, layers)
    lora = extract_lora(delta, model, rank=3)
    assert len(lora.layers) == len(delta.values)
    for fit in lora.layers:
        spectrum = torch.linalg.svdvals(change_of(model, delta, f"{fit.name}.weight"))
        tail = spectrum[3:].norm() / spectrum.norm()
        assert fit.error == pytest.approx(tail.item(), rel=1e-5, abs=1e-7) and fit.rank == min(
            3, fit.full_rank
        ) == len(lora.down[fit.name])
        assert fit.norm == pytest.approx(spectrum.norm().item())


def test_energy_takes_the_smallest_rank_that_keeps_it(model):
    delta = make(model, layers)
    lora = extract_lora(delta, model, energy=0.8)
    for fit in lora.layers:
        kept = (
            torch.linalg.svdvals(change_of(model, delta, f"{fit.name}.weight")).square().cumsum(0)
        )
        share = kept / kept[-1]
        assert share[fit.rank - 1] >= 0.8 - 1e-9 and (fit.rank == 1 or share[fit.rank - 2] < 0.8)
        assert fit.error**2 == pytest.approx(1 - share[fit.rank - 1].item(), abs=1e-6)
    assert max(extract_lora(delta, model, rank=2, energy=0.8).ranks.values()) == 2


def test_a_change_of_low_rank_is_held_by_that_rank(model):
    lora = extract_lora(make(model, layers, low_rank=2), model, energy=1 - 1e-9)
    assert {fit.rank for fit in lora.layers} == {2} and lora.error < 1e-5


def test_what_no_lora_holds_is_named_and_counted(model):
    delta = make(model, everything)
    lora = extract_lora(delta, model, rank=10_000)
    assert {
        name
        for name in delta.values
        if name.endswith(".bias") or "norm" in name or "embeddings" in name
    } == set(lora.left_out)
    assert set(lora.left_out) | {f"{name}.weight" for name in lora.down} == set(delta.values)
    squares = {
        name: change.square().sum().item()
        for name in delta.values
        if (
            change := delta.values[name].double()
            - model.parameters()[name].detach().flatten().double()
        ).numel()
    }
    share = sum(squares[name] for name in lora.left_out) / sum(squares.values())
    assert lora.left_out_share == pytest.approx(share) and lora.error == pytest.approx(
        share**0.5, rel=1e-4
    )
    json.dumps(lora.plain(), allow_nan=False)


def test_as_a_delta_it_is_base_and_factors(model, tmp_path):
    lora = extract_lora(make(model, layers), model, rank=4)
    weights = {name: param.detach().clone() for name, param in model.parameters().items()}
    delta = lora.as_delta(model)
    assert all(torch.equal(param, weights[name]) for name, param in model.parameters().items())
    assert (
        json.loads(delta.metadata["config"])["lora_ranks"] == lora.ranks and delta.title == "heart"
    )
    delta.save(tmp_path / "d.safetensors")
    ErasedDelta.load(tmp_path / "d.safetensors").apply(model)
    for name, down in lora.down.items():
        change = (lora.up[name].flatten(1) @ down.flatten(1)).reshape(
            weights[f"{name}.weight"].shape
        )
        assert torch.allclose(
            model.parameters()[f"{name}.weight"], weights[f"{name}.weight"] + change, atol=1e-6
        )
    with pytest.raises(ErasureError, match="was made for the base"):
        lora.as_delta(model)


def test_half_precision_halves_the_file(model, tmp_path):
    lora = extract_lora(make(model, layers), model, rank=4)
    lora.save(tmp_path / "l.safetensors", torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "l.safetensors").values()} == {
        torch.float16
    }


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rank": 0}, "at least 1"),
        ({"energy": 0.0}, r"in \(0, 1\]"),
        ({"energy": 90}, r"in \(0, 1\]"),
    ],
)
def test_bad_arguments_are_named(model, arguments, message):
    with pytest.raises(ErasureError, match=message):
        extract_lora(make(model, layers), model, **arguments)


def test_a_delta_without_layers_and_an_unknown_layout_are_refused(model, tmp_path):
    with pytest.raises(ErasureError, match="no linear or convolutional layer"):
        extract_lora(make(model, lambda name, _: name.endswith(".bias")), model)
    with pytest.raises(ErasureError, match="did you mean 'kohya'"):
        extract_lora(make(model, layers), model).save(tmp_path / "l.safetensors", layout="koya")


def test_a_zero_that_only_loses_its_sign_is_no_layer(model):
    delta = make(model, lambda name, param: name.endswith("attn2.to_k.weight"))
    name = next(name for name in model.parameters() if name.endswith("attn2.to_q.weight"))
    weight = model.parameters()[name]
    with torch.no_grad():
        weight[0, 0] = 0.0
    model.refresh_fingerprint()
    turned = weight.detach().clone()
    turned[0, 0] = -0.0
    sign = ErasedDelta.between({name: weight.detach()}, {name: turned}, {})
    metadata = {**METADATA, "base_fingerprint": model.fingerprint}
    both = ErasedDelta({**delta.values, **sign.values}, {**delta.bits, **sign.bits}, metadata)
    assert name.removesuffix(".weight") not in extract_lora(both, model).ranks
    with pytest.raises(ErasureError, match="changes no linear or convolutional layer"):
        extract_lora(ErasedDelta(sign.values, sign.bits, metadata), model)
