"""Diffusers folders: every part is of a class that is known, and is read here, from this disk,
without running code of its own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import transformers
from torch import nn

from erase.models.config import LoadConfig
from erase.models.families import unsupported
from erase.models.part_files import check_part, check_variant, read_config
from erase.models.parts import check_finite, load_part, own_weights
from erase.models.pipelines import Pipeline, modules
from erase.models.schedules import scheduler_class
from erase.models.tokenizers import read_tokenizer
from erase.models.vae import load_vae
from erase.prompts.errors import ErasureError, reason

INDEX = "model_index.json"
CLIP, PROJECTED, T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
QWEN3, QWEN3_SPEAKING = "Qwen3Model", "Qwen3ForCausalLM"
QWEN_SEEING = "Qwen2_5_VLForConditionalGeneration"
WORDS = {
    CLIP: "CLIPTokenizer",
    PROJECTED: "CLIPTokenizer",
    T5: "T5Tokenizer",
    QWEN3: "Qwen2Tokenizer",
    QWEN3_SPEAKING: "Qwen2Tokenizer",
    QWEN_SEEING: "Qwen2Tokenizer",
}
"""text encoder -> its tokenizer"""
PARTS: dict[str, dict[str, str]] = {
    "StableDiffusionPipeline": {"unet": "UNet2DConditionModel", "text_encoder": CLIP},
    "StableDiffusionXLPipeline": {
        "unet": "UNet2DConditionModel",
        "text_encoder": CLIP,
        "text_encoder_2": PROJECTED,
    },
    "StableDiffusion3Pipeline": {
        "transformer": "SD3Transformer2DModel",
        "text_encoder": PROJECTED,
        "text_encoder_2": PROJECTED,
        "text_encoder_3": T5,
    },
    "FluxPipeline": {
        "transformer": "FluxTransformer2DModel",
        "text_encoder": CLIP,
        "text_encoder_2": T5,
    },
    "ZImagePipeline": {"transformer": "ZImageTransformer2DModel", "text_encoder": QWEN3},
    "Flux2KleinPipeline": {
        "transformer": "Flux2Transformer2DModel",
        "text_encoder": QWEN3_SPEAKING,
        "vae": "AutoencoderKLFlux2",
    },
    "QwenImagePipeline": {
        "transformer": "QwenImageTransformer2DModel",
        "text_encoder": QWEN_SEEING,
        "vae": "AutoencoderKLQwenImage",
    },
}
"""pipeline class -> its denoiser and text encoders, and their classes; a VAE (`VAE`, where none is
named), a scheduler and a tokenizer for each encoder come to it"""
VAE = "AutoencoderKL"
ABSENT = {
    "StableDiffusionXLPipeline": ("text_encoder", "tokenizer"),
    "StableDiffusion3Pipeline": ("text_encoder_3", "tokenizer_3"),
}
"""what a pipeline may say that it has not: an SDXL refiner (which is refused by its name later), SD
3 without its T5"""
LEFT_OUT = {
    "safety_checker": "it hides images, and would hide what is left of a concept",
    "image_encoder": "only IP-Adapters use it",
    "feature_extractor": "only the safety checker and IP-Adapters use it",
}
log = logging.getLogger("erase")


class Part(NamedTuple):
    """The entry of a part in the index."""

    library: str
    kind: str


def load_folder(
    folder: Path, name: str, options: LoadConfig, given: Mapping[str, nn.Module] | None = None
) -> Pipeline:
    """The stock pipeline of a diffusers folder, without network.

    Args:
        folder: holds model_index.json.
        name: what errors call it.
        options: variant, dtype, VAE.
        given: parts that are there already, of which the folder is not asked.

    Raises:
        ErasureError: another family, a part that is missing, damaged, quantised or of another
            class.
    """
    given = given or {}
    index = read_index(folder)
    kind = index["_class_name"]
    _check_vae(kind, name, options)
    parts = _parts(folder, index, options.vae is not None)
    for part in LEFT_OUT.keys() & parts.keys():
        log.info("%s: its %s is left out (%s)", name, part, LEFT_OUT[part])
    wanted = {
        part: entry
        for part, entry in parts.items()
        if part not in {*LEFT_OUT, *given} and not (part == "vae" and options.vae)
    }
    folders = {part: check_part(folder, part) for part in wanted}
    check_variant(
        [where for part, where in folders.items() if _holds_weights(part)], options.variant
    )

    # what the folder says it has not (SD 3 without its T5), diffusers wants to be told again
    components: dict[str, Any] = dict.fromkeys(
        part for part, entry in index.items() if isinstance(entry, list) and part not in wanted
    )
    components |= {part: _load(wanted[part], where, options) for part, where in folders.items()}
    components |= given
    if options.vae:
        components["vae"] = load_vae(options.vae, _vae_config(folder), options.torch_dtype)
    extra = {"requires_safety_checker": False} if "safety_checker" in index else {}
    extra |= {"add_watermarker": False} if kind == "StableDiffusionXLPipeline" else {}
    try:
        pipeline = getattr(diffusers, kind).from_pretrained(
            folder, **components, **extra, local_files_only=True
        )
    except Exception as error:
        raise ErasureError(f"cannot load the {kind} in {folder}: {reason(error)}") from error
    if (
        options.prediction
        and (own := pipeline.scheduler.config.get("prediction_type")) != options.prediction
    ):
        raise ErasureError(
            f"{name} says of itself that its prediction is {own!r}, not {options.prediction!r}; "
            "leave load.prediction out"
        )
    check_finite(modules(pipeline), name)
    own_weights(modules(pipeline))
    return pipeline


def _check_vae(kind: str, name: str, options: LoadConfig) -> None:
    """Refuse another VAE for a pipeline whose own is of a class that no file is read as."""
    if options.vae and (own := _expected(kind)["vae"]) != VAE:
        raise ErasureError(
            f"{name} is a {kind}, whose VAE is an {own}; no other is read for it, so leave "
            "load.vae out"
        )


def read_index(folder: Path) -> Mapping[str, Any]:
    """The content of `model_index.json`; its class is one of `PARTS`.

    Raises:
        ErasureError: no index, a malformed one, or another class.
    """
    if not (folder / INDEX).is_file():
        raise ErasureError(
            f"{folder} is not a diffusers folder: it has no {INDEX}; give a folder that has one, "
            "or a single .safetensors file"
        )
    index = read_config(folder / INDEX)
    kind = index.get("_class_name")
    if not isinstance(kind, str):
        raise ErasureError(f"{folder / INDEX} names no pipeline class (_class_name)")
    if kind not in PARTS:
        raise unsupported(f"{folder / INDEX} says {kind}", kind)
    return index


def _parts(folder: Path, index: Mapping[str, Any], has_vae: bool) -> dict[str, Part]:
    """The parts that the index lists, each of its expected class; `has_vae`: one comes from
    elsewhere."""
    kind = index["_class_name"]
    parts = {}
    for part, entry in index.items():
        if not isinstance(entry, list | dict) or entry == [None, None]:
            continue
        if not (
            isinstance(entry, list)
            and len(entry) == 2
            and all(isinstance(word, str) for word in entry)
        ):
            raise ErasureError(
                f"{folder / INDEX}: {part} is {str(entry)[:80]}, not [library, class]; fetch it "
                "again, or mend it"
            )
        parts[part] = Part(*entry)

    expected = _expected(kind)
    for part, known in expected.items():
        if (
            part not in parts
            and part not in ABSENT.get(kind, ())
            and not (part == "vae" and has_vae)
        ):
            raise ErasureError(
                f"{folder / INDEX} lists no {part}, which a {kind} needs; fetch the checkpoint "
                "again, whole"
            )
        if part in parts and not _is(parts[part], known):
            name = ".".join(parts[part])
            raise ErasureError(
                f"{folder / INDEX}: its {part} is a {name}, not a {known}; code and classes of "
                "others are not run"
            )
    for part in parts.keys() - expected.keys() - LEFT_OUT.keys():
        raise ErasureError(
            f"{folder / INDEX} lists {part} ({'.'.join(parts[part])}), which a {kind} does not "
            "have; take the line out"
        )
    return parts


def _expected(kind: str) -> dict[str, str]:
    """part -> its class; a scheduler may be any that diffusers has."""
    tokenizers = {
        part.replace("text_encoder", "tokenizer"): WORDS[encoder]
        for part, encoder in PARTS[kind].items()
        if encoder in WORDS
    }
    vae = PARTS[kind].get("vae", VAE)
    return {**PARTS[kind], **tokenizers, "vae": vae, "scheduler": "scheduler of diffusers"}


def _is(part: Part, known: str) -> bool:
    if known == "scheduler of diffusers":
        return part.library == "diffusers" and scheduler_class(part.kind) is not None
    library = "transformers" if known in (*WORDS, *WORDS.values()) else "diffusers"
    return part.library == library and part.kind in (
        known,
        f"{known}Fast" if known in WORDS.values() else known,
    )


def _holds_weights(part: str) -> bool:
    return part != "scheduler" and not part.startswith("tokenizer")


def _load(part: Part, where: Path, options: LoadConfig) -> Any:
    if where.name == "scheduler":
        return _load_scheduler(part, where)
    if where.name.startswith("tokenizer"):
        return read_tokenizer(where, getattr(transformers, part.kind.removesuffix("Fast")))
    library = transformers if part.library == "transformers" else diffusers
    return load_part(getattr(library, part.kind), where, options)


def _load_scheduler(part: Part, where: Path) -> Any:
    try:
        return scheduler_class(part.kind).from_pretrained(where, local_files_only=True)
    except Exception as error:  # a value in its configuration can upset it anywhere
        raise ErasureError(
            f"cannot build the {part.kind} of {where}: {reason(error)}; mend its configuration"
        ) from error


def _vae_config(folder: Path) -> dict[str, Any] | None:
    path = folder / "vae" / "config.json"
    return read_config(path) if path.is_file() else None
