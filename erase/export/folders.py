"""Diffusers folders that every version of transformers reads.

transformers 5 renamed the weights of CLIP's text model, writes tokenizers as one `tokenizer.json`,
and obeys the precision that a configuration states. So a folder as its newest version writes it is
drawn with random weights by 5.0 to 5.3 and cannot be read by 4.x or ComfyUI; and one in float16
does not run without arguments, since diffusers loads its own parts in float32. The form here is the
one that was published before, which the newest version reads as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from tokenizers.models import BPE
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from erase.models.pipelines import Pipeline
from erase.tensor_files import stream_tensors

OLD_PREFIX = "text_model."
RENAMED = ("embeddings.", "encoder.", "final_layer_norm.")
"""beginnings of the names in CLIP's text model that newer versions of transformers write without
`OLD_PREFIX`"""


def save_pipeline(pipeline: Pipeline, folder: str | Path) -> None:
    """Write a stock pipeline as a diffusers folder."""
    folder = Path(folder)
    pipeline.save_pretrained(folder, safe_serialization=True)

    for name, part in pipeline.components.items():
        if isinstance(part, PreTrainedModel):
            _settle(part, folder / name)
        elif isinstance(part, PreTrainedTokenizerBase):
            _save_vocabulary(part, folder / name)
            _edit(folder / name / "tokenizer_config.json", _with_additional_tokens)
    _edit(folder / "model_index.json", _with_fast_t5)
    _forget_paths(folder)


def save_part(part: Any, folder: str | Path) -> None:
    """Write one model of a pipeline, as its own class loads it."""
    part.save_pretrained(folder, safe_serialization=True)
    if isinstance(part, PreTrainedModel):
        _settle(part, Path(folder))
    _forget_paths(Path(folder))


def _settle(part: PreTrainedModel, folder: Path) -> None:
    """Old names, and float32 as the precision that the configuration states, as diffusers takes it
    where it is not told."""
    if isinstance(part, (CLIPTextModel, CLIPTextModelWithProjection)):
        _name_as_before(folder / "model.safetensors")
    _edit(folder / "config.json", lambda config: config | {"dtype": "float32"})


def _name_as_before(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        names = {
            OLD_PREFIX + name if name.startswith(RENAMED) else name: name for name in file.keys()
        }  # noqa: SIM118
        if all(old == new for old, new in names.items()):
            return
        layout = {new: file.get_tensor(old).to("meta") for new, old in names.items()}
        stream_tensors(
            path,
            layout,
            lambda new: file.get_tensor(names[new]),
            file.metadata() or {"format": "pt"},
        )


def _save_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The vocab.json and merges.txt of a byte pair encoding, which is all that the tokenizers of
    transformers 4 read."""
    model: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if isinstance(model, BPE):
        model.save(str(folder))


def _with_additional_tokens(config: dict[str, Any]) -> dict[str, Any]:
    """T5's further tokens under the key that both read: where transformers 5 writes a list, 4.57
    expects a mapping."""
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def _with_fast_t5(index: dict[str, Any]) -> dict[str, Any]:
    """The T5 tokenizer by the name under which transformers 4 reads tokenizer.json; in 5 both names
    are one class."""
    t5, fast = ["transformers", "T5Tokenizer"], ["transformers", "T5TokenizerFast"]
    return {name: fast if entry == t5 else entry for name, entry in index.items()}


def _forget_paths(folder: Path) -> None:
    """Drop where on this disk the parts were read from, which is nobody else's business."""
    for path in folder.rglob("*config.json"):
        _edit(path, _without_paths)
    if (folder / "model_index.json").is_file():
        _edit(folder / "model_index.json", _without_paths)


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key.lstrip("_") != "name_or_path"}


def _edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Rewrite a JSON file as transformers and diffusers write theirs."""
    changed = change(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(
        json.dumps(changed, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
