"""Where a CLIP comes from: its weights get the activation that they were trained with, and no file
of it runs as code."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from erase.eval.canvas.judges import clip_folder
from erase.eval.case import Case
from erase.eval.evaluators import clip, clip_model
from erase.eval.evaluators.clip_activation import decide_quick_gelu
from erase.eval.evaluators.clip_sources import CONFIG, find_source
from erase.eval.generate import planned
from erase.eval.run import EvaluateConfig
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import PromptRow, PromptSet

TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def weights(tmp_path: Path, monkeypatch) -> Path:
    """Random weights of a small CLIP, which open_clip knows as ViT-B-32 and ViT-B-32-quickgelu
    while the test runs."""
    for name, quick in (("ViT-B-32", {}), ("ViT-B-32-quickgelu", {"quick_gelu": True})):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, TINY | quick)
    torch.manual_seed(0)
    path = tmp_path / "weights.safetensors"
    state = open_clip.create_model("ViT-B-32").state_dict()
    # so that the activations differ visibly
    save_file({name: 4 * tensor for name, tensor in state.items()}, path)
    return path


def reference(weights: Path, quick: bool) -> torch.Tensor:
    """What open_clip's own model of the right name makes of the images."""
    name = "ViT-B-32-quickgelu" if quick else "ViT-B-32"
    with torch.no_grad():
        return open_clip.create_model(name, str(weights)).eval().encode_image(IMAGES)


def seen(**config) -> torch.Tensor:
    clip_model._load.cache_clear()
    with torch.no_grad():
        return clip.load_clip(clip.Config(device="cpu", **config)).model.encode_image(IMAGES)


def settled(config: EvaluateConfig, prompts: PromptSet) -> clip.Config:
    """CLIP's settings for these prompts, which name a dog."""
    case = Case(planned(prompts, Path("erased"), config.generate), [ConceptSpec("dog", "cat")])
    return config.chosen(case)["clip"][1]


# ---- the activation ------------------------------------------------------------------------------


def test_the_default_outside_canvas_is_built_with_quick_gelu(weights: Path, monkeypatch):
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(weights))
    rows = (PromptRow(0, "a dog", 0),)
    chosen = settled(EvaluateConfig(), PromptSet("mine", rows))
    assert (chosen.model, chosen.pretrained) == ("ViT-B-32", "openai")
    assert not torch.equal(reference(weights, True), reference(weights, False))
    assert torch.equal(
        seen(model=chosen.model, pretrained=chosen.pretrained), reference(weights, True)
    )
    assert torch.equal(
        seen(model="ViT-B-32", pretrained="laion2b_s34b_b79k"), reference(weights, False)
    )


def test_every_name_and_tag_of_open_clip_gets_the_activation_that_the_tag_wants():
    doubtful = []
    for name, tag in open_clip.list_pretrained():
        if name not in open_clip.list_models():
            continue
        wanted = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"))
        try:
            assert decide_quick_gelu(find_source(name, tag), None) == wanted, (name, tag)
        except ErasureError:
            doubtful.append((name, tag))
            assert decide_quick_gelu(find_source(name, tag), True)
    # open_clip's config says one thing, its tag another
    assert doubtful == [("roberta-ViT-B-32", "laion2b_s12b_b32k")]


@pytest.mark.parametrize(
    ("model", "file", "stated", "quick"),
    [
        ("ViT-B-32-quickgelu", "mine.safetensors", None, True),
        ("ViT-B-32", "mine.safetensors", True, True),
        ("ViT-B-32", "mine.safetensors", False, False),
        ("ViT-B-32", "b32_400m.pt", None, True),  # MetaCLIP's, as it is published
        ("ViT-B-32", "vit_b_32-quickgelu-laion400m_e31-d867053b.pt", None, True),
        ("ViT-B-32", "vit_b_32-laion2b_e16-af8dbd0c.pth", None, False),
        (
            "ViT-B-32",
            "models--laion--CLIP-ViT-B-32-laion2B-s34B-b79K/snapshots/0/a.safetensors",
            None,
            False,
        ),
        ("ViT-B-32", "vit_base_patch32_clip_224.openai/open_clip_model.safetensors", None, True),
    ],
)
def test_weights_in_a_file_get_their_activation(
    model, file, stated, quick, weights: Path, tmp_path: Path
):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        shutil.copy(weights, path)
    else:
        torch.save(open_clip.create_model("ViT-B-32", str(weights)).state_dict(), path)
    assert torch.equal(
        seen(model=model, pretrained=str(path), quick_gelu=stated), reference(weights, quick)
    )


@pytest.mark.parametrize(
    ("model", "file", "stated", "says"),
    [
        (
            "ViT-B-32",
            "mine.pt",
            None,
            "nothing tells whether .*mine.pt was trained with QuickGELU.*set clip.quick_gelu",
        ),
        (
            "ViT-B-32-quickgelu",
            "vit_b_32-laion2b_e16-af8dbd0c.pth",
            None,
            "is in doubt: the name .* says QuickGELU, .* GELU",
        ),
        (
            "ViT-B-32-quickgelu",
            "mine.pt",
            False,
            "the name ViT-B-32-quickgelu says QuickGELU; leave clip.quick_gelu out",
        ),
    ],
)
def test_weights_of_which_nothing_tells_the_activation_are_refused(
    model, file, stated, says, tmp_path: Path
):
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(ErasureError, match=says):
        seen(model=model, pretrained=str(tmp_path / file), quick_gelu=stated)


def test_a_tag_is_not_overruled():
    with pytest.raises(
        ErasureError, match="the tag 'openai' says QuickGELU; leave clip.quick_gelu out"
    ):
        seen(model="ViT-B-32", pretrained="openai", quick_gelu=False)


def folder_of(weights: Path, folder: Path, **model) -> Path:
    folder.mkdir(parents=True)
    shutil.copy(weights, folder / "open_clip_model.safetensors")
    (folder / CONFIG).write_text(json.dumps({"model_cfg": TINY | model, "preprocess_cfg": {}}))
    return folder


def test_a_folder_gets_the_activation_that_its_config_or_its_name_wants(
    weights: Path, tmp_path: Path
):
    said = folder_of(weights, tmp_path / "said", quick_gelu=True)
    silent = folder_of(weights, tmp_path / "silent")
    known = folder_of(weights, tmp_path / "DFN2B-CLIP-ViT-B-16")  # open_clip lists it as QuickGELU
    assert torch.equal(seen(model=str(said)), reference(weights, True))
    assert torch.equal(seen(model=f"local-dir:{said}"), reference(weights, True))
    assert torch.equal(seen(model=str(silent)), reference(weights, False))
    assert torch.equal(seen(model=str(silent), quick_gelu=True), reference(weights, True))
    assert torch.equal(seen(model=str(known)), reference(weights, True))
    with pytest.raises(ErasureError, match="quick_gelu is 'false'; it must be true or false"):
        seen(model=str(folder_of(weights, tmp_path / "word", quick_gelu="false")))


# ---- what was given and what was not -------------------------------------------------------------


def test_an_explicit_canvas_is_not_replaced_for_other_prompts():
    prompts = PromptSet("mine", (PromptRow(0, "a dog", 0),))
    given = settled(
        EvaluateConfig(settings={"clip": clip.Config(model="canvas", zero_shot=True)}), prompts
    )
    assert (given.model, given.pretrained, given.zero_shot) == ("canvas", None, True)
    weights = settled(
        EvaluateConfig(settings={"clip": clip.Config(pretrained="laion2b_s34b_b79k")}), prompts
    )
    assert (weights.model, weights.pretrained) == ("ViT-B-32", "laion2b_s34b_b79k")


def test_weights_that_would_be_ignored_are_refused():
    with pytest.raises(ErasureError, match="canvas brings its own weights"):
        seen(pretrained="openai")
    with pytest.raises(ErasureError, match="'openai' would be ignored; leave clip.pretrained out"):
        seen(model=str(clip_folder()), pretrained="openai")
    with pytest.raises(ErasureError, match="evaluators is an empty list"):
        EvaluateConfig(evaluators=[])


# ---- no code out of a judge ----------------------------------------------------------------------


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def changed(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    change(content)
    path.write_text(json.dumps(content))


def model_of(config: dict) -> dict:
    return config["model_cfg"]


AUTO = {
    "AutoTokenizer": ["evil.Evil", "evil.Evil"],
    "AutoConfig": "evil.Evil",
    "AutoModel": "evil.Evil",
}
TRUST = {"tokenizer_kwargs": {"trust_remote_code": True}}
WAYS: dict[str, Callable[[Path], None]] = {
    "trusted tokenizer": lambda folder: (
        changed(folder / CONFIG, lambda c: model_of(c)["text_cfg"].update(TRUST)),
        changed(folder / "tokenizer_config.json", lambda c: c.update(auto_map=AUTO)),
    ),
    "tokenizer that asks": lambda folder: changed(
        folder / "tokenizer_config.json", lambda c: c.update(auto_map=AUTO)
    ),
    "config beside it": lambda folder: (
        changed(folder / "tokenizer_config.json", lambda c: c.pop("tokenizer_class", None)),
        changed(folder / "config.json", lambda c: c.update(model_type="evil", auto_map=AUTO)),
    ),
    "text tower in a folder": lambda folder: (
        changed(folder / "config.json", lambda c: c.update(model_type="evil", auto_map=AUTO)),
        changed(
            folder / CONFIG, lambda c: model_of(c)["text_cfg"].update(hf_model_name=str(folder))
        ),
    ),
    "text tower elsewhere": lambda folder: (
        shutil.copytree(folder, folder.parent / "other"),
        changed(
            folder.parent / "other" / "config.json",
            lambda c: c.update(model_type="evil", auto_map=AUTO),
        ),
        changed(
            folder / CONFIG,
            lambda c: model_of(c)["text_cfg"].update(hf_model_name=str(folder.parent / "other")),
        ),
    ),
    "image tower of a hub": lambda folder: changed(
        folder / CONFIG,
        lambda c: model_of(c)["vision_cfg"].update(timm_model_name="hf-hub:evil/model"),
    ),
    "image tower in a folder": lambda folder: changed(
        folder / CONFIG,
        lambda c: model_of(c)["vision_cfg"].update(timm_model_name=f"local-dir:{folder}"),
    ),
    "unknown key": lambda folder: changed(
        folder / CONFIG, lambda c: model_of(c).update(code_revision="main")
    ),
    "group for a value": lambda folder: changed(
        folder / CONFIG,
        lambda c: model_of(c)["text_cfg"].update(hf_proj_type={"trust_remote_code": True}),
    ),
    "pickle": lambda folder: (
        (folder / "open_clip_model.safetensors").unlink(),
        (folder / "open_clip_pytorch_model.bin").write_bytes(
            pickle.dumps(Bomb(folder.parent / "ran"))
        ),
    ),
    "pickle in a zip": lambda folder: (
        (folder / "open_clip_model.safetensors").unlink(),
        torch.save(Bomb(folder.parent / "ran"), folder / "open_clip_pytorch_model.bin"),
    ),
}


@pytest.fixture
def evil(tmp_path: Path, monkeypatch) -> Path:
    """The canvas CLIP's folder with a module that leaves a mark when it runs, before a user who
    says yes to every question."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = Path(shutil.copytree(clip_folder(), tmp_path / "evil"))
    ran = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    (folder / "evil.py").write_text(
        f"{ran}from transformers import PreTrainedTokenizerFast\nclass "
        "Evil(PreTrainedTokenizerFast): pass\n"
    )
    return folder


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_clip_folder_does_not_run_its_own_python(way, prefix: str, evil: Path):
    way(evil)
    with pytest.raises(ErasureError):
        clip.load_clip(clip.Config(model=f"{prefix}{evil}", device="cpu"))
    assert not (evil.parent / "ran").exists()


@pytest.mark.parametrize("way", ["trusted tokenizer", "tokenizer elsewhere"])
def test_a_clip_of_the_hub_does_not_run_its_own_python(way: str, evil: Path, monkeypatch):
    """Its files are fetched one by one, so what stands beside the config is seen only when
    transformers reads it."""
    if way == "trusted tokenizer":
        WAYS[way](evil)
    else:
        other = Path(shutil.copytree(evil, evil.parent / "other"))
        changed(
            other / "tokenizer_config.json",
            lambda c: c.update(auto_map=AUTO, tokenizer_class="Evil"),
        )
        changed(
            evil / CONFIG, lambda c: model_of(c)["text_cfg"].update(hf_tokenizer_name=str(other))
        )

    def fetched(repo_id: str, filename: str, **_) -> str:
        return str(evil / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", fetched)
    # transformers 5.0 leaves the code out and goes on
    refusal = pytest.raises(ErasureError) if way == "trusted tokenizer" else suppress(ErasureError)
    with refusal:
        clip.load_clip(clip.Config(model="hf-hub:evil/clip", device="cpu"))
    assert not (evil.parent / "ran").exists()


def test_a_clip_of_the_hub_is_told_before_its_client_tries(monkeypatch, caplog):
    def unreached(*_: object, **__: object) -> str:
        assert "HF_HUB_OFFLINE=1" in caplog.text
        raise FileNotFoundError("Last error") from LocalEntryNotFoundError("no network")

    def logged(*_: object, **__: object) -> str:
        logging.error("open_clip's own word")
        return unreached()

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreached)
    monkeypatch.setattr("open_clip.create_model_from_pretrained", logged)
    for source, said in (
        ({"model": "hf-hub:a/b"}, "Last error.*check the name and the network"),
        ({"model": "ViT-B-32", "pretrained": "laion2b_e16"}, "not on this machine, and the hub"),
    ):
        caplog.clear()
        with caplog.at_level("INFO", "erase"), pytest.raises(ErasureError, match=said):
            clip.load_clip(clip.Config(**source, device="cpu"))
        assert len(caplog.records) == 1


def test_weights_that_are_a_program_are_refused(weights: Path, tmp_path: Path):
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / "ViT-B-32.pt"))
    config = clip.Config(model="ViT-B-32-quickgelu", device="cpu")
    for name, says in (
        ("pickle.pt", "open_clip cannot load"),
        ("ViT-B-32.pt", "is a TorchScript archive.*use the tag"),
    ):
        with pytest.raises(ErasureError, match=says) as error:
            clip.load_clip(replace(config, pretrained=str(tmp_path / name)))
        assert len(str(error.value)) < 700 and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
