"""Tokenizers: read whole or not at all, and what of a prompt their text encoders see."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from transformers import CLIPTokenizer

from erase.models.base import Tokens
from erase.models.part_files import read_config
from erase.models.pipelines import Pipeline, stock
from erase.prompts.errors import ErasureError, reason

FILES = {
    "CLIPTokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "T5Tokenizer": (("tokenizer.json",), ("spiece.model",)),
    "Qwen2Tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
}
"""tokenizer class -> sets of files, of which one must be there"""
SPARE = 128
"""a text encoder may have so many more embeddings than there are tokens: tables are padded to round
sizes"""


def tokens(pipeline: Pipeline, prompts: list[str]) -> dict[str, list[Tokens]]:
    """Prompts as each text encoder of a pipeline takes them, by the encoder's name."""
    way, by_encoder = stock(pipeline), {}
    for part, tokenizer in _tokenizers(pipeline).items():
        rows = tokenizer(
            prompts, add_special_tokens=False, truncation=False, padding=False, verbose=False
        ).input_ids
        encoder, room = part.replace("tokenizer", "text_encoder"), way.room(tokenizer)
        places = way.states(encoder)
        by_encoder[encoder] = [Tokens(tuple(ids), room, places) for ids in rows]
    return by_encoder


def _tokenizers(pipeline: Pipeline) -> dict[str, Any]:
    return {
        name: part
        for name, part in pipeline.components.items()
        if name.startswith("tokenizer") and part is not None
    }


def _is_clip(tokenizer: Any) -> bool:
    return type(tokenizer).__name__.startswith("CLIP")


def read_tokenizer(folder: Path, kind: Any = CLIPTokenizer) -> Any:
    """A tokenizer of a diffusers folder; the class is given, whatever the folder says.

    Raises:
        ErasureError: its vocabulary or configuration is missing or cannot be read. Without them
            transformers makes one for which every word is the same unknown token.
    """
    known = FILES[kind.__name__.removesuffix("Fast")]
    if not (folder / "tokenizer_config.json").is_file():
        raise ErasureError(
            f"cannot read the tokenizer in {folder}: it has no tokenizer_config.json; fetch it "
            "again, whole"
        )
    read_config(folder / "tokenizer_config.json")
    whole = [files for files in known if all(map(Path.is_file, map(folder.joinpath, files)))]
    if not whole:
        needed = " or ".join(" with ".join(files) for files in known)
        raise ErasureError(
            f"{folder} lacks its vocabulary ({needed}); fetch the tokenizer again, whole"
        )
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise kinds of their own
        raise ErasureError(
            f"cannot read the tokenizer in {folder}: {reason(error)}; fetch it again, whole"
        ) from error


def check_tokenizers(pipeline: Pipeline, name: str) -> None:
    """Refuse tokenizers that do not fit their text encoders, or whose vocabulary is not whole.

    Raises:
        ErasureError: names the tokenizer.
    """
    for part, tokenizer in _tokenizers(pipeline).items():
        encoder = getattr(pipeline, part.replace("tokenizer", "text_encoder"), None)
        if encoder is not None:
            _check(tokenizer, encoder.config, f"{name}: its {part}")


def _check(tokenizer: Any, config: Any, which: str) -> None:
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    config = getattr(config, "text_config", config)  # of a model that sees images, too
    if max(vocabulary.values()) >= config.vocab_size:
        raise ErasureError(
            f"{which} has tokens up to number {max(vocabulary.values())}, but its text encoder "
            f"embeds {config.vocab_size}; give the tokenizer that belongs to it"
        )
    letters = {
        tuple(tokenizer(letter, add_special_tokens=False).input_ids) for letter in ascii_lowercase
    }
    if len(letters) < len(ascii_lowercase):
        raise ErasureError(
            f"{which} does not tell letters apart: its vocabulary is missing; fetch the tokenizer "
            "again, whole"
        )
    if _is_clip(tokenizer):
        _check_clip(tokenizer, vocabulary, config, which)
    if not type(tokenizer).__name__.startswith("T5"):
        _check_merges(tokenizer, vocabulary, which)


def _check_clip(tokenizer: Any, vocabulary: Mapping[str, int], config: Any, which: str) -> None:
    if len(vocabulary) + SPARE < config.vocab_size:
        raise ErasureError(
            f"{which} knows {len(vocabulary)} tokens of the {config.vocab_size} that its text "
            "encoder embeds; fetch the tokenizer again, whole"
        )
    if tokenizer.model_max_length > config.max_position_embeddings:
        raise ErasureError(
            f"{which} lets prompts be {tokenizer.model_max_length} tokens long, but its text "
            f"encoder has {config.max_position_embeddings} positions; write that into "
            "model_max_length of tokenizer_config.json"
        )


def _check_merges(tokenizer: Any, vocabulary: Mapping[str, int], which: str) -> None:
    merged = {"".join(pair) for pair in _merges(tokenizer)} | set(tokenizer.get_added_vocab())
    lost = [
        token for token in vocabulary if len(token.removesuffix("</w>")) > 1 and token not in merged
    ]
    if lost:
        raise ErasureError(
            f"{which} never makes {len(lost)} tokens of its vocabulary, {lost[0]!r} among them: "
            "its merges are not whole; fetch the tokenizer again"
        )


def _merges(tokenizer: Any) -> list[list[str]]:
    """The pairs of symbols that a byte-pair tokenizer joins."""
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges", [])
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
