"""Each family behind the one protocol is what its stock pipeline is: conditions, forward process,
prediction, scopes."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

from erase.models import LoadConfig, load_model, wrap
from erase.models.pipelines import decode, denoiser, stock
from erase.models.scopes import select
from erase.prompts.errors import ErasureError
from tests.families import FAMILIES, tiny_flux, tiny_sd1, tiny_sd3, tiny_sdxl


@pytest.fixture(params=FAMILIES)
def pipeline(request):
    return FAMILIES[request.param]()


def plain(pipeline, latents):
    """Latents as a family's pipeline gives them, as the others' do: of FLUX.1, out of patches."""
    return stock(pipeline).given(latents, 8)


def is_flux(pipeline):
    return stock(pipeline).patch == 2


def first_prediction(pipeline, prompt, guidance):
    """What the denoiser takes and gives in the first step of a stock call, prompts given as
    text."""
    seen = {}

    def record(module, args, given, found):
        seen.setdefault("xt", given.get("hidden_states", args[0] if args else None))
        seen.setdefault("t", given.get("timestep", args[1] if len(args) > 1 else None))
        seen.setdefault("prediction", found[0])

    handle = denoiser(pipeline).register_forward_hook(record, with_kwargs=True)
    pipeline(
        prompt,
        num_inference_steps=2,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        **stock(pipeline).stated(),
    )
    handle.remove()
    seen |= {name: plain(pipeline, seen[name]) for name in ("xt", "prediction")}
    # FLUX's transformer multiplies by 1000 itself
    seen["t"] = seen["t"] * 1000 if is_flux(pipeline) else seen["t"]
    return seen


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_prediction_is_that_of_the_stock_pipeline(pipeline, guidance):
    if is_flux(pipeline) and guidance != 1:
        pytest.skip("a prediction under a prompt, without guidance, is what methods ask for")
    model, seen = wrap(pipeline), first_prediction(pipeline, "a red house", guidance)
    t = seen["t"].reshape(-1)[:1]
    # sigma 1 is the last timestep, 999
    index = (t - 1).round().long() if hasattr(pipeline, "transformer") else t.long()
    # null first, as in the pipelines
    cond = model.encode(["a red house"]) if guidance == 1 else model.encode(["", "a red house"])
    ours = model.predict(seen["xt"], index.expand(len(seen["xt"])), cond)
    assert torch.allclose(ours, seen["prediction"], atol=1e-5)


def test_sampled_latents_are_those_of_the_stock_pipeline(pipeline):
    model = wrap(pipeline)
    ours = model.sample(["a red house", "a moon"], [3, 4], 3, 4.0)
    pipeline.scheduler = model.sampler()
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    drawn = pipeline(
        ["a red house", "a moon"],
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=generators,
        output_type="latent",
        **stock(pipeline).stated(),
    )
    assert torch.allclose(ours, plain(pipeline, drawn.images), atol=1e-4)
    pixels = pipeline(
        **stock(pipeline).arguments(model.encode(["a moon"]), model.encode([""])),
        num_inference_steps=2,
        latents=stock(pipeline).taken(ours[:1]).clone(),
        output_type="pt",
    )
    assert pixels.images.shape == (1, 3, model.image_size, model.image_size)


def test_decoded_pixels_are_those_of_the_stock_pipeline(pipeline):
    given = {"prompt": "a moon", "num_inference_steps": 2}
    latents, pixels = (
        pipeline(**given, generator=torch.Generator().manual_seed(0), output_type=kind).images
        for kind in ("latent", "pt")
    )
    assert torch.equal(decode(pipeline, plain(pipeline, latents), "no"), pixels)


def test_forward_process_and_target_are_those_of_the_scheduler(pipeline):
    model, scheduler = wrap(pipeline), pipeline.scheduler
    x0, noise = torch.randn(
        2, 3, *model.latent_shape, generator=torch.Generator().manual_seed(0)
    ).unbind()
    t = torch.tensor([0, 400, 999])
    xt, target = model.add_noise(x0, noise, t), model.target(x0, noise, t)
    if hasattr(scheduler, "scale_noise"):
        if is_flux(pipeline) and scheduler.config.use_dynamic_shifting:
            mu = 0.5 + (16 - 256) / (4096 - 256) * (1.15 - 0.5)  # 16 patches
            scheduler.set_timesteps(1000, sigmas=torch.arange(1000, 0, -1) / 1000, mu=mu)
        theirs = scheduler.scale_noise(x0, scheduler.timesteps[[999, 599, 0]], noise)
        assert torch.allclose(xt, theirs, atol=1e-6)
        assert torch.allclose(xt[2], noise[2]) and torch.equal(target, noise - x0)
    else:
        theirs = DDIMScheduler.from_config(scheduler.config)
        assert torch.allclose(xt, theirs.add_noise(x0, noise, t), atol=1e-6)
        v = scheduler.config.prediction_type == "v_prediction"
        assert torch.allclose(target, theirs.get_velocity(x0, noise, t) if v else noise, atol=1e-6)


MAKERS = [tiny_sd1, tiny_sdxl, tiny_sd3, tiny_flux]


@pytest.mark.parametrize("make", MAKERS, ids=["sd1", "sdxl", "sd3", "flux"])
def test_scopes_divide_the_denoiser(make):
    params = wrap(make()).parameters()
    full, text, kv, image, ff, rest = (
        set(select(params, s)) for s in ("full", "xattn", "xattn_kv", "selfattn", "ff", "noxattn")
    )
    assert text | rest == full and not text & rest and kv < text and image < rest
    assert ff < rest and not ff & image
    assert not any(name.startswith("text_encoder") for name in full) and select(
        params, "text_encoder"
    )
    assert len(kv) == sum(
        name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        for name in params
        if ".attn2.add" not in name
    ) or (make in (tiny_sd3, tiny_flux) and all("add_k" in n or "add_v" in n for n in kv))


def test_a_block_of_one_stream_is_neither_the_texts_nor_the_images():
    params = wrap(tiny_flux()).parameters()
    single = {name for name in params if ".single_transformer_blocks." in name}
    attention = {name for name in single if ".attn." in name}
    modulation = {name for name in single if ".norm." in name}
    for scope in ("xattn", "xattn_kv", "selfattn"):
        assert not single & set(select(params, scope))
    assert set(select(params, "ff")) & single == single - attention - modulation


def test_sdxl_null_condition_is_zeros_and_another_empty_prompt_is_not():
    pipeline = tiny_sdxl()
    assert not wrap(pipeline).encode([""]).embeddings.any()
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    assert wrap(pipeline).encode([""]).embeddings.any()


def test_force_upcast_decodes_in_float32_and_puts_the_vae_back():
    pipeline = tiny_sdxl()
    latents = torch.randn(1, 4, 8, 8) * 0.1
    pipeline.vae.to(torch.float16)
    narrow = decode(pipeline, latents, "fp16")
    assert pipeline.vae.dtype == torch.float16
    pipeline.vae.to(torch.float32)  # the same rounded weights
    assert torch.equal(decode(pipeline, latents, "no"), narrow)


# What cannot be loaded is named.


@pytest.fixture
def folder(tmp_path):
    tiny_sd1().save_pretrained(tmp_path / "sd1")
    return tmp_path / "sd1"


def unet_file(folder):
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def edited(path, change):
    """Rewrite a JSON file."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def damaged(folder, change):
    tensors = load_file(unet_file(folder))
    change(tensors)
    save_file(tensors, unet_file(folder), {"format": "pt"})


@pytest.mark.parametrize(
    "make", MAKERS, ids=["StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux"]
)
def test_the_family_is_recognised(make, tmp_path, request):
    make().save_pretrained(tmp_path / "model")
    assert type(load_model(tmp_path / "model")).__name__ == request.node.callspec.id


def test_a_folder_without_t5_is_loaded_without_it(tmp_path):
    tiny_sd3(t5=False).save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model")
    assert model.pipeline().text_encoder_3 is None and not any(
        "text_encoder_3" in name for name in model.parameters()
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("conv_in.weight"), "lacks conv_in.weight"),
        (lambda t: t.update(stranger=torch.zeros(1)), "holds in surplus stranger"),
        (
            lambda t: t["conv_in.bias"][0].fill_(float("nan")),
            "conv_in.bias holds 1 values that are not finite",
        ),
        (lambda t: t.update({"conv_in.bias": torch.zeros(3)}), "conv_in.bias"),
    ],
    ids=["missing", "surplus", "nan", "shape"],
)
def test_damaged_weights_are_named(folder, change, message):
    damaged(folder, change)
    with pytest.raises(ErasureError, match=message):
        load_model(folder)


def test_truncated_weights_are_named(folder):
    unet_file(folder).write_bytes(unet_file(folder).read_bytes()[:1000])
    with pytest.raises(ErasureError, match="cannot load .*unet"):
        load_model(folder)


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("model_index.json", lambda d: d.update(_class_name="Flux2Pipeline"),
         "says Flux2Pipeline, which is not supported; supported: Stable"),
        ("model_index.json", lambda d: d.pop("_class_name"), "names no pipeline class"),
        ("scheduler/scheduler_config.json", lambda d: d.update(prediction_type="sample"),
         "prediction type 'sample' is not supported"),
        ("unet/config.json", lambda d: d.update(in_channels=9), "conv_in.weight"),
    ],
    ids=["family", "index", "prediction", "channels"],
)  # fmt: skip
def test_other_families_are_refused(folder, file, change, message):
    edited(folder / file, change)
    with pytest.raises(ErasureError, match=message):
        load_model(folder)


def test_inpainting_and_refiner_models_are_refused():
    pipeline = tiny_sd1()
    pipeline.unet.register_to_config(in_channels=9)
    with pytest.raises(
        ErasureError, match="takes 9 channels where latents have 4, so it is an inpainting"
    ):
        wrap(pipeline, "x")
    pipeline = tiny_sdxl()
    pipeline.text_encoder = None
    with pytest.raises(ErasureError, match="SDXL refiner; give the base model"):
        wrap(pipeline, "x")


def test_variant_dtype_and_a_contradicted_prediction(folder, tmp_path):
    tiny_sd1().to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    half = load_model(tmp_path / "half", options=LoadConfig(variant="fp16", dtype="float16"))
    assert {p.dtype for p in half.parameters().values()} == {torch.float16}
    with pytest.raises(ErasureError, match="has weights only as fp16; add --load.variant fp16"):
        load_model(tmp_path / "half")
    with pytest.raises(ErasureError, match="its prediction is 'epsilon', not 'v_prediction'"):
        load_model(folder, options=LoadConfig(prediction="v_prediction"))
    with pytest.raises(ErasureError, match="unknown dtype 'fp16'"):
        LoadConfig(dtype="fp16")


def test_the_safety_checker_is_left_out_and_said_so(folder, caplog):
    edited(
        folder / "model_index.json",
        lambda d: d.update(safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"]),
    )
    with caplog.at_level("INFO", "erase"):
        assert load_model(folder).pipeline().safety_checker is None
    assert "safety_checker is left out" in caplog.text


@pytest.mark.parametrize(
    "name, message",
    [("nobody/no-such-model", "cannot be fetched from the hub"), ("a/b/c", "no hub id")],
)
def test_a_hub_id_that_cannot_be_reached_is_one_sentence(name, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ErasureError, match=message) as error:
        load_model(name, options=LoadConfig(offline=True))
    assert "\n" not in str(error.value)


class NoAnswer(ConnectionError):
    """As the hub's client raises it."""

    response: object | None = None


def test_a_hub_that_cannot_be_reached_is_told_from_one_that_refuses(monkeypatch):
    def download(*_, **__):
        try:
            raise cause
        except NoAnswer as error:
            raise OSError("Cannot load the model " + 100 * "and so on ") from error

    monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
    cause = NoAnswer("no route")
    with pytest.raises(
        ErasureError, match="and the hub cannot be reached; check the name, or give"
    ):
        load_model("nobody/no-such-model")
    cause.response = "404"
    with pytest.raises(
        ErasureError, match=r"cannot be fetched from the hub.* (and|so|on) \.\.\.\)"
    ):
        load_model("nobody/no-such-model")
