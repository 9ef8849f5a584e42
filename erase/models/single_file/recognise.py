"""The family of a single file, told from its keys and shapes; whatever is not SD 1, SD 2, SDXL base
or of one of `layouts` is refused by its name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import replace

from erase.models.single_file.architectures import STOCK
from erase.models.single_file.ldm import UNET, VAE
from erase.models.single_file.tensor_file import TensorFile
from erase.prompts.errors import ErasureError, unknown

NAMES = {"sd1": "SD 1", "sd2": "SD 2", "sdxl": "SDXL base"}
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
"""prediction type -> its name in the ModelSpec metadata (`modelspec.prediction_type`)"""

CONTROLNET = (
    r"^(control_model|controlnet_cond_embedding|controlnet_(single_)?blocks|controlnet_x_embedder"
    r"|input_hint_block|pos_embed_input)\.",
    "a ControlNet",
)
FOREIGN = (
    (
        r"(^|\.)scaled_fp8$|\.(scale_weight|scale_input|weight_scale(_2)?|input_scale)$"
        r"|(^|\.)comfy_quant$",
        "a checkpoint in scaled float8, whose weights mean nothing without their scales (fetch it "
        "in float16 or float32)",
    ),
    (
        r"\.(absmax|quant_map|qweight|qzeros|weight_packed)$|\.quant_state\.",
        "a quantised checkpoint (fetch it in float16 or float32)",
    ),
    (
        r"lora_(unet|te\d?)_|\.lora(_down|_up|_A|_B|\.down|\.up)\b|\.hada_w|\.lokr_w",
        "a LoRA, which changes a checkpoint but is none",
    ),
    CONTROLNET,
    (r"^(emb_params|clip_[lg]|string_to_param)$", "a textual inversion embedding"),
    (r"(^|\.)joint_blocks\.\d", "of the Stable Diffusion 3 family"),
    (r"(^|\.)(double_blocks|single_blocks|double_stream_blocks)\.\d", "of the Flux family"),
    (r"(^|\.)(motion_modules|time_stack|time_mixer)\.", "a video model"),
    (r"^cond_stage_model\.roberta\.", "AltDiffusion"),
    (r"^(embedder\.model|noise_augmentor)\.", "Stable unCLIP"),
    (
        r"^edm_(mean|std)$|^edm_vpred\.",
        "an EDM model (such as Playground 2.5), whose noise schedule is another",
    ),
    (
        r"^(down_blocks|up_blocks|mid_block|add_embedding)\.",
        "a bare UNet in the names of diffusers",
    ),
    (r"^(input_blocks|middle_block|output_blocks)\.", "a bare UNet"),
    (r"^(encoder|decoder)\.(conv_in|down|up|mid)", "a bare VAE"),
    (r"^(text_model|text_encoders?)\.|^transformer\.resblocks\.", "a bare text encoder"),
)
"""pattern of a key -> what a file with such a key is"""
UNREADABLE = FOREIGN[:2]
"""those whose weights are no plain numbers, whatever the family"""
CHANNELS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an image-editing model (such as InstructPix2Pix)",
    9: "an inpainting model",
}
WRAPPERS = ("module.", "_orig_mod.")
STEPS = {875_000: "epsilon", 110_000: "v_prediction"}
"""`global_step` of the official SD 2.0-base and 2.1 files, as diffusers' `convert_from_ckpt` tells
them"""


def modern(file: TensorFile) -> TensorFile:
    """The file in the names of today.

    Its CLIP keys have `text_model.`, which some early SD 1 files lack (A1111 and ComfyUI add it
    too); what torch's wrappers put before every name (`module.`, `_orig_mod.`) is gone.
    """
    old = re.compile(
        r"(cond_stage_model\.transformer\.)((?:embeddings|encoder|final_layer_norm)\..*)"
    )
    common = os.path.commonprefix(list(file.shapes))
    wrapper = next((one for one in WRAPPERS if common.startswith(one)), "")
    renamed = {key: old.sub(r"\1text_model.\2", key.removeprefix(wrapper)) for key in file.shapes}
    names = {key if new in file.shapes else new: key for key, new in renamed.items()}
    shapes = {name: file.shapes[key] for name, key in names.items()}
    return replace(file, shapes=shapes, read=lambda name: file.read(names[name]))


def is_averaged(file: TensorFile) -> bool:
    """Whether the file holds a moving average of the UNet beside its last weights."""
    return any(key.startswith("model_ema.diffusion_model") for key in modern(file).shapes)


def without(file: TensorFile, pattern: str) -> TensorFile:
    """The file without the tensors whose names begin with a regular expression.

    Raises:
        ErasureError: none does.
    """
    shapes = {key: shape for key, shape in file.shapes.items() if not re.match(pattern, key)}
    if len(shapes) == len(file.shapes):
        raise ErasureError(
            f"{file.path} holds no tensor whose name begins with {pattern!r} (load.ignore); leave "
            "it out"
        )
    return replace(file, shapes=shapes)


def recognise(file: TensorFile, expected: str | None, has_vae: bool = False) -> str:
    """The family of a file: `sd1`, `sd2` or `sdxl`.

    Args:
        file: an open checkpoint.
        expected: the family of the configuration that the user gave, if any; without one the widths
            must be the stock ones.
        has_vae: the VAE comes from elsewhere, so the file needs none.

    Raises:
        ErasureError: the file is something else, in a sentence that says what.
    """
    keys = file.shapes.keys()
    if not keys:
        raise ErasureError(f"{file.path} holds no tensors at all")
    refuse(file, FOREIGN)
    family = _family(file, has_vae)
    channels = file.shapes.get(UNET + "input_blocks.0.0.weight", (0, 4))[1]
    if channels != 4:
        raise _refused(file, CHANNELS.get(channels, f"a model of {channels} latent channels"))
    if family != "sdxl" and any(key.startswith(UNET + "label_emb.") for key in keys):
        raise _refused(file, "a model with class labels (such as Stable unCLIP or the x4 upscaler)")
    _check_family(file, family, expected)
    return family


def refuse(file: TensorFile, kinds: Iterable[tuple[str, str]]) -> None:
    """Refuse a file that has a key of one of these kinds.

    Raises:
        ErasureError: says which.
    """
    for pattern, what in kinds:
        if any(re.search(pattern, key) for key in file.shapes):
            raise _refused(file, what)


def _family(file: TensorFile, has_vae: bool) -> str:
    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in file.shapes)

    texts = {
        "conditioner.embedders.1.model.": "sdxl",
        "cond_stage_model.model.": "sd2",
        "cond_stage_model.transformer.": "sd1",
    }
    family = next((name for prefix, name in texts.items() if has(prefix)), None)
    if family is None and has("conditioner.embedders.0.model."):
        raise _refused(file, "the SDXL refiner (or another model with OpenCLIP alone)")
    parts = {"UNet": has(UNET), "VAE": has_vae or has(VAE), "text encoder": family is not None}
    lacking = [name for name, present in parts.items() if not present]
    if len(lacking) == 2 and any(map(has, (UNET, VAE, *texts))):
        raise _refused(file, "a bare " + next(name for name, present in parts.items() if present))
    if lacking == ["VAE"]:
        raise ErasureError(f"{file.path} has no VAE; give one, a folder or a file, with --load.vae")
    if lacking or family is None:
        what = (
            f"has no {lacking[0]}"
            if len(lacking) == 1
            else f"has no key of Stable Diffusion, but {next(iter(file.shapes))!r}"
        )
        raise ErasureError(
            f"{file.path} {what}; a whole checkpoint with UNet, VAE and text encoder is needed"
        )
    return family


def _check_family(file: TensorFile, family: str, expected: str | None) -> None:
    if expected not in (None, family):
        raise ErasureError(
            f"{file.path} is {NAMES[family]}, but the configuration is for {NAMES[expected]}; give "
            "the folder of the same model"
        )
    width = next(
        (
            s[-1]
            for key, s in file.shapes.items()
            if key.startswith(UNET) and key.endswith("attn2.to_k.weight")
        ),
        None,
    )
    if expected is None and width != STOCK[family]:
        raise ErasureError(
            f"{file.path} has the keys of {NAMES[family]}, but its cross-attention is {width} "
            f"wide, not {STOCK[family]}; name a diffusers folder with its configurations "
            "(load.config)"
        )


def _refused(file: TensorFile, what: str) -> ErasureError:
    return ErasureError(
        f"{file.path} is {what}; as a single file, only whole checkpoints of SD 1.x, SD 2.x and "
        "SDXL base, and the transformers of SD 3, FLUX.1, FLUX.2 klein, Z-Image and Qwen-Image, "
        "are supported"
    )


def decide_prediction(file: TensorFile, family: str, stated: str | None, asked: str | None) -> str:
    """`epsilon` or `v_prediction`, which the weights do not tell.

    The word of the caller (`asked`) holds over all; the sign in the file and the configuration
    (`stated`) must agree. SD 1 and SDXL without a sign predict epsilon, SD 2 came in both kinds.

    Raises:
        ErasureError: an unknown word, a contradiction, or an SD 2 of which nothing tells.
    """
    if asked is not None and asked not in PREDICTIONS:
        raise unknown("prediction type", asked, PREDICTIONS)
    if asked is not None:
        return asked
    if stated is not None and stated not in PREDICTIONS:
        raise unknown("prediction type of the configuration", stated, PREDICTIONS)
    signs = _signs(file, family) | ({"its configuration": stated} if stated else {})
    if len(set(signs.values())) > 1:
        statements = ", but ".join(f"{place} {kind}" for place, kind in signs.items())
        raise ErasureError(f"{file.path}: {statements}; say which is right with load.prediction")
    if "ztsnr" in file.shapes and "v_prediction" not in signs.values():
        raise ErasureError(
            f"{file.path} has the key ztsnr, a schedule for v prediction, but nothing says that it "
            "predicts v; say what it predicts with load.prediction"
        )
    if not signs and family == "sd2":
        raise ErasureError(
            f"{file.path} is SD 2, and nothing in it tells whether it predicts epsilon (512-base) "
            "or v (768-v); say which with load.prediction=epsilon or load.prediction=v_prediction"
        )
    return next(iter(signs.values()), "epsilon")


def _signs(file: TensorFile, family: str) -> dict[str, str]:
    """Signs in the file: ModelSpec's metadata, the `v_pred` key of ComfyUI and A1111, the step of
    the official SD 2 files.

    Raises:
        ErasureError: a word that ModelSpec does not have.
    """
    signs = {}
    if word := file.metadata.get("modelspec.prediction_type", "").strip():
        kinds = {name: kind for kind, name in PREDICTIONS.items()} | {
            kind: kind for kind in PREDICTIONS
        }
        if word not in kinds:
            raise ErasureError(
                f"{file.path}: its metadata says prediction type {word!r}; supported are "
                f"{', '.join(PREDICTIONS.values())}; if it is wrong, say which is right with "
                "load.prediction"
            )
        signs["its metadata says"] = kinds[word]
    if "v_pred" in file.shapes:
        signs["its key v_pred says"] = "v_prediction"
    if not signs and family == "sd2" and file.step in STEPS:
        signs["its step says"] = STEPS[file.step]
    return signs
