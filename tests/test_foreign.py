"""Checkpoints that other programs erased: each layout in which their public code writes is read as
it is, to the bit, and what is not of the base is refused or told."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from erase.compose import compose
from erase.delta import ErasedDelta
from erase.delta.origin import unanchored
from erase.eval.report.card import model_card
from erase.export.lora import extract_lora
from erase.foreign import read_erased
from erase.methods.salun import SalUnConfig
from erase.models import LoadConfig, load_model, wrap
from erase.models.single_file import write_single_file
from erase.prompts.canvas import canvas_concept
from erase.prompts.concepts import dump
from erase.prompts.errors import ErasureError
from erase.run import EraseConfig, describe
from tests.families import FAMILIES, tiny_sd1, tiny_sd2, tiny_sd3, tiny_sdxl
from tests.flow_families import FLOWS, tiny_klein


def moved(pipeline, where, by: float = 0.01):
    """The pipeline with every third value moved of the parameters that `where` picks by name."""
    with torch.no_grad():
        for component in ("unet", "transformer", "text_encoder", "text_encoder_2"):
            module = pipeline.components.get(component)
            for name, param in module.named_parameters() if module is not None else ():
                if where(f"{component}.{name}"):
                    param.view(-1)[::3] += by
    return pipeline


def in_unet(name: str) -> bool:
    return name.startswith("unet.") and ("attn2" in name or "proj_in" in name)


def keys_and_values(name: str) -> bool:
    return "attn2.to_k." in name or "attn2.to_v." in name


def in_text(name: str) -> bool:
    return name.startswith("text_encoder.")


def weights(model) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.parameters().items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def applied(model, delta) -> dict[str, torch.Tensor]:
    with delta.applied(model) as erased:
        return weights(erased)


@pytest.fixture(scope="module")
def base():
    return wrap(tiny_sd1(), "base")


# ---- what public code writes, by its key layouts -------------------------------------------------


def own(module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def prefixed(prefix: str, state) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def compvis(pipeline, folder: Path, part: str = "") -> dict[str, torch.Tensor]:
    """The state dict of the original program, with its noise schedule, or the keys of one part."""
    path = folder / "original.safetensors"
    path.unlink(missing_ok=True)
    state = load_file(write_single_file(pipeline, path))
    path.unlink()
    state["betas"] = torch.linspace(0, 1, 1000, dtype=torch.float64)
    return {key: value for key, value in state.items() if key.startswith(part)}


def salun_compvis(pipeline, folder):
    torch.save(compvis(pipeline, folder), folder / "salun.pt")
    return folder / "salun.pt"


def salun_diffusers(pipeline, folder):
    torch.save(own(pipeline.unet), folder / "diffusers-salun.pt")
    return folder / "diffusers-salun.pt"


def esd_partial(pipeline, folder):
    state = {name: value for name, value in own(pipeline.unet).items() if in_unet(f"unet.{name}")}
    save_file(state, folder / "esd.safetensors")
    return folder / "esd.safetensors"


def esd_nested(pipeline, folder):
    """Module -> its own state dict."""
    layers = {
        name: module.state_dict()
        for name, module in pipeline.unet.named_modules()
        if in_unet(f"unet.{name}") and list(module.parameters(recurse=False))
    }
    torch.save(layers, folder / "esd.pt")
    return folder / "esd.pt"


def in_state_dict(pipeline, folder):
    """Lightning's, with the moving average of the base beside the weights."""
    state = compvis(pipeline, folder)
    average = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): torch.zeros_like(value)
        for key, value in state.items()
        if key.startswith("model.")
    }
    content = {"state_dict": state | average, "global_step": 3}
    torch.save(content, folder / "last.ckpt")
    return folder / "last.ckpt"


def folder_of(pipeline, folder):
    pipeline.save_pretrained(folder / "whole")
    return folder / "whole"


def unet_folder(pipeline, folder):
    pipeline.unet.save_pretrained(folder / "unet")
    return folder / "unet"


def components(pipeline, folder):
    pipeline.unet.save_pretrained(folder / "parts" / "unet")
    return folder / "parts"


def shards(pipeline, folder):
    pipeline.unet.save_pretrained(folder / "shards", max_shard_size="2MB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 1
    return folder / "shards"


def unet_key(prefix):
    def write(pipeline, folder):
        save_file(prefixed(prefix, own(pipeline.unet)), folder / "unet.safetensors")
        return folder / "unet.safetensors"

    return write


def ldm_key(prefix):
    def write(pipeline, folder):
        state = compvis(pipeline, folder, "model.diffusion_model.")
        shown = {prefix + key.removeprefix("model.diffusion_model."): state[key] for key in state}
        torch.save(shown, folder / "ldm.pt")
        return folder / "ldm.pt"

    return write


UNETS = {
    "SalUn, CompVis": salun_compvis,
    "SalUn, diffusers": salun_diffusers,
    "ESD": esd_partial,
    "ESD, nested": esd_nested,
    "Lightning": in_state_dict,
    "folder": folder_of,
    "folder of the UNet": unet_folder,
    "folder of parts": components,
    "shards": shards,
    "unet.": unet_key("unet."),
    "module.": unet_key("module."),
    "original names": ldm_key("model.diffusion_model."),
    "diffusion_model.": ldm_key("diffusion_model."),
    "bare original names": ldm_key(""),
}


@pytest.mark.parametrize("layout", UNETS)
def test_a_unet_is_read_to_the_bit(layout, base, tmp_path):
    pipeline = moved(tiny_sd1(), in_unet)
    delta = read_erased(base, [UNETS[layout](pipeline, tmp_path)], [canvas_concept("heart")])
    before = weights(base)
    assert same(applied(base, delta), weights(wrap(pipeline)))
    assert same(before, weights(base))  # left as it was found
    assert delta.count == sum(
        len(param.view(-1)[::3]) for name, param in before.items() if in_unet(name)
    )
    assert delta.origin.method == "foreign" and delta.title == "heart"


def test_a_delta_of_a_base_that_waits_in_main_memory_is_read_back(base, tmp_path):
    path = esd_partial(moved(tiny_sd1(), in_unet), tmp_path)
    options = LoadConfig(offload="blocks")
    read_erased(base, [path], [canvas_concept("heart")], options).save(tmp_path / "d.safetensors")
    config = ErasedDelta.load(tmp_path / "d.safetensors").origin.config
    assert config["erase"]["load"] == options.facts


def test_of_several_variants_the_one_that_is_asked_for_is_read(base, tmp_path):
    (tmp_path / "unet").mkdir()
    for variant, by in (("fp16", 0.01), ("non_ema", 0.02)):
        state = own(moved(tiny_sd1(), in_unet, by).unet)
        save_file(state, tmp_path / f"unet/diffusion_pytorch_model.{variant}.safetensors")
    with pytest.raises(ErasureError, match="only as fp16, non_ema; add --load.variant fp16"):
        read_erased(base, [tmp_path])
    delta = read_erased(base, [tmp_path], options=LoadConfig(variant="non_ema"))
    assert same(applied(base, delta), weights(wrap(moved(tiny_sd1(), in_unet, 0.02))))


def test_uce_gives_keys_and_values_alone(base, tmp_path):
    pipeline = moved(tiny_sd1(), keys_and_values)
    state = {
        f"{name}.weight": module.weight.detach().clone()
        for name, module in pipeline.unet.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v"))
    }
    save_file(state, tmp_path / "uce.safetensors")
    delta = read_erased(base, [tmp_path / "uce.safetensors"])
    assert same(applied(base, delta), weights(wrap(pipeline)))
    assert all("attn2.to_" in name for name in delta.values)


def bare(text_encoder) -> dict[str, torch.Tensor]:
    """Its weights without `text_model.`, as transformers 5 names them, and position ids."""
    state = {name.removeprefix("text_model."): value for name, value in own(text_encoder).items()}
    return state | {"embeddings.position_ids": torch.arange(32)[None]}


def advunlearn(state):
    """The wrapper holds the encoder, and its three parts once more."""
    twice = {}
    for name, value in state.items():
        twice[f"text_encoder.text_model.{name}"] = value
        twice[name.replace("embeddings.", "embedding.", 1)] = value
    return twice


TEXTS = {
    "AdvUnlearn": advunlearn,
    **{
        prefix or "bare": lambda state, prefix=prefix: prefixed(prefix, state)
        for prefix in (
            "text_encoder.text_model.",
            "text_model.",
            "cond_stage_model.transformer.text_model.",
            "cond_stage_model.transformer.",
            "transformer.text_model.",
            "",
        )
    },
}


@pytest.mark.parametrize("layout", TEXTS)
def test_a_text_encoder_is_read_to_the_bit(layout, base, tmp_path, caplog):
    pipeline = moved(tiny_sd1(), in_text)
    torch.save(TEXTS[layout](bare(pipeline.text_encoder)), tmp_path / "TextEncoder.pt")
    with caplog.at_level(logging.WARNING):
        delta = read_erased(base, [tmp_path / "TextEncoder.pt"])
    assert same(applied(base, delta), weights(wrap(pipeline)))
    assert delta.components == ["text_encoder"]
    assert not caplog.records  # position ids are no weights, and not worth a word


def test_a_weight_that_stands_twice_must_be_the_same_one(base, tmp_path):
    state = advunlearn(bare(moved(tiny_sd1(), in_text).text_encoder))
    state["final_layer_norm.bias"] = state["final_layer_norm.bias"] + 1
    torch.save(state, tmp_path / "text.pt")
    with pytest.raises(ErasureError, match=r"gives text_encoder\.\S+bias twice.*take one of them"):
        read_erased(base, [tmp_path / "text.pt"])


@pytest.mark.parametrize("family", FAMILIES | FLOWS)
def test_a_folder_that_was_saved_is_read_whole(family, tmp_path, caplog):
    """Every weight of every part, under the names that `save_pretrained` writes."""
    make = (FAMILIES | FLOWS)[family]
    base, pipeline = wrap(make(), family), make()
    moving = wrap(pipeline).parameters()
    with torch.no_grad():
        for param in moving.values():
            param += 0.01
    with caplog.at_level(logging.WARNING):
        delta = read_erased(base, [folder_of(pipeline, tmp_path)])
    assert delta.values.keys() == moving.keys() and same(applied(base, delta), dict(moving))
    assert not [one for one in caplog.records if "left out" in one.getMessage()]


def test_other_statistics_of_a_vae_are_told(tmp_path, caplog):
    base, pipeline = wrap(tiny_klein(), "klein"), tiny_klein()
    pipeline.vae.bn.running_mean += 1
    with torch.no_grad():
        pipeline.transformer.x_embedder.weight += 1
    with caplog.at_level(logging.WARNING):
        read_erased(base, [folder_of(pipeline, tmp_path)])
    assert "its vae, which differs from the base's in 1 tensors" in caplog.text


@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.diffusion_model.", ""])
@pytest.mark.parametrize("family", ["sd3", "flux", *FLOWS])
def test_a_flow_transformer_is_read_with_any_part_of_its_prefix(family, prefix, tmp_path):
    """Weights and LoRAs, as ComfyUI and ai-toolkit write them."""
    base = wrap((FAMILIES | FLOWS)[family](), family)
    held = base.parameters("transformer").items()
    name, param = next((n, p) for n, p in held if n.endswith((".to_q.weight", ".to_out.0.weight")))
    key = prefix + name.removeprefix("transformer.")
    save_file({key: param.detach() + 1}, tmp_path / "weights.safetensors")
    down, up = torch.ones(1, param.shape[1]), torch.ones(param.shape[0], 1)
    layer = key.removesuffix(".weight")
    lora = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    save_file(lora, tmp_path / "lora.safetensors")
    for file in ("weights", "lora"):
        delta = read_erased(base, [tmp_path / f"{file}.safetensors"])
        assert torch.allclose(applied(base, delta)[name], param + 1)


@pytest.mark.parametrize("make", [tiny_sd2, tiny_sdxl])
def test_stacked_text_encoders_are_read_from_a_single_file(make, tmp_path):
    base, pipeline = wrap(make(), "base"), moved(make(), lambda name: "attn" in name)
    delta = read_erased(base, [write_single_file(pipeline, tmp_path / "all.safetensors")])
    assert same(applied(base, delta), weights(wrap(pipeline)))
    assert {name.split(".")[0] for name in delta.values} == set(base.components)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_of_two_encoders_the_shapes_tell_which_is_meant(part, tmp_path):
    base = wrap(tiny_sdxl(), "base")
    pipeline = moved(tiny_sdxl(), lambda name: name.startswith(f"{part}."))
    torch.save(bare(getattr(pipeline, part)), tmp_path / "text.pt")
    delta = read_erased(base, [tmp_path / "text.pt"])
    assert same(applied(base, delta), weights(wrap(pipeline)))


def test_a_file_changes_canvas_itself(tmp_path):
    base, pipeline = load_model("canvas"), load_model("canvas").pipeline()
    delta = read_erased(base, [esd_partial(moved(pipeline, in_unet), tmp_path)])
    assert same(applied(base, delta), weights(wrap(pipeline)))


# ---- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_rounded_copy_of_the_base_is_the_base(dtype, base, tmp_path):
    torch.save(
        {name: value.to(dtype) for name, value in own(base.component("unet")).items()},
        tmp_path / "a.pt",
    )
    with pytest.raises(
        ErasureError, match=r"of which no value differs .*rounding to b?float16 alone"
    ):
        read_erased(base, [tmp_path / "a.pt"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_file_changes_what_differs_from_the_rounded_base(dtype, base, tmp_path):
    pipeline = moved(tiny_sd1(), in_unet, by=1.0)
    rounded = {name: value.to(dtype) for name, value in own(pipeline.unet).items()}
    torch.save(rounded, tmp_path / "half.pt")
    after = applied(base, read_erased(base, [tmp_path / "half.pt"]))
    for name, old in weights(base).items():
        if in_unet(name):
            new = rounded[name.removeprefix("unet.")].float().view(-1)
            old = old.clone()
            old.view(-1)[::3] = new[::3]
        assert torch.equal(after[name], old), name


def test_a_tensor_that_is_the_base_rounded_and_written_wide_is_not_changed(base, tmp_path):
    """What a program leaves that loads a base in float16 and trains some of it in float32."""
    state = {name: value.half().float() for name, value in own(base.component("unet")).items()}
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    state[layer] = state[layer] + 1e-3
    torch.save(state, tmp_path / "wide.pt")
    delta = read_erased(base, [tmp_path / "wide.pt"])
    assert list(delta.values) == [f"unet.{layer}"]
    assert torch.equal(applied(base, delta)[f"unet.{layer}"], state[layer])


def test_a_base_in_the_dtype_of_the_file_gives_the_very_file(tmp_path):
    base = wrap(tiny_sd1().to(torch.float16), "base")
    pipeline = moved(tiny_sd1(), in_unet).to(torch.float16)
    delta = read_erased(base, [salun_diffusers(pipeline, tmp_path)])
    assert same(applied(base, delta), weights(wrap(pipeline)))


def test_a_base_that_would_round_the_file_is_refused(tmp_path):
    base = wrap(tiny_sd1().to(torch.float16), "base")
    delta = read_erased(base, [salun_diffusers(moved(tiny_sd1(), in_unet), tmp_path)])
    with pytest.raises(ErasureError, match="float32 values .* load the base in float32"):
        delta.check(base)


# ---- LoRA ----------------------------------------------------------------------------------------

BLOCK = "unet.mid_block.attentions.0.transformer_blocks.0"
LAYERS = {
    f"{BLOCK}.attn1.to_q": "attn1.processor.to_q_lora",
    f"{BLOCK}.attn2.to_out.0": "attn2.processor.to_out_lora",
}
CONV = "unet.down_blocks.0.resnets.0.conv1"
TEXT = "text_encoder.encoder.layers.1.self_attn.v_proj"
RANK = 3


def spelt(base, layer: str) -> str:
    """A layer's name in this version of transformers, which may put `text_model.` before it."""
    names = base.parameters()
    return next(name for name in names if name.replace("text_model.", "") == f"{layer}.weight")


def factors(base, layers):
    """Layer -> down, up, and the product that they add."""
    made = {}
    torch.manual_seed(1)
    for layer in layers:
        shape = base.parameters()[spelt(base, layer)].shape
        down, up = torch.randn(RANK, *shape[1:]), torch.randn(shape[0], RANK)
        product = (up.double() @ down.flatten(1).double()).view(shape)
        made[layer] = down, up.view(*up.shape, *(1,) * (len(shape) - 2)), product
    return made


def kohya(made):
    state = {}
    for layer, (down, up, _) in made.items():
        head, _, name = layer.partition(".")
        name = name.replace("encoder.layers", "text_model.encoder.layers")
        key = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[head] + name.replace(".", "_")
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        state[f"{key}.alpha"] = torch.tensor(1.5)
    return state, {}, None, 1.5 / RANK


def peft(made):
    """What `save_pretrained` of a peft model of the UNet writes, its settings in a file beside."""
    state = {}
    for layer, (down, up, _) in made.items():
        key = "base_model.model." + layer.removeprefix("unet.")
        state |= {f"{key}.lora_A.default.weight": down, f"{key}.lora_B.default.weight": up}
    return state, {}, {"r": RANK, "lora_alpha": 6, "peft_type": "LORA"}, 6 / RANK


def diffusers_new(made):
    state = {}
    for layer, (down, up, _) in made.items():
        state |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    told = {f"{head}.lora_alpha": 6 for head in ("unet", "text_encoder")}
    told |= {"unet.r": RANK, "unet.target_modules": [key.removeprefix("unet.") for key in LAYERS]}
    return state, {"lora_adapter_metadata": json.dumps(told)}, None, 6 / RANK


def diffusers_old(made):
    state = {}
    for layer, (down, up, _) in made.items():
        state |= {f"{layer}.lora.down.weight": down, f"{layer}.lora.up.weight": up}
    return state, {}, None, 1.0


def processors(made):
    state = {}
    for layer, (down, up, _) in made.items():
        key = layer.rpartition(".attn")[0] + "." + LAYERS[layer]
        state |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    return state, {}, None, 1.0


LORAS = {
    "kohya": (kohya, [*LAYERS, CONV, TEXT]),
    "peft": (peft, [*LAYERS, CONV]),
    "diffusers": (diffusers_new, [*LAYERS, CONV, TEXT]),
    "diffusers, old": (diffusers_old, [*LAYERS, CONV]),
    "attention processors": (processors, list(LAYERS)),
}


@pytest.mark.parametrize("layout", LORAS)
def test_a_lora_adds_its_scaled_product(layout, base, tmp_path):
    write, layers = LORAS[layout]
    made = factors(base, layers)
    state, metadata, beside, scale = write(made)
    save_file(state, tmp_path / "adapter_model.safetensors", metadata)
    if beside:
        (tmp_path / "adapter_config.json").write_text(json.dumps(beside))
    after = applied(base, read_erased(base, [tmp_path]))
    products = {spelt(base, layer): product for layer, (*_, product) in made.items()}
    for name, old in weights(base).items():
        wanted = (old.double() + scale * products[name]).float() if name in products else old
        torch.testing.assert_close(after[name], wanted, rtol=1e-6, atol=1e-7)
        assert torch.equal(after[name], old) == (name not in products), name


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_our_own_lora_comes_back(layout, base, tmp_path):
    delta = read_erased(base, [esd_partial(moved(tiny_sd1(), in_unet), tmp_path)])
    lora = extract_lora(delta, base, rank=4)
    lora.save(tmp_path / "lora.safetensors", layout=layout)
    read = applied(base, read_erased(base, [tmp_path / "lora.safetensors"]))
    for name, value in applied(base, lora.as_delta(base)).items():
        torch.testing.assert_close(read[name], value, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "diffusers, old"])
def test_a_lora_is_what_stock_diffusers_makes_of_it(layout, base, tmp_path):
    write, _ = LORAS[layout]
    state, metadata, _, _ = write(factors(base, list(LAYERS)))
    save_file(state, tmp_path / "lora.safetensors", {"format": "pt", **metadata})
    after = applied(base, read_erased(base, [tmp_path / "lora.safetensors"]))
    pipeline = tiny_sd1()
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    for name, param in wrap(pipeline).parameters().items():
        torch.testing.assert_close(after[name], param.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "key", ["lora_unet_x.hada_w1_a", "lora_unet_x.lokr_w1", "lora_unet_x.dora_scale", "x.diff"]
)
def test_other_adapters_than_two_factors_are_refused(key, base, tmp_path):
    state = kohya(factors(base, list(LAYERS)))[0] | {key: torch.ones(2, 2)}
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(ErasureError, match=f"holds {key}.*merge it into its base"):
        read_erased(base, [tmp_path / "lora.safetensors"])


def test_a_lora_of_another_size_is_refused(base, tmp_path):
    made = factors(wrap(tiny_sdxl()), [f"{BLOCK}.attn2.to_k"])
    save_file(kohya(made)[0], tmp_path / "lora.safetensors")
    with pytest.raises(ErasureError, match="is not of this base: the factors of lora_unet_mid"):
        read_erased(base, [tmp_path / "lora.safetensors"])


# ---- several -------------------------------------------------------------------------------------


def test_a_unet_and_a_text_encoder_are_put_together(base, tmp_path):
    pipeline = moved(moved(tiny_sd1(), in_unet), in_text)
    torch.save(bare(pipeline.text_encoder), tmp_path / "text.pt")
    paths = [esd_partial(pipeline, tmp_path), tmp_path / "text.pt"]
    delta = read_erased(base, paths)
    assert same(applied(base, delta), weights(wrap(pipeline)))
    told = json.loads(delta.metadata["foreign"])
    assert [one["file"] for one in told] == ["esd.safetensors", "text.pt"]


def test_a_lora_adds_to_weights_that_a_file_gives(base, tmp_path):
    pipeline = moved(tiny_sd1(), lambda name: "attn1.to_q" in name)
    made = factors(base, list(LAYERS))
    save_file(diffusers_old(made)[0], tmp_path / "lora.safetensors")
    both = [salun_diffusers(pipeline, tmp_path), tmp_path / "lora.safetensors"]
    after = applied(base, read_erased(base, both))
    merged = weights(wrap(pipeline))
    for layer, (*_, product) in made.items():
        merged[f"{layer}.weight"] = (merged[f"{layer}.weight"].double() + product).float()
    for name, value in merged.items():
        torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-6)


def test_two_files_that_contradict_each_other_are_refused(base, tmp_path):
    for folder, by in (("a", 0.01), ("b", 0.02)):
        (tmp_path / folder).mkdir()
        esd_partial(moved(tiny_sd1(), in_unet, by), tmp_path / folder)
    paths = [tmp_path / folder / "esd.safetensors" for folder in ("a", "b")]
    with pytest.raises(ErasureError, match="both change unet.* name the one that is meant"):
        read_erased(base, paths)


def test_what_another_program_put_in_a_concepts_place_stays_unknown(base, tmp_path):
    path = esd_partial(moved(tiny_sd1(), in_unet), tmp_path)
    theirs = read_erased(base, [path], [canvas_concept("heart")])
    ours = replace(theirs, metadata={**theirs.metadata, "concepts": dump([canvas_concept("star")])})
    del ours.metadata["foreign"]
    half = compose(base, [(theirs, 0.5)])
    assert unanchored(theirs.metadata) == unanchored(half.metadata) == {"heart"}
    assert "| heart | not known |" in model_card(None, half.metadata)

    both = compose(base, [(half, 1.0), (ours, 1.0)])
    card = model_card(None, both.metadata)
    assert "| heart | not known |" in card and "| star | not known |" not in card
    assert unanchored(compose(base, [(theirs, -1.0), (ours, 1.0)]).metadata) == set()

    later = describe([canvas_concept("star")], EraseConfig(), SalUnConfig(), after=theirs)
    assert unanchored(later) == {"heart"}


def test_a_delta_stays_what_it_is_and_names_its_concepts(base, tmp_path):
    path = esd_partial(moved(tiny_sd1(), in_unet), tmp_path)
    delta = read_erased(base, [path], [canvas_concept("heart")])
    delta.save(tmp_path / "delta.safetensors")
    again = read_erased(base, [tmp_path / "delta.safetensors"])
    assert again.sha256 == delta.sha256 and again.metadata["concepts"] == delta.metadata["concepts"]
    renamed = read_erased(base, [tmp_path / "delta.safetensors"], [canvas_concept("moon")])
    assert renamed.title == "moon" and renamed.sha256 == delta.sha256


# ---- what is refused, and what is left out and said ----------------------------------------------


def test_a_file_of_another_base_is_refused_by_its_shapes(base, tmp_path):
    torch.save(own(tiny_sd2().unet), tmp_path / "sd2.pt")
    with pytest.raises(
        ErasureError, match=r"not of this base: \d+ of its 686 tensors .*\[.*, 48\]"
    ):
        read_erased(base, [tmp_path / "sd2.pt"])


def test_a_pipeline_of_another_class_or_prediction_is_refused(base, tmp_path):
    with pytest.raises(ErasureError, match="'StableDiffusion3Pipeline' there"):
        read_erased(base, [folder_of(tiny_sd3(), tmp_path)])
    velocity = tiny_sd1()
    velocity.scheduler.register_to_config(prediction_type="v_prediction")
    velocity.save_pretrained(tmp_path / "velocity")
    with pytest.raises(ErasureError, match="'v_prediction' there, 'epsilon' in base"):
        read_erased(base, [tmp_path / "velocity"])


@pytest.mark.parametrize(
    "key, what",
    [
        ("control_model.input_blocks.0.weight", "fits this base in none .* it is a ControlNet"),
        ("double_blocks.0.weight", "it is of the Flux family"),
        ("down_blocks.0.resnets.0.conv1.wieght", r"nearest name .* is down_blocks\S+conv1.weight"),
    ],
)
def test_a_file_that_fits_nowhere_is_refused_by_name(key, what, base, tmp_path):
    save_file({key: torch.ones(2, 2)}, tmp_path / "odd.safetensors")
    with pytest.raises(ErasureError, match=what):
        read_erased(base, [tmp_path / "odd.safetensors"])


def test_what_does_not_fit_is_left_out_and_told(base, tmp_path, caplog):
    state = load_file(esd_partial(moved(tiny_sd1(), in_unet), tmp_path))
    save_file(state | {"gate.weight": torch.ones(3)}, tmp_path / "gated.safetensors")
    with caplog.at_level(logging.WARNING):
        delta = read_erased(base, [tmp_path / "gated.safetensors"])
    (told,) = json.loads(delta.metadata["foreign"])
    assert told["left_out"] == ["1 that are no weights of this base: gate.weight"]
    assert told["left_out"][0] in caplog.text


def test_another_vae_is_left_out_and_told(base, tmp_path):
    pipeline = moved(tiny_sd1(), in_unet)
    same_vae = read_erased(base, [salun_compvis(pipeline, tmp_path)])
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias += 1
    other = read_erased(base, [salun_compvis(pipeline, tmp_path)])
    assert other.sha256 == same_vae.sha256
    assert "left_out" not in json.loads(same_vae.metadata["foreign"])[0]
    assert (
        "its vae, which differs from the base's in 1 tensors"
        in json.loads(other.metadata["foreign"])[0]["left_out"][0]
    )


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_no_code_comes_out_of_a_file(base, tmp_path):
    torch.save({"conv_in.weight": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ErasureError, match="is code, so it was not opened"):
        read_erased(base, [tmp_path / "trap.pt"])


@pytest.mark.parametrize(
    "value, what",
    [
        (torch.tensor(float("nan")), "holds NaN or infinite values"),
        (torch.tensor(1, dtype=torch.int8), "a quantised or sparse checkpoint cannot be used"),
    ],
)
def test_weights_that_are_none_are_refused(value, what, base, tmp_path):
    shape = base.parameters()["unet.conv_in.weight"].shape
    torch.save({"conv_in.weight": value.expand(shape).clone()}, tmp_path / "a.pt")
    with pytest.raises(ErasureError, match=f"conv_in.weight.*{what}"):
        read_erased(base, [tmp_path / "a.pt"])


def test_a_path_without_weights_is_refused(base, tmp_path):
    with pytest.raises(ErasureError, match="there is no file or folder .*absent"):
        read_erased(base, [tmp_path / "absent"])
    with pytest.raises(ErasureError, match="holds no weights; name a file"):
        read_erased(base, [tmp_path])
    for name in ("a", "b"):
        esd_partial(moved(tiny_sd1(), in_unet), tmp_path).rename(tmp_path / f"{name}.safetensors")
    with pytest.raises(ErasureError, match=r"holds several \(a.safetensors, b.safetensors\)"):
        read_erased(base, [tmp_path])


def test_a_foreign_delta_is_saved_and_loaded_as_any_other(base, tmp_path):
    path = esd_partial(moved(tiny_sd1(), in_unet), tmp_path)
    delta = read_erased(base, [path], [canvas_concept("heart")])
    delta.save(tmp_path / "delta.safetensors")
    again = ErasedDelta.load(tmp_path / "delta.safetensors")
    assert again.sha256 == delta.sha256 and again.origin.concepts == [canvas_concept("heart")]
    assert str(tmp_path) not in json.dumps(again.metadata)
