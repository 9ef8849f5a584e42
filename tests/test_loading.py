"""What a user gives as a checkpoint is loaded right, or refused in one sentence that names the way
out."""

import json
import logging
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import nn

from erase.delta import ErasedDelta
from erase.delta.base import load_base
from erase.eval.generate import GenerateConfig, generate
from erase.latents.config import LatentConfig
from erase.models import CANVAS, LoadConfig, load_model, wrap
from erase.models.loading import without_absent
from erase.models.prompt_checks import check_prompts, cut_prompts
from erase.models.single_file import ldm, load_single_file, write_single_file
from erase.models.single_file.recognise import decide_prediction
from erase.models.single_file.tensor_file import TensorFile
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import PromptRow, PromptSet
from erase.run import EraseConfig, erase_concept
from erase.scripts import run_erase, run_export, run_generate
from erase.scripts.cli import run
from erase.training.running import checkpointed
from tests.families import tiny_flux, tiny_sd1, tiny_sd3, tiny_sdxl

MAKERS = {"sd1": tiny_sd1, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Folders of the families, not to be changed."""
    root = tmp_path_factory.mktemp("saved")
    for name, make in MAKERS.items():
        make().save_pretrained(root / name)
    return root


@pytest.fixture
def copied(saved, tmp_path):
    """`copied(family)`: a folder to damage."""

    def copy(family="sd1"):
        return Path(shutil.copytree(saved / family, tmp_path / family))

    return copy


@pytest.fixture
def no_network(monkeypatch):
    """A hub that nothing may ask."""

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)


def edited(path, **changes):
    """Rewrite a JSON file; None takes a key out."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def weights(pipeline):
    parts = {
        name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)
    }
    return {
        f"{part}.{name}": w
        for part, module in parts.items()
        for name, w in module.state_dict().items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refused(call, message):
    """The error is one line."""
    with pytest.raises(ErasureError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


# ---- tokenizers ----

TOKENIZERS = [
    (family, f"tokenizer{n}")
    for family, ns in (
        ("sd1", [""]),
        ("sdxl", ["", "_2"]),
        ("sd3", ["", "_2", "_3"]),
        ("flux", ["", "_2"]),
    )
    for n in ns
]


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(("family", "part"), TOKENIZERS)
def test_a_tokenizer_folder_without_a_file_is_refused(copied, family, part, file):
    folder = copied(family)
    (folder / part / file).unlink()
    refused(
        lambda: load_model(folder),
        "lacks its vocabulary" if file == "tokenizer.json" else "has no tokenizer_config.json",
    )


def legacy(folder):
    """The tokenizer as the files of older programs."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n"
    )


def test_a_tokenizer_of_vocab_and_merges_is_the_same(copied):
    folder = copied()
    before = load_model(folder).encode(["a red heart"]).embeddings
    legacy(folder / "tokenizer")
    assert torch.equal(load_model(folder).encode(["a red heart"]).embeddings, before)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "merges.txt").unlink(),
            "lacks its vocabulary .*vocab.json with merges.txt",
        ),
        (lambda folder: (folder / "vocab.json").unlink(), "lacks its vocabulary"),
        (
            lambda folder: (folder / "merges.txt").write_text("#version: 0.2\n"),
            "its merges are not whole",
        ),
        (lambda folder: (folder / "vocab.json").write_text("{"), "cannot read the tokenizer"),
        (lambda folder: (folder / "vocab.json").write_text("{}"), "cannot read the tokenizer"),
        (
            lambda folder: edited(folder / "tokenizer_config.json", model_max_length=None),
            "model_max_length of tokenizer_config",
        ),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
            "holds a list, not named settings",
        ),
        (
            lambda folder: edited(
                folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.X", None]}
            ),
            "asks for code",
        ),
    ],
)
def test_a_tokenizer_that_is_not_whole_is_refused(copied, damage, message):
    folder = copied()
    legacy(folder / "tokenizer")
    damage(folder / "tokenizer")
    refused(lambda: load_model(folder), message)


def test_a_tokenizer_of_another_model_is_refused():
    pipeline = tiny_sd1()
    pipeline.text_encoder.config.vocab_size = 49408
    refused(lambda: wrap(pipeline, "x"), "x: its tokenizer knows 723 tokens of the 49408")
    pipeline.text_encoder.config.vocab_size = 700
    refused(lambda: wrap(pipeline, "x"), "tokens up to number 722, but its text encoder embeds 700")


def test_load_config_without_a_vocabulary_is_refused(copied, saved, tmp_path):
    folder, path = copied(), write_single_file(tiny_sd1(), tmp_path / "m.safetensors")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    refused(
        lambda: load_model(path, options=LoadConfig(config=str(folder))), "lacks its vocabulary"
    )


def test_erase_and_generate_say_that_the_vocabulary_is_missing(copied, tmp_path, capsys):
    folder = copied()
    (folder / "tokenizer" / "tokenizer.json").unlink()
    flags = ["--model", str(folder), "--out", str(tmp_path / "out")]
    assert (
        run(run_erase.main, [*flags, "--concept", "cat", "--anchor", "dog", "--retain", "a tree"])
        == 2
    )
    assert run(run_generate.main, flags) == 2
    assert (
        capsys.readouterr().err.count("lacks its vocabulary") == 2
        and not (tmp_path / "out").exists()
    )


# ---- what text encoders see of prompts ----


@pytest.mark.parametrize(
    ("target", "anchor"),
    [("red  heart", "red heart"), ("cafe\u0301", "caf\u00e9"), ("Heart", "heart\u2009")],
    ids=["blank", "nfd", "thin"],
)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_concept_whose_tokens_are_its_anchors_is_refused_before_sampling(family, target, anchor):
    model, concept = wrap(MAKERS[family]()), ConceptSpec.__new__(ConceptSpec)
    values = {
        "target": target,
        "anchor": anchor,
        "synonyms": (),
        "templates": ("a {}",),
        "retain": ("a tree",),
        "kind": None,
    }
    for name, value in values.items():  # however near a spec lets its names come
        object.__setattr__(concept, name, value)
    message = f"the prompt {'a ' + target!r} and its anchor {'a ' + anchor!r} are the same tokens"
    # which `erase_concept` asks before it samples
    refused(lambda: check_prompts(model, [concept]), re.escape(message))


@pytest.mark.parametrize("family", MAKERS)
def test_a_name_behind_the_last_token_is_refused(family):
    model, words = wrap(MAKERS[family]()), "so that " * 150
    concept = ConceptSpec("heart", "star", templates=("a {}", words + "{}"), retain=("a tree",))
    refused(lambda: check_prompts(model, [concept]), "'heart' is cut away from the prompt 'so that")
    check_prompts(
        model, [ConceptSpec("heart", "star", templates=("a {}, " + words,), retain=("a tree",))]
    )


def test_tokens_are_those_that_the_text_encoder_gets():
    pipeline = tiny_sd1()
    seen = []
    pipeline.text_encoder.register_forward_pre_hook(
        lambda module, args: seen.append(args[0][0].tolist())
    )
    model, prompt = wrap(pipeline), "a red heart, " * 20
    model.encode([prompt])
    found = model.tokens([prompt])["text_encoder"][0]
    assert found.cut and found.room == 30 and tuple(seen[0][1:-1]) == found.seen


def test_cut_prompts_are_in_the_delta_and_in_the_image_set(tmp_path):
    long = "a heart, " + "very " * 40 + "red"
    pipeline = tiny_sd1()
    concept = ConceptSpec(
        "heart", "star", templates=("a {}",), retain=("a tree", long.replace("heart", "moon"))
    )
    from erase.methods.salun import SalUnConfig
    from erase.training.config import MaskConfig, TrainConfig

    data = LatentConfig(n_forget=2, n_retain=2, steps=1)
    method = SalUnConfig(mask=MaskConfig(batch_size=2), train=TrainConfig(steps=1, batch_size=2))
    delta = erase_concept(concept, EraseConfig(latents=data), method, model=wrap(pipeline))
    told = json.loads(delta.metadata["cut_prompts"])
    assert (told["count"], told["of"], told["room"]) == (1, 4, {"text_encoder": 30})
    assert told["prompts"] == [long.replace("heart", "moon")]
    rows = [PromptRow(0, "a heart", 1, None, {}), PromptRow(1, long, 1, None, {})]
    config = GenerateConfig(steps=1, resolution=64)
    images = generate(pipeline, PromptSet("mine", rows), tmp_path / "images", config, {})
    assert images.settings["cut_prompts"] == {
        "count": 1,
        "of": 2,
        "room": {"text_encoder": 30},
        "cases": [1],
        "prompts": [long],
    }


def test_prompts_that_are_seen_whole_are_not_counted():
    assert cut_prompts(["a heart", "a moon"], wrap(tiny_sd1()).tokens) is None


# ---- prediction ----


def sd_file(metadata=None, extra=(), step=None):
    return TensorFile(
        Path("sd.safetensors"), dict.fromkeys(extra, (0,)), lambda key: None, metadata or {}, step
    )


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize(
    ("file", "stated", "message"),
    [
        (sd_file({"modelspec.prediction_type": "epsilon"}, ["v_pred"]), None,
         "metadata says epsilon, but its key v_pred says v_pred"),
        (sd_file({"modelspec.prediction_type": "sample"}), None,
         "metadata says prediction type 'sample'; supported are epsilon, v"),
        (sd_file({"modelspec.prediction_type": "v-pred"}), "epsilon", "prediction type 'v-pred'"),
        (sd_file(extra=["ztsnr"]), None, "has the key ztsnr"),
        (sd_file({"modelspec.prediction_type": "epsilon"}, ["ztsnr"]), None, "has the key ztsnr"),
        (sd_file(extra=["v_pred"]), "epsilon", "but its configuration epsilon"),
        (sd_file(), "v",
         "unknown prediction type of the configuration 'v'; choose one of: epsilon, v_p"),
    ],
)  # fmt: skip
def test_contradictions_and_unknown_words_of_prediction_are_refused(family, file, stated, message):
    refused(lambda: decide_prediction(file, family, stated, None), message)
    # the caller's word
    assert decide_prediction(file, family, stated, "v_prediction") == "v_prediction"


@pytest.mark.parametrize("word", ["v", "v_prediction"])
def test_metadata_and_key_that_agree_are_taken(word):
    assert (
        decide_prediction(
            sd_file({"modelspec.prediction_type": word}, ["v_pred", "ztsnr"]), "sdxl", None, None
        )
        == "v_prediction"
    )


def test_a_folder_with_an_unknown_word_for_its_prediction_is_refused(copied):
    folder = copied()
    edited(folder / "scheduler" / "scheduler_config.json", prediction_type="velocity")
    refused(
        lambda: load_model(folder),
        "prediction type 'velocity' is not supported|cannot build the PNDMScheduler",
    )


# ---- variants, missing parts, ways out ----


def test_weights_beyond_float16_are_not_called_damaged(copied):
    folder = copied()
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.bias"][0] = 1e5
    save_file(tensors, path)
    refused(
        lambda: load_model(folder, options=LoadConfig(dtype="float16")),
        "unet.conv_in.bias holds 1 values that are not finite in float16; use float32 or bfloat16",
    )
    assert load_model(folder).name == str(folder)


def renamed(folder, variant):
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(f".{variant}.safetensors"))


def test_a_misspelt_variant_is_refused_with_those_there(copied):
    folder = copied()
    refused(
        lambda: load_model(folder, options=LoadConfig(variant="fp16")),
        "no part .* has the variant 'fp16'.*there is none",
    )
    unet = folder / "unet"
    shutil.copy(
        unet / "diffusion_pytorch_model.safetensors",
        unet / "diffusion_pytorch_model.non_ema.safetensors",
    )
    for misspelt in ("nonema", "non_em", "non-ema"):
        options = LoadConfig(variant=misspelt)
        refused(lambda given=options: load_model(folder, options=given), "there are non_ema")
    load_model(folder, options=LoadConfig(variant="non_ema"))  # the others are read without


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_folder_with_only_a_variant_says_which(copied, variant):
    folder = copied()
    renamed(folder, variant)
    refused(
        lambda: load_model(folder), f"has weights only as {variant}; add --load.variant {variant}"
    )
    load_model(folder, options=LoadConfig(variant=variant))


def test_pickled_parts_are_not_opened_and_how_to_convert_them_is_said(copied):
    class Trap:
        def __reduce__(self):
            return os.mkdir, ("/nowhere/at/all",)

    folder = copied()
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"conv_in.weight": Trap()}, folder / "unet" / "diffusion_pytorch_model.bin")
    refused(
        lambda: load_model(folder),
        r"only as a pickle \(diffusion_pytorch_model.bin\).*save_pretrained",
    )


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named_and_the_network_is_not_asked(copied, part, no_network):
    folder = copied()
    shutil.rmtree(folder / part)
    refused(lambda: load_model(folder), f"sd1 has no folder {part}/")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read .*model_index.json"),
        ("[]", "holds a list, not named settings"),
        ("null", "not named settings"),
        ("{}", "names no pipeline class"),
        ('{"_class_name": ["my_pipeline", "Mine"]}', "names no pipeline class"),
        (
            '{"_class_name": "StableDiffusionPipeline"}',
            "lists no unet, which a StableDiffusionPipeline needs",
        ),
        ("[" * 100_000, "cannot read .*model_index.json"),
        (b"\xff\xfe", "cannot read .*model_index.json"),
    ],
)
def test_a_malformed_index_is_named(copied, content, message):
    folder = copied()
    (folder / "model_index.json").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    refused(lambda: load_model(folder), message)


@pytest.mark.parametrize(
    "entry",
    [
        [],
        ["diffusers"],
        ["diffusers", 3],
        [None, "UNet2DConditionModel"],
        {"a": 1},
        ["a", "b", "c"],
    ],
)
def test_an_index_entry_of_another_form_is_named(copied, entry):
    folder = copied()
    edited(folder / "model_index.json", unet=entry)
    refused(lambda: load_model(folder), r"unet is .*, not \[library, class\]")


@pytest.mark.parametrize("value", ["diffusers", 7, True])
def test_a_part_that_is_no_list_is_missing(copied, value):
    folder = copied()
    edited(folder / "model_index.json", vae=value)
    refused(lambda: load_model(folder), "lists no vae")


@pytest.mark.parametrize(
    "content",
    [
        {"model": ...},
        {"params": ..., "epoch": 3},
        {"module": {"state_dict": ...}},
        {"weights": ..., "optimizer": {"state": {0: torch.ones(1)}}},
    ],
)
def test_wrapped_weights_of_a_pickle_are_found(content, saved, tmp_path):
    path = write_single_file(tiny_sd1(), tmp_path / "m.safetensors")
    tensors = load_file(path)

    def filled(value):
        return (
            tensors
            if value is ...
            else {key: filled(one) for key, one in value.items()}
            if isinstance(value, dict)
            else value
        )

    torch.save(filled(content), tmp_path / "w.ckpt")
    assert same(
        weights(load_single_file(tmp_path / "w.ckpt", config=saved / "sd1")), weights(tiny_sd1())
    )


def test_several_sets_of_weights_in_a_pickle_are_not_chosen_from(tmp_path):
    torch.save({"model": {"a": torch.ones(1)}, "ema": {"a": torch.ones(1)}}, tmp_path / "w.ckpt")
    refused(
        lambda: load_single_file(tmp_path / "w.ckpt"),
        r"holds several sets of weights \(model, ema\)",
    )


def test_names_behind_a_wrapper_are_found(saved, tmp_path):
    tensors = load_file(write_single_file(tiny_sd1(), tmp_path / "m.safetensors"))
    save_file(
        {f"module.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "w.safetensors"
    )
    assert same(
        weights(load_single_file(tmp_path / "w.safetensors", config=saved / "sd1")),
        weights(tiny_sd1()),
    )


def test_harmless_extra_keys_are_left_out_when_asked(saved, tmp_path):
    tensors = load_file(write_single_file(tiny_sd1(), tmp_path / "m.safetensors"))
    path = tmp_path / "extra.safetensors"
    save_file(
        tensors | {"lora_te_x.lora_up.weight": torch.ones(2), "loss.logvar": torch.ones(1)}, path
    )
    given = {"config": str(saved / "sd1")}
    refused(lambda: load_model(path, options=LoadConfig(**given)), "is a LoRA")
    refused(
        lambda: load_model(path, options=LoadConfig(**given, ignore="lora_")),
        r"loss.logvar.*\(load.ignore",
    )
    assert same(
        weights(load_model(path, options=LoadConfig(**given, ignore=r"lora_|loss\.")).pipeline()),
        weights(tiny_sd1()),
    )
    refused(
        lambda: load_model(
            path, options=LoadConfig(**given, ignore=r"lora_|loss\.|model.diffusion_model.out\.")
        ),
        "lacks 4 of",
    )
    refused(
        lambda: load_model(path, options=LoadConfig(**given, ignore="nothing")),
        "no tensor whose name begins with 'nothing'",
    )
    refused(lambda: LoadConfig(ignore="("), "no regular expression")


def test_surplus_weights_of_a_folder_are_left_out_when_asked(copied):
    folder = copied()
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"stranger.x": torch.ones(1)}, file, {"format": "pt"})
    refused(lambda: load_model(folder), "holds in surplus stranger.x.*--load.ignore")
    assert same(
        weights(load_model(folder, options=LoadConfig(ignore="stranger")).pipeline()),
        weights(tiny_sd1()),
    )


def test_an_unreadable_file_is_named(copied, tmp_path, monkeypatch):
    folder, hidden = copied(), "diffusion_pytorch_model.safetensors"
    path = write_single_file(tiny_sd1(), tmp_path / "m.safetensors")
    allowed, opened = os.access, Path.open

    def refuse(self, *args, **kwargs):
        if self == path:
            raise PermissionError(13, "Permission denied")
        return opened(self, *args, **kwargs)

    # root may read all
    monkeypatch.setattr(
        "os.access", lambda file, mode: Path(file).name != hidden and allowed(file, mode)
    )
    monkeypatch.setattr(Path, "open", refuse)
    refused(lambda: load_model(folder), rf"cannot read \S+{hidden}: permission denied")
    refused(lambda: load_model(path), "cannot read .*m.safetensors: permission denied")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_a_path_that_no_disk_has_is_one_sentence(name):
    refused(lambda: load_model(name, options=LoadConfig(offline=True)), "cannot look at|no hub id")


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        ("file", "variant", "fp16"),
        ("file", "revision", "main"),
        ("folder", "revision", "main"),
        ("folder", "config", "x"),
        ("folder", "ema", True),
    ],
)
def test_an_option_that_does_not_apply_is_refused(kind, option, value, saved, tmp_path):
    place = (
        saved / "sd1"
        if kind == "folder"
        else write_single_file(tiny_sd1(), tmp_path / "m.safetensors")
    )
    refused(
        lambda: load_model(place, options=LoadConfig(**{option: value})), f"load.{option} is for a "
    )


def test_options_of_another_type_are_refused():
    for options in ({"variant": 5}, {"ema": "yes"}, {"dtype": None}):
        refused(lambda: LoadConfig(**options), "must be")  # noqa: B023


# ---- a VAE from elsewhere ----


def test_a_file_without_a_vae_takes_one_from_elsewhere(saved, tmp_path):
    tensors = load_file(write_single_file(tiny_sd1(), tmp_path / "m.safetensors"))
    bare = {key: tensor for key, tensor in tensors.items() if not key.startswith(ldm.VAE)}
    path, vae = tmp_path / "bare.safetensors", tmp_path / "vae.pt"
    save_file(bare, path)
    torch.save(
        {
            "state_dict": {
                key.removeprefix(ldm.VAE): t
                for key, t in tensors.items()
                if key.startswith(ldm.VAE)
            }
        },
        vae,
    )
    refused(
        lambda: load_model(path, options=LoadConfig(config=str(saved / "sd1"))),
        "has no VAE; give one.*--load.vae",
    )
    for source in (saved / "sd1" / "vae", saved / "sd1", vae, tmp_path / "m.safetensors"):
        found = load_model(
            path, options=LoadConfig(config=str(saved / "sd1"), vae=str(source))
        ).pipeline()
        assert same(weights(found), weights(tiny_sd1())) and not found.vae.training


def test_a_vae_takes_the_place_of_the_folders_own(copied, tmp_path):
    folder, other = copied(), tiny_sd1(seed=1)
    other.vae.save_pretrained(tmp_path / "other")
    for _ in range(2):
        found = load_model(folder, options=LoadConfig(vae=str(tmp_path / "other"))).pipeline()
        assert same(found.vae.state_dict(), other.vae.state_dict()) and same(
            found.unet.state_dict(), tiny_sd1().unet.state_dict()
        )
        shutil.rmtree(folder / "vae", ignore_errors=True)  # nor is it missed
    (tmp_path / "x.safetensors").write_bytes(b"")
    for source, message in (
        ("absent", "no file or folder absent"),
        (str(tmp_path), "has no config.json"),
        (str(tmp_path / "x.safetensors"), "load.vae|is empty"),
    ):
        refused(lambda: load_model(folder, options=LoadConfig(vae=source)), message)  # noqa: B023


# ---- quantised weights ----


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("scaled_fp8", torch.zeros(2), "in scaled float8"),
        (CONV_IN.replace("weight", "scale_weight"), torch.ones(1), "in scaled float8"),
        (CONV_IN.replace("weight", "weight_scale"), torch.ones(1), "in scaled float8"),
        (
            f"{ldm.UNET}out.0.weight",
            torch.ones(16).to(torch.float8_e4m3fn),
            "holds torch.float8_e4m3fn",
        ),
        (CONV_IN + ".absmax", torch.ones(1), "a quantised checkpoint"),
    ],
)
def test_float8_and_quantised_files_are_refused_by_name(key, tensor, message, saved, tmp_path):
    tensors = load_file(write_single_file(tiny_sd1(), tmp_path / "m.safetensors"))
    save_file(tensors | {key: tensor}, tmp_path / "q.safetensors")
    refused(lambda: load_single_file(tmp_path / "q.safetensors", config=saved / "sd1"), message)


def test_float8_parts_of_a_folder_are_refused_by_name(copied):
    folder = copied()
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(
        tensors | {"conv_in.weight": tensors["conv_in.weight"].to(torch.float8_e5m2)},
        file,
        {"format": "pt"},
    )
    refused(lambda: load_model(folder), r"holds quantised weights \(conv_in.weight is F8_E5M2\)")


# ---- UNets that want more than text ----


@pytest.mark.parametrize("make", [tiny_sd1, tiny_sdxl])
def test_an_lcm_is_refused_by_name(make):
    pipeline = make()
    pipeline.unet.register_to_config(time_cond_proj_dim=256)
    refused(
        lambda: wrap(pipeline, "x"), r"distilled by guidance \(an LCM: time_cond_proj_dim 256\)"
    )


@pytest.mark.parametrize(
    "option",
    [
        {"class_embed_type": "timestep"},
        {"encoder_hid_dim_type": "text_proj"},
        {"addition_embed_type": "text"},
    ],
)
def test_other_conditions_are_refused_by_name(option):
    pipeline = tiny_sd1()
    pipeline.unet.register_to_config(**option)
    refused(lambda: wrap(pipeline, "x"), "wants more than text|has the added embedding")


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3"])
def test_a_sample_size_that_is_a_pair_is_understood(family):
    plain, pipeline = wrap(MAKERS[family]()), MAKERS[family]()
    net = pipeline.transformer if family == "sd3" else pipeline.unet
    net.register_to_config(sample_size=[8, 8])
    model = wrap(pipeline)
    assert (model.latent_shape, model.image_size) == (plain.latent_shape, plain.image_size)
    assert torch.equal(model.sample(["a moon"], [1], 1, 2.0), plain.sample(["a moon"], [1], 1, 2.0))
    for size in ([8, 16], None, "8", [], 0, 8.0):
        net.register_to_config(sample_size=size)
        refused(lambda: wrap(pipeline), "sample_size")


# ---- schedules ----


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EDMEulerScheduler(), r"EDMEulerScheduler\) has another noise schedule"),
        (FlowMatchEulerDiscreteScheduler(), "is one of flow matching"),
        (DDPMScheduler(beta_schedule="sigmoid"), "beta_schedule 'sigmoid'"),
        (
            PNDMScheduler.from_config(DDIMScheduler(rescale_betas_zero_snr=True).config),
            "does not know rescale_betas_zero_snr",
        ),
        (DDIMScheduler(prediction_type="sample"), "'sample' is not supported"),
    ],
)
@pytest.mark.parametrize("make", [tiny_sd1, tiny_sdxl])
def test_schedules_that_are_not_stable_diffusions_are_refused_by_name(make, scheduler, message):
    pipeline = make()
    pipeline.scheduler = scheduler
    refused(lambda: wrap(pipeline, "x"), message)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(), "a FlowMatchEulerDiscreteScheduler is needed"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "depends on the image's size"),
        (FlowMatchEulerDiscreteScheduler(shift_terminal=0.1), "shift_terminal"),
    ],
)
def test_schedules_that_are_not_stable_diffusion_3s_are_refused_by_name(scheduler, message):
    pipeline = tiny_sd3()
    pipeline.scheduler = scheduler
    refused(lambda: wrap(pipeline, "x"), message)


PROMPT = PromptSet("one", [PromptRow(0, "a moon", 1, None, {})])


@pytest.mark.parametrize("own", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler", "lms", "pndm"])
def test_a_zero_terminal_snr_model_is_sampled_on_its_own_schedule_or_not_at_all(
    own, name, tmp_path
):
    pipeline = tiny_sd1()
    pipeline.scheduler = own(
        beta_schedule="scaled_linear", rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    job = (pipeline, PROMPT, tmp_path / "images", GenerateConfig(scheduler=name, steps=2), {})
    if name in ("lms", "pndm"):
        refused(
            lambda: generate(*job),
            f"scheduler {name} would sample on another noise schedule.*pure noise",
        )
        assert not (tmp_path / "images").exists()
    else:
        generate(*job)


def test_a_ztsnr_file_with_a_scheduler_that_cannot_gets_one_that_can(saved, tmp_path):
    tensors = load_file(write_single_file(tiny_sd1(), tmp_path / "m.safetensors"))
    save_file(
        tensors | {"v_pred": torch.ones(1), "ztsnr": torch.ones(1)}, tmp_path / "z.safetensors"
    )
    # whose scheduler is PNDM
    options = LoadConfig(config=str(saved / "sd1"), prediction="v_prediction")
    scheduler = load_model(tmp_path / "z.safetensors", options=options).pipeline().scheduler
    assert type(scheduler).__name__ == "DDIMScheduler" and scheduler.alphas_cumprod[-1] == 0


def test_a_scheduler_configuration_that_cannot_be_built_is_named(copied):
    folder = copied()
    for change in (
        {"num_train_timesteps": "many"},
        {"beta_schedule": "sigmoid"},
        {"beta_start": "x"},
    ):
        original = (folder / "scheduler" / "scheduler_config.json").read_text()
        edited(folder / "scheduler" / "scheduler_config.json", **change)
        refused(lambda: load_model(folder), "cannot build the PNDMScheduler")
        (folder / "scheduler" / "scheduler_config.json").write_text(original)


# ---- gradient checkpointing ----


def test_gradient_checkpointing_leaves_dropout_off(make_pico_pipeline):
    torch.manual_seed(0)
    config = dict(make_pico_pipeline().unet.config) | {"dropout": 0.5}
    unet = UNet2DConditionModel.from_config(config).eval()
    given = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 32, 32)

    def gradients(on):
        unet.zero_grad()
        with checkpointed(unet, on):
            assert unet.is_gradient_checkpointing == on
            found = unet(given[0], given[1], encoder_hidden_states=given[2]).sample
            found.square().mean().backward()
        assert not any(layer.training for layer in unet.modules())
        return [found.detach(), *(p.grad.clone() for p in unet.parameters())]

    assert all(map(torch.equal, gradients(True), gradients(False)))


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_3"])
def test_gradient_checkpointing_leaves_a_text_encoders_dropout_off(part):
    encoder = getattr(tiny_sd3(), part).requires_grad_(True)
    if part == "text_encoder":
        for layer in encoder.modules():
            layer.dropout = (
                0.5
                if isinstance(getattr(layer, "dropout", None), float)
                else getattr(layer, "dropout", None)
            )
    ids = torch.tensor([[3, 4, 5, 6]])

    def gradients(on):
        encoder.zero_grad()
        with checkpointed(encoder, on):
            found = encoder(ids)[0]
            found.square().mean().backward()
        assert not encoder.get_input_embeddings()._forward_hooks
        return [
            found.detach(),
            *(p.grad.clone() for p in encoder.parameters() if p.grad is not None),
        ]

    assert all(map(torch.equal, gradients(True), gradients(False)))


# ---- code in a checkpoint ----


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "model_index.json",
            {"unet": ["mine", "Trap"]},
            "its unet is a mine.Trap, not a UNet2DConditionModel",
        ),
        ("model_index.json", {"scheduler": ["mine", "Trap"]}, "its scheduler is a mine.Trap"),
        (
            "model_index.json",
            {"scheduler": ["diffusers", "DiffusionPipeline"]},
            "its scheduler is a diffusers.DiffusionPipeline",
        ),
        (
            "model_index.json",
            {"tokenizer": ["transformers", "AutoTokenizer"]},
            "its tokenizer is a transformers.AutoTokenizer",
        ),
        (
            "model_index.json",
            {"text_encoder": ["transformers", "AutoModel"]},
            "its text_encoder is a transformers.AutoModel",
        ),
        ("model_index.json", {"vae": ["os", "system"]}, "its vae is a os.system"),
        ("model_index.json", {"helper": ["mine", "Trap"]}, r"lists helper \(mine.Trap\)"),
        ("model_index.json", {"custom_pipelines": {"a": "b"}}, "asks for code"),
        ("unet/config.json", {"auto_map": {"AutoModel": "mine.Trap"}}, "asks for code of its own"),
        (
            "text_encoder/config.json",
            {"auto_map": {"AutoModel": "mine.Trap"}},
            "asks for code of its own",
        ),
        ("text_encoder/config.json", {"trust_remote_code": True}, "asks for code of its own"),
        (
            "text_encoder/config.json",
            {"_attn_implementation": "someone/kernel"},
            "asks for compiled code",
        ),
        (
            "text_encoder/config.json",
            {"_attn_implementation": "flash_attention_2"},
            "compiled code .*flash_attention_2.* set it to sdpa",
        ),
        (
            "text_encoder/config.json",
            {"attn_implementation": {"": "sdpa", "text_config": "flash_attention_3"}},
            "compiled code",
        ),
        (
            "text_encoder/config.json",
            {"text_config": {"_attn_implementation_internal": "someone/kernel"}},
            "compiled code",
        ),
        (
            "text_encoder/config.json",
            {"layers": [{"_experts_implementation": "sonicmoe"}]},
            "compiled code",
        ),
        (
            "text_encoder/config.json",
            {"quantization_config": {"quant_method": "gptq"}},
            "quantised",
        ),
        ("vae/config.json", {"auto_map": {"AutoModel": "mine.Trap"}}, "asks for code of its own"),
        (
            "scheduler/scheduler_config.json",
            {"auto_map": {"Scheduler": "mine.Trap"}},
            "asks for code of its own",
        ),
    ],
)
def test_code_in_a_folder_is_not_run(copied, tmp_path, file, changes, message, no_network):
    folder, trace = copied(), tmp_path / "trace"
    for where in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        (where / "mine.py").write_text(f"import os\nos.mkdir({str(trace)!r})\nclass Trap: pass\n")
    edited(folder / file, **changes)
    refused(lambda: load_model(folder), message)
    assert not trace.exists()


def test_attention_of_torchs_own_may_be_asked_for(copied):
    folder = copied()
    edited(folder / "text_encoder" / "config.json", _attn_implementation="eager")
    assert load_model(folder).name == str(folder)


def test_a_safety_checker_of_a_class_of_its_own_is_left_out_unread(copied, tmp_path):
    folder, trace = copied(), tmp_path / "trace"
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "mine.py").write_text(
        f"import os\nos.mkdir({str(trace)!r})\nclass Trap: pass\n"
    )
    edited(
        folder / "model_index.json",
        safety_checker=["mine", "Trap"],
        feature_extractor=["transformers", "CLIPFeatureExtractor"],
    )
    assert load_model(folder).pipeline().safety_checker is None and not trace.exists()


@pytest.mark.parametrize("name", ["Trap", ["mine", "Trap"], "DiffusionPipeline", None])
def test_load_config_names_no_class_but_a_scheduler(copied, tmp_path, name):
    folder, path = copied(), write_single_file(tiny_sd1(), tmp_path / "m.safetensors")
    edited(folder / "scheduler" / "scheduler_config.json", _class_name=name)
    refused(
        lambda: load_model(path, options=LoadConfig(config=str(folder))),
        "has no scheduler that diffusers knows",
    )


# ---- the base of a delta ----


def delta_of(base, **load):
    config = json.dumps({"erase": {"load": load}})
    return ErasedDelta(
        {}, {}, {"base_id": str(base), "base_fingerprint": "0", "config": config}, "d.safetensors"
    )


@pytest.fixture
def cacheless(monkeypatch, tmp_path):
    """An empty cache, and a record of what would be fetched."""
    asked = []

    def download(name, **given):
        asked.append((name, given["local_files_only"]))
        raise OSError("nothing there")

    monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
    return asked


@pytest.mark.parametrize(
    "name", ["someone/model", "in memory", "https://example.org/x", "/no/such/folder"]
)
def test_a_delta_fetches_nothing_by_itself(name, cacheless):
    refused(
        lambda: load_base(delta_of(name)),
        f"d.safetensors names {name!r} as its base, which is not on this machine.*--model",
    )
    assert all(local for _, local in cacheless)


def test_a_single_file_that_is_not_there_is_told_as_the_deltas_base(tmp_path):
    refused(
        lambda: load_base(delta_of("full.safetensors")),
        "d.safetensors names 'full.safetensors' as its base, and there is no file .*--model",
    )
    path = str(tmp_path / "full.safetensors")
    refused(lambda: load_base(delta_of("x/y"), path), f"^there is no file {path}; check the path$")


def test_a_hub_id_that_the_user_gives_is_fetched(cacheless):
    refused(
        lambda: load_base(delta_of("someone/model"), "someone/model"),
        "cannot be fetched from the hub",
    )
    assert cacheless == [("someone/model", False)]


def test_a_hub_id_in_the_cache_is_loaded_from_there(saved, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "diffusers.DiffusionPipeline.download",
        lambda name, **given: asked.append(given) or saved / "sd1",
    )
    assert load_base(delta_of("someone/model")).name == "someone/model" and all(
        given["local_files_only"] for given in asked
    )


def test_stored_options_that_do_not_apply_are_dropped(saved, tmp_path):
    path = write_single_file(tiny_sd1(), tmp_path / "m.safetensors")
    stored = delta_of("x/y", variant="fp16", revision="main", offline=True)
    assert load_base(stored, str(path), options=LoadConfig(config=str(saved / "sd1"))).name == str(
        path
    )
    stored = delta_of(path, config=str(saved / "sd1"), prediction="v_prediction", ema=True)
    assert load_base(stored, str(saved / "sd1")).name == str(saved / "sd1")
    refused(
        lambda: load_base(stored, str(saved / "sd1"), options=LoadConfig(ema=True)),
        "load.ema is for a single file",
    )


def test_stored_options_for_what_an_export_lacks_are_dropped(saved, tmp_path, caplog):
    stored = delta_of("x/y", variant="fp16", vae=str(tmp_path / "moved"))
    assert load_base(stored, str(saved / "sd1")).name == str(saved / "sd1")
    assert f"the VAE {tmp_path / 'moved'}, which is not there" in caplog.text
    given = LoadConfig(variant="fp16")
    refused(lambda: load_base(stored, str(saved / "sd1"), options=given), "the variant 'fp16'")

    path = write_single_file(tiny_sd1(), tmp_path / "m.safetensors")
    stored = delta_of("x/y", ema=True, ignore="embedding_manager", config=str(saved / "sd1"))
    assert load_base(stored, str(path)).name == str(path)
    moved = delta_of("x/y", config=str(tmp_path / "moved"))
    refused(lambda: load_base(moved, str(path)), "configurations of .*moved.* --load.config")
    given = LoadConfig(ignore="embedding_manager")
    refused(lambda: load_base(stored, str(path), options=given), "leave it out")


def test_stored_options_for_what_is_there_are_kept(saved, tmp_path):
    folder, path = tmp_path / "half", tmp_path / "m.safetensors"
    shutil.copytree(saved / "sd1", folder)
    renamed(folder, "fp16")
    options = LoadConfig(variant="fp16", vae=str(saved / "sd1"))
    assert without_absent(folder, options) == options

    tensors = {"model_ema.diffusion_modelx": torch.zeros(1), "embedding_manager": torch.zeros(1)}
    save_file(tensors, path)
    options = LoadConfig(ema=True, ignore="embedding")
    assert without_absent(path, options) == options


def test_another_repository_has_no_revision_of_the_base(cacheless, monkeypatch):
    monkeypatch.setattr("erase.delta.base.load_model", lambda name, device, options: options)
    stored = delta_of("x/y", revision="refs/pr/1", offline=True)
    assert load_base(stored, "x/y") == LoadConfig(revision="refs/pr/1")
    assert load_base(stored, "someone/copy") == LoadConfig()


def test_options_of_a_newer_version_are_said_and_left_out(saved, caplog):
    with caplog.at_level(logging.WARNING, "erase"):
        load_base(delta_of(saved / "sd1", colour="blue"))
    assert "load.colour, which this version does not know" in caplog.text


@pytest.mark.parametrize(
    "config",
    [
        '{"parts": []}',
        '{"erase": []}',
        '{"erase": {"load": [1]}}',
        "[]",
        '{"parts": 3}',
        '{"erase": {"load": {"ema": 3}}}',
    ],
)
def test_a_delta_that_does_not_say_how_its_base_was_read_is_named(config):
    delta = ErasedDelta({}, {}, {"base_id": "canvas", "config": config}, "d.safetensors")
    refused(lambda: load_base(delta), "d.safetensors")


def test_export_reads_the_base_as_it_is_told(saved, tmp_path, make_pico_pipeline, capsys):
    folder = tmp_path / "half"
    shutil.copytree(saved / "sd1", folder)
    model = load_model(folder)
    renamed(folder, "fp16")
    name, weight = next(iter(model.parameters("unet").items()))
    metadata = {
        "base_id": str(folder),
        "base_fingerprint": model.fingerprint,
        "method": "salun",
        "concepts": "[]",
        "config": "{}",
    }
    metadata |= {
        "created_with": "a test",
        "concepts": json.dumps([ConceptSpec("heart", "star").to_dict()]),
    }
    ErasedDelta.between({name: weight}, {name: weight + 1}, metadata).save(
        tmp_path / "d.safetensors"
    )
    flags = [
        "--delta",
        str(tmp_path / "d.safetensors"),
        "--format",
        "components",
        "--out",
        str(tmp_path / "out"),
    ]
    assert run(run_export.main, flags) == 2 and "--load.variant fp16" in capsys.readouterr().err
    assert run(run_export.main, [*flags, "--load.variant", "fp16"]) == 0


def test_the_shipped_model_loads_as_before():
    assert load_model("canvas").fingerprint == load_model(CANVAS).fingerprint
