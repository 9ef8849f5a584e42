"""Flow transformers behind a language model as files: load, erase, export in every format, load in
stock diffusers, same image; and folders that are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from erase.delta import ErasedDelta
from erase.export import (
    export_components,
    export_delta,
    export_diffusers,
    export_lora,
)
from erase.export.lora import extract_lora
from erase.models import LoadConfig, load_model, wrap
from erase.models.qwen_image import StockQwen
from erase.prompts.errors import ErasureError
from tests.flow_families import FLOWS, tiny_klein, tiny_z_image
from tests.made import maker
from tests.transformer_files import check_file_both_ways

pytestmark = pytest.mark.usefixtures("short_chat")


def image(pipeline) -> np.ndarray:
    """Pixels in [0, 1] of a stock call, of 64 pixels a side, its weights copied out of the files
    that they are mapped from."""
    for part in pipeline.components.values():
        for weight in part.parameters() if isinstance(part, torch.nn.Module) else ():
            weight.data = weight.data.clone()
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 2, "height": 64, "width": 64, "max_sequence_length": 40}
    generator = torch.Generator().manual_seed(3)
    asked = {"prompt": "a red heart", "generator": generator, "output_type": "np"}
    return pipeline(**asked, **given).images[0]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """64 pixels, of Qwen-Image too, no part of which says a size."""
    monkeypatch.setattr(StockQwen, "stated_side", lambda _: 8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return maker(FLOWS, image, tmp_path_factory)


FILES = [family for family in FLOWS if family != "klein-distilled"]


@pytest.fixture(params=FILES)
def it(request, made):
    return made(request.param)


def test_diffusers_folder(it, tmp_path):
    export_diffusers(it.delta, str(it.base), tmp_path / "out")
    assert np.array_equal(image(DiffusionPipeline.from_pretrained(tmp_path / "out")), it.image)
    assert not np.array_equal(it.plain, it.image)


def test_components(it, tmp_path):
    export_components(it.delta, str(it.base), tmp_path / "out")
    kind = type(load_model(it.base).component("transformer"))
    part = kind.from_pretrained(tmp_path / "out" / "transformer")
    whole = DiffusionPipeline.from_pretrained(it.base, transformer=part)
    assert np.array_equal(image(whole), it.image)


def test_a_transformer_in_a_file_gives_the_same_delta_and_image(it, tmp_path):
    check_file_both_ways(it, tmp_path, image)


def test_delta(it, tmp_path):
    export_delta(it.delta, tmp_path / "out.safetensors")
    model = ErasedDelta.load(tmp_path / "out.safetensors").apply(load_model(it.base))
    assert np.array_equal(image(model.pipeline()), it.image)


def test_lora(it, tmp_path):
    """At full rank a LoRA holds all but biases and norms; stock diffusers with it draws what base +
    LoRA as a delta draws."""
    pytest.importorskip("peft")
    lora = extract_lora(it.delta, load_model(it.base), rank=64)
    export_lora(lora, tmp_path / "lora")
    pipeline = DiffusionPipeline.from_pretrained(it.base)
    pipeline.load_lora_weights(tmp_path / "lora")
    ours = image(lora.as_delta(load_model(it.base)).apply(load_model(it.base)).pipeline())
    assert np.abs(image(pipeline) - ours).max() < 1e-3
    assert not np.array_equal(ours, it.plain)


def test_a_text_encoder_is_exported_as_a_component(it, tmp_path):
    base = load_model(it.base)
    name = next(name for name in base.parameters() if name.endswith("mlp.up_proj.weight"))
    weight = base.parameters()[name].detach().clone()
    changed = {name: weight + 0.1}
    delta = ErasedDelta.between({name: weight}, changed, it.delta.metadata)
    export_components(delta, str(it.base), tmp_path / "out")
    kind = type(base.component("text_encoder"))
    part = kind.from_pretrained(tmp_path / "out" / "text_encoder")
    own = dict(part.named_parameters())[name.removeprefix("text_encoder.")]
    assert torch.equal(own, changed[name])
    whole = DiffusionPipeline.from_pretrained(it.base, text_encoder=part)
    assert np.array_equal(image(whole), image(delta.apply(base).pipeline()))


# ---- what is refused ----


def edited(path, **change):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.fixture(params=FILES)
def folder(request, tmp_path):
    FLOWS[request.param]().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_code_and_classes_of_others_are_refused(folder):
    edited(folder / "text_encoder/config.json", auto_map={"AutoModel": "mine.Model"})
    with pytest.raises(ErasureError, match="text_encoder/config.json asks for code of its own"):
        load_model(folder)
    edited(folder / "model_index.json", text_encoder=["transformers", "T5EncoderModel"])
    with pytest.raises(
        ErasureError, match="its text_encoder is a transformers.T5EncoderModel, not"
    ):
        load_model(folder)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content | upper }}", "does not stand once and as it is"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "does not stand once and as it is"),
        ("{% for %}", "cannot be filled"),
        (None, "cannot be filled"),
    ],
    ids=["changed", "twice", "broken", "none"],
)
def test_a_chat_template_that_changes_prompts_is_refused(template, message):
    pipeline = tiny_z_image()
    pipeline.tokenizer.chat_template = template
    with pytest.raises(ErasureError, match=f"base: .*{message}"):
        wrap(pipeline, "base")


def test_a_tokenizer_that_fills_up_before_prompts_or_lacks_merges_is_refused(tmp_path):
    pipeline = tiny_z_image()
    pipeline.tokenizer.padding_side = "left"
    with pytest.raises(ErasureError, match="fills up short prompts on the left"):
        wrap(pipeline, "base")
    tiny_z_image().save_pretrained(tmp_path / "base")
    path = tmp_path / "base/tokenizer/tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:3]
    path.write_text(json.dumps(content))
    with pytest.raises(ErasureError, match="never makes .* tokens of its vocabulary"):
        load_model(tmp_path / "base")


@pytest.mark.parametrize(
    ("kind", "does"),
    [
        ("ZImageOmniPipeline", "edits images"),
        ("ZImageInpaintPipeline", "fills images"),
        ("ZImageControlNetPipeline", "follows an image"),
        ("QwenImageEditPlusPipeline", "edits images"),
        ("QwenImageLayeredPipeline", "takes images apart"),
    ],
)
def test_siblings_are_refused_by_name(kind, does, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(ErasureError, match=f"says {kind}, which {does}.*give the text-to-image"):
        load_model(tmp_path)


def test_a_vae_of_another_kind_has_no_substitute(tmp_path):
    tiny_klein().save_pretrained(tmp_path / "base")
    options = LoadConfig(vae=str(tmp_path / "base/vae"))
    with pytest.raises(ErasureError, match="whose VAE is an AutoencoderKLFlux2; no other is read"):
        load_model(tmp_path / "base", options=options)


def test_an_omni_transformer_is_refused():
    pipeline = tiny_z_image()
    pipeline.transformer.register_to_config(siglip_feat_dim=8)
    with pytest.raises(ErasureError, match="takes images beside text .* Omni model"):
        wrap(pipeline, "base")


def test_statistics_that_are_not_finite_are_refused(tmp_path):
    pipeline = tiny_klein()
    pipeline.vae.bn.running_var[3] = torch.nan
    pipeline.save_pretrained(tmp_path / "base")
    with pytest.raises(ErasureError, match="vae.bn.running_var holds 1 values that are not finite"):
        load_model(tmp_path / "base")
