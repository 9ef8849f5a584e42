"""Where a CLIP comes from, looked at before open_clip builds it: nothing in it names code.

A config of open_clip reaches the loaders of transformers and timm, which fetch other repositories
and run Python on request. So a config may hold known plain keys only.
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
    if not tag_config(name, weights) and not Path(weights).is_file():
        raise unknown(f"tag of the CLIP model {name}", weights, tags)


def _own_config(name: str) -> dict[str, Any]:
    from open_clip import get_model_config

    return dict(get_model_config(name) or {})


def tag_config(name: str, weights: str | None) -> dict[str, Any]:
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
