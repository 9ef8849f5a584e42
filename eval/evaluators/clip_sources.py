"""Where a CLIP comes from, looked at before open_clip builds it: nothing in it names code, and its
activation is the weights' own.

A config of open_clip reaches the loaders of transformers and timm, which fetch other repositories
and run Python on request. So a config may hold known plain keys only. Weights do not tell with
which activation they were trained, GELU or QuickGELU, and both load; `decide_quick_gelu` asks tags,
configs and names instead.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from erase.prompts.errors import ErasureError, reason, unknown

CONFIG = "open_clip_config.json"
LOCAL, HUB = "local-dir:", "hf-hub:"

BLOCK_KEYS = frozenset(
    "qk_norm scaled_cosine_attn scale_heads scale_attn_inner scale_attn scale_fc block_type".split()
)
TOWER_KEYS = BLOCK_KEYS | set(
    "layers width mlp_ratio ls_init_value pool_type final_ln_after_pool output_tokens".split()
)
KEYS = {
    "": frozenset({"model_cfg", "preprocess_cfg"}),
    "model_cfg": frozenset(
        "embed_dim vision_cfg text_cfg multimodal_cfg quick_gelu custom_text init_logit_scale "
        "init_logit_bias "
        "nonscalar_logit_scale".split()
    ),
    "vision_cfg": TOWER_KEYS
    | set(
        "head_width patch_size image_size patch_dropout attentional_pool attn_pooler_queries "
        "attn_pooler_heads no_ln_pre pos_embed_type act_kwargs norm_kwargs timm_model_name "
        "timm_model_pretrained timm_pool timm_proj timm_proj_bias "
        "timm_drop timm_drop_path".split()
    ),
    "text_cfg": TOWER_KEYS
    | set(
        "context_length vocab_size hf_tokenizer_name tokenizer_mode tokenizer_kwargs heads "
        "embed_cls pad_id eos_id no_causal_mask proj_bias proj_type act_kwargs norm_kwargs "
        "hf_model_name hf_model_pretrained hf_proj_type "
        "hf_pooler_type".split()
    ),
    "multimodal_cfg": TOWER_KEYS
    | set(
        "context_length vocab_size heads dim_head n_queries attn_pooler_heads pad_id act_kwargs "
        "norm_kwargs".split()
    ),
    "preprocess_cfg": frozenset("size mode mean std interpolation resize_mode fill_color".split()),
    "tokenizer_kwargs": frozenset({"clean", "strip_sep_token", "language"}),
    "act_kwargs": frozenset({"approximate"}),
    "norm_kwargs": frozenset({"eps", "elementwise_affine", "bias"}),
}
"""group of a config -> the keys that it may hold; a group is a key of the one around it"""
CODE = frozenset({"auto_map", "custom_pipelines", "trust_remote_code"})
"""keys by which transformers finds Python in a model's folder"""


@dataclass(frozen=True)
class Source:
    """A CLIP that open_clip may build."""

    name: str
    """as open_clip spells it: a model name, `local-dir:PATH` or `hf-hub:owner/name`"""
    weights: str | None
    """a tag of open_clip or a file, for a model name"""
    model: Mapping[str, Any]
    """its `model_cfg`"""


def find_source(name: str, weights: str | None) -> Source:
    """The CLIP of a name, its config checked.

    Args:
        name: a model name, a folder, `local-dir:PATH` or `hf-hub:owner/name`.
        weights: a tag or a file, for a model name alone.

    Raises:
        ErasureError: an unknown name or tag, weights where none can be chosen, or a config with
            keys that are not plain.
    """
    if name.startswith((LOCAL, HUB)) or (
        Path(name).is_dir() and not (weights and _own_config(name))
    ):
        if weights:
            raise ErasureError(
                f"{name} brings its own weights, so {weights!r} would be ignored; leave "
                "clip.pretrained out, or give a model name"
            )
        name = name if name.startswith((LOCAL, HUB)) else LOCAL + name
        path = (
            _hub_config(name.removeprefix(HUB))
            if name.startswith(HUB)
            else Path(name.removeprefix(LOCAL), CONFIG)
        )
        return Source(name, None, read_config(path))
    _check_name(name, weights)
    return Source(name, weights, _own_config(name))


def _check_name(name: str, weights: str | None) -> None:
    import open_clip

    if name not in open_clip.list_models():
        raise unknown("CLIP model", name, ["canvas", *open_clip.list_models()])
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights is None:
        raise ErasureError(
            f"the CLIP model {name!r} needs weights; set pretrained to a file or one of: "
            f"{', '.join(tags)}"
        )
    if not _tag(name, weights) and not Path(weights).is_file():
        raise unknown(f"tag of the CLIP model {name}", weights, tags)


def _own_config(name: str) -> dict[str, Any]:
    from open_clip import get_model_config

    return dict(get_model_config(name) or {})


def _tag(name: str, weights: str | None) -> dict[str, Any]:
    """What open_clip knows of a tag; nothing where it is none."""
    from open_clip import get_pretrained_cfg

    return dict(get_pretrained_cfg(name, weights) or {}) if weights else {}


def _hub_config(repo: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, CONFIG))
    except (
        Exception
    ) as error:  # the client, its HTTP library and the system each raise their own kinds
        raise ErasureError(
            f"open_clip cannot load {HUB}{repo}: its {CONFIG} cannot be had ({reason(error)}); "
            "check the name and the network"
        ) from error


# ---- nothing in it names code --------------------------------------------------------------------


def read_config(path: Path) -> dict[str, Any]:
    """The `model_cfg` of an `open_clip_config.json`, after a look at it and at the JSON files
    beside it.

    Raises:
        ErasureError: it is absent or damaged, holds a key or a value that is not known to be plain,
            or a file beside it names code.
    """
    content = _json(path)
    _check_keys(path, content, "")
    model = content.get("model_cfg")
    if not isinstance(model, dict) or not all(
        isinstance(model.get(part), dict) for part in ("vision_cfg", "text_cfg")
    ):
        raise ErasureError(
            f"open_clip cannot load {path}: it has no model_cfg with a vision_cfg and a text_cfg"
        )
    _check_towers(
        path, model["vision_cfg"].get("timm_model_name"), model["text_cfg"].get("hf_model_name")
    )
    if not isinstance(model.get("quick_gelu"), bool | None):
        raise ErasureError(
            f"{path}: quick_gelu is {model['quick_gelu']!r}; it must be true or false"
        )
    # of the tokenizer, the model and the processor
    for beside in sorted(path.parent.glob("*config*.json")):
        code_keys = _keys(_json(beside)) & CODE
        if code_keys:
            raise _refused(
                beside, f"{min(code_keys)!r}, by which a folder brings Python of its own"
            )
    return model


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        what = getattr(error, "strerror", None) or "it is not JSON"
        raise ErasureError(
            f"open_clip cannot load {path.parent}: cannot read {path.name} ({what}); give a folder "
            "in open_clip's format"
        ) from error


def _check_keys(path: Path, content: Any, group: str) -> None:
    """Refuse what is not in `KEYS`, and values that are neither plain nor a known group."""
    if not isinstance(content, dict):
        raise ErasureError(f"open_clip cannot load {path}: {group or 'it'} is no group of settings")
    for key, value in content.items():
        if key not in KEYS[group]:
            raise _refused(
                path, f"the key {f'{group}.{key}'.lstrip('.')!r}, which is not known to be plain"
            )
        if key in KEYS and value is not None:
            _check_keys(path, value, key)
        elif isinstance(value, dict) or (
            isinstance(value, list) and any(isinstance(item, dict | list) for item in value)
        ):
            raise _refused(path, f"a group of settings in {key!r}, where a plain value belongs")


def _check_towers(path: Path, timm_name: Any, text_name: Any) -> None:
    """Towers by name may be such as the libraries hold themselves: timm and transformers would
    fetch others, or read any folder."""
    import timm

    if timm_name is not None and not (isinstance(timm_name, str) and timm.is_model(timm_name)):
        raise _refused(path, f"the image tower {timm_name!r}, which is none that timm holds itself")
    if text_name is not None and text_name not in _text_towers():
        raise _refused(
            path,
            f"the text tower {text_name!r}, which is none of those that open_clip's own models "
            "have",
        )


@cache
def _text_towers() -> frozenset[str]:
    from open_clip import list_models

    return frozenset(
        filter(None, (_own_config(name)["text_cfg"].get("hf_model_name") for name in list_models()))
    )


def _keys(content: Any) -> set[str]:
    """All keys in it, at any depth."""
    if isinstance(content, dict):
        return set(content).union(*map(_keys, content.values()))
    return set().union(*map(_keys, content)) if isinstance(content, list) else set()


def _refused(path: Path, what: str) -> ErasureError:
    return ErasureError(
        f"{path} has {what}; no code is taken from a judge: remove it, or use another CLIP"
    )


def check_weights(path: Path) -> None:
    """Refuse an archive of TorchScript, such as OpenAI's own `ViT-B-32.pt`: it is a program, which
    loading it would start."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any("/code/" in name for name in archive.namelist()):
                raise ErasureError(
                    f"{path} is a TorchScript archive, which is a program and no plain weights; "
                    "use the tag (clip.pretrained openai), or save its state_dict as safetensors"
                )


# ---- the activation ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sign:
    """Something that tells the activation."""

    who: str
    quick_gelu: bool
    sure: bool = True
    """not by the mere name of a file or a folder"""


def decide_quick_gelu(source: Source, stated: bool | None) -> bool:
    """Whether the weights were trained with QuickGELU, x * sigmoid(1.702 x), and not with GELU.

    open_clip's tag or the config tells, the ending `-quickgelu` of a model's name, a file's or a
    folder's published name; `stated` is the user's word, which decides what these leave open.

    Raises:
        ErasureError: nothing tells, or two that tell differ.
    """
    signs = _signs(source)
    answers = {sign.quick_gelu for sign in signs}
    sure = {sign.quick_gelu for sign in signs if sign.sure}
    if stated is not None and (stated in sure or not sure):
        return stated
    if stated is None and len(answers) == 1:
        return answers.pop()

    if not answers:
        raise ErasureError(
            f"nothing tells whether {source.weights} was trained with QuickGELU, and {source.name} "
            "exists with both; set clip.quick_gelu: true for weights of OpenAI, DFN and MetaCLIP, "
            "false for LAION's and DataComp's"
        )
    words = [f"{sign.who} says {'QuickGELU' if sign.quick_gelu else 'GELU'}" for sign in signs]
    way_out = (
        "set clip.quick_gelu to the right one" if stated is None else "leave clip.quick_gelu out"
    )
    raise ErasureError(
        f"the activation of {source.name} is in doubt: {', '.join(words)}; {way_out}"
    )


def _signs(source: Source) -> list[Sign]:
    own, weights = source.model.get("quick_gelu"), source.weights
    if weights is None:
        known = _known_repository(source.name.removeprefix(LOCAL).removeprefix(HUB))
        by_name = (
            []
            if known is None
            else [Sign("open_clip's list of such repositories", known, sure=False)]
        )
        stated = [] if own is None else [Sign(CONFIG, own)]
        return by_name + stated or [Sign(f"{CONFIG}, by saying nothing,", False, sure=False)]

    if tag := _tag(source.name, weights):
        of_model = [Sign(f"open_clip's config of {source.name}", True)] if own else []
        return [Sign(f"the tag {weights!r}", bool(tag.get("quick_gelu"))), *of_model]
    known = _known_file(Path(weights))
    by_name = [] if known is None else [Sign(f"the published name of {weights}", known, sure=False)]
    if own:
        return [Sign(f"the name {source.name}", True), *by_name]
    return (
        by_name
        if by_name or _has_both(source.name)
        else [Sign(f"open_clip's config of {source.name}", False)]
    )


def _has_both(name: str) -> bool:
    """Whether some weights of this architecture want QuickGELU and others do not, as far as
    open_clip knows."""
    import open_clip

    tags = (
        _tag(name, tag).get("quick_gelu") for tag in open_clip.list_pretrained_tags_by_model(name)
    )
    return any(tags) or f"{name}-quickgelu" in open_clip.list_models()


def _known_file(path: Path) -> bool | None:
    """Of a file as it is published: by its name, or by the repository in whose folder or hub cache
    it lies."""
    from open_clip import list_pretrained

    for name, tag in list_pretrained():
        known = _tag(name, tag)
        if known.get("url") and path.name == known["url"].rpartition("/")[2]:
            return bool(known.get("quick_gelu"))
    return _known_repository(str(path.absolute().parent))


def _known_repository(place: str) -> bool | None:
    """Of `owner/name`, of a folder called `name`, or of a hub cache
    `models--owner--name/snapshots/…`, as open_clip lists it."""
    from open_clip import list_pretrained

    parts = Path(place).absolute().parts if Path(place).is_dir() else Path(place).parts
    cached = {
        part.removeprefix("models--").replace("--", "/")
        for part in parts
        if part.startswith("models--")
    }
    for name, tag in list_pretrained():
        known = _tag(name, tag)
        repository = known.get("hf_hub", "").strip("/")
        if repository and (
            repository in cached
            or repository in (place, "/".join(parts[-2:]))
            or parts[-1] == Path(repository).name
        ):
            return bool(known.get("quick_gelu"))
    return None
