"""Single-file checkpoints (`.safetensors`, `.ckpt`), as A1111 and ComfyUI use them, to and from
stock diffusers pipelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

from erase.models.pipelines import Pipeline
from erase.models.schedules import knows_zero_snr
from erase.models.single_file import ldm
from erase.models.single_file.alone import load_alone
from erase.models.single_file.architectures import Architecture, from_folder, sd_family, shipped
from erase.models.single_file.filling import check_weights, converted, fill, refuse_surplus
from erase.models.single_file.layouts import layout_in, layout_of
from erase.models.single_file.recognise import (
    NAMES,
    decide_prediction,
    is_averaged,
    modern,
    recognise,
    without,
)
from erase.models.single_file.spec import ORIGINAL, model_spec
from erase.models.single_file.tensor_file import TensorFile, open_tensors
from erase.models.vae import load_vae
from erase.prompts.errors import ErasureError
from erase.tensor_files import stream_tensors


def load_single_file(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    config: str | Path | None = None,
    prediction: str | None = None,
    ema: bool = False,
    vae: str | Path | None = None,
    ignore: str | None = None,
) -> Pipeline:
    """Load SD 1.x, SD 2.x, SDXL base, or a family of `layouts.LAYOUTS` from one file, without
    network; the safety checker is left out.

    Weights are converted one by one, so the peak is about one copy of them in `dtype`. Pickles are
    not executed.

    Args:
        path: `.safetensors`, `.ckpt`, `.pt` or `.pth` in the LDM layout, or in one of
            `layouts.LAYOUTS`.
        dtype: of the weights in memory.
        config: a diffusers folder whose configurations and tokenizers hold instead of the shipped
            ones; what a file of `LAYOUTS` does not hold comes from there.
        prediction: `epsilon` or `v_prediction`; needed for SD 2 if neither the file nor `config`
            says.
        ema: take the moving average of the UNet (`model_ema.*`), not the weights that A1111 and
            ComfyUI use.
        vae: a folder or file whose VAE takes the place of the file's own, or the one that it lacks.
        ignore: a regular expression; tensors whose names begin with it are not looked at.

    Raises:
        ErasureError: another kind of file, a damaged one, one that does not fit the architecture,
            or an SD 2 of unknown prediction.
    """
    with open_tensors(path) as opened:
        file = modern(without(opened, ignore) if ignore else opened)
        if layout := layout_in(file):
            _check_asked(file, prediction, ema)
            return load_alone(file, layout, dtype, config, vae)
        given = from_folder(config) if config is not None else None
        family = recognise(file, given.family if given else None, vae is not None)
        architecture = _architecture(file, family, given, prediction)
        modules = _filled(file, architecture, dtype, ema, vae is not None)
    if vae is not None:
        modules["vae"] = load_vae(vae, architecture.configs["vae"], dtype)
    return architecture.pipeline(modules)


def _filled(
    file: TensorFile, architecture: Architecture, dtype: torch.dtype, ema: bool, has_vae: bool
) -> dict[str, nn.Module]:
    """The networks with the file's weights; `has_vae`: the VAE comes from elsewhere."""
    family, modules = architecture.family, architecture.modules()
    if has_vae:
        del modules["vae"]
        shapes = {key: shape for key, shape in file.shapes.items() if not key.startswith(ldm.VAE)}
        file = replace(file, shapes=shapes)
    table = ldm.table(family, modules)
    check_weights(file, table, modules)
    _check_rest(file, table, family, modules)
    if ema:
        if not is_averaged(file):
            raise ErasureError(
                f"{file.path} holds no moving average of the UNet (model_ema.*); load it without "
                "ema"
            )
        table = ldm.ema_table(table)
        check_weights(file, table, modules)
    fill(file, table, modules, dtype)
    return modules


def _check_asked(file: TensorFile, prediction: str | None, ema: bool) -> None:
    """Refuse options that say nothing about a transformer.

    Raises:
        ErasureError: names the option.
    """
    if prediction or ema:
        option = "prediction" if prediction else "ema"
        raise ErasureError(
            f"load.{option} says nothing about the transformer in {file.path}; leave it out"
        )


def _architecture(
    file: TensorFile, family: str, given: Architecture | None, asked: str | None
) -> Architecture:
    """The configurations to build from, given or shipped, with the prediction type that is stated
    somewhere."""
    stated = given.configs["scheduler"].get("prediction_type", "epsilon") if given else None
    prediction = decide_prediction(file, family, stated, asked)
    architecture = given or shipped(family, prediction)
    schedule = {**architecture.configs["scheduler"], "prediction_type": prediction}
    # the flag of ComfyUI and A1111 for a schedule that ends in pure noise
    if "ztsnr" in file.shapes:
        schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if not knows_zero_snr(getattr(diffusers, schedule["_class_name"])):
            schedule["_class_name"] = "DDIMScheduler"
    return replace(architecture, configs={**architecture.configs, "scheduler": schedule})


def _check_rest(
    file: TensorFile, table: Sequence[ldm.Entry], family: str, modules: Mapping[str, ldm.Network]
) -> None:
    """Nothing else is there, but what the originals hold and the pipeline does not use."""
    known, spare = {entry.key for entry in table}, ldm.spare_keys(family, modules)
    surplus = [key for key in file.shapes if key not in known and not spare.fullmatch(key)]
    refuse_surplus(file, surplus, NAMES[family], "if it is of another size, give its configuration")


@torch.no_grad()
def write_single_file(
    pipeline: Pipeline,
    path: str | Path,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a pipeline as one safetensors file in the LDM layout, which A1111, ComfyUI and
    diffusers load; of the families of `layouts.LAYOUTS`, what their own files hold.

    It holds what the originals hold, except what no program needs: the noise schedule and the
    moving average. The last layer, projection and temperature of SD 2's text encoder, which nothing
    uses and a diffusers pipeline does not have, are stand-ins.

    Args:
        pipeline: a `StableDiffusionPipeline`, a `StableDiffusionXLPipeline`, or one of `LAYOUTS`.
        path: a `.safetensors` file that does not exist yet; it appears whole or not at all.
        dtype: of the file; each weight's own by default.
        metadata: further text for the header, e.g. `modelspec.title`; ModelSpec's other keys are
            there already.

    Raises:
        ErasureError: another pipeline, suffix, an existing file, a weight without a key in the
            layout or without a finite value in `dtype`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ErasureError(f"{path} must end in .safetensors")
    if path.exists():
        raise ErasureError(f"{path} exists already; choose another name or delete it")
    alone = layout_of(pipeline)
    family = "" if alone else _family(pipeline)
    parts = alone.written if alone else ("unet", "vae", *ldm.TEXTS[family])
    modules = {name: getattr(pipeline, name) for name in parts}
    if lacking := [name for name, module in modules.items() if module is None]:
        raise ErasureError(
            f"the pipeline has no {lacking[0]}, which a single file holds; load it whole"
        )
    states = _states(modules)
    table = alone.entries(modules, alone.prefix) if alone else ldm.table(family, modules)
    entries = {entry.key: entry for entry in table}
    beside = {} if alone else _beside(family, modules, pipeline.scheduler.config)
    twins = _last_layer(entries) if family == "sd2" else {}
    beside |= _head(modules["text_encoder"], dtype) if twins else {}

    def tensor_of(key: str) -> Tensor:
        if key in beside:
            return beside[key]
        key = twins.get(key, key)
        names = entries[key].names
        weight = entries[key].pack([states[name] for name in names])
        return converted(weight, dtype or weight.dtype, f"{names[0]} of the pipeline")

    layout = {}
    for key, entry in entries.items():
        layout[key] = entry.pack([states[name].to("meta", dtype) for name in entry.names])
    layout |= {new: layout[old] for new, old in twins.items()}
    origin = alone.origin if alone else ORIGINAL
    header = {"format": "pt", **model_spec(pipeline, path.stem, origin), **(metadata or {})}
    stream_tensors(path, layout | beside, tensor_of, header)
    return path


def _states(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": weight
        for part, module in modules.items()
        for name, weight in module.state_dict().items()
    }


def _family(pipeline: Pipeline) -> str:
    unet = getattr(pipeline, "unet", None)
    if isinstance(pipeline, StableDiffusionXLPipeline):
        return "sdxl"
    if not isinstance(pipeline, StableDiffusionPipeline) or unet is None:
        raise ErasureError(
            f"a {type(pipeline).__name__} cannot be written as a single file; only a pipeline of "
            "a supported family can"
        )
    return sd_family(unet.config)


def _beside(
    family: str, modules: Mapping[str, ldm.Network], schedule: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Keys of the originals beside weights: CLIP's position ids, and the flags that mark v
    prediction."""
    tensors = {}
    for component, (layout, prefix) in ldm.TEXTS[family].items():
        if layout == "clip":
            length = modules[component].config.max_position_embeddings
            tensors[prefix + "embeddings.position_ids"] = torch.arange(length)[None]
    if schedule.get("prediction_type") == "v_prediction":
        flags = ("v_pred", "ztsnr") if schedule.get("rescale_betas_zero_snr") else ("v_pred",)
        tensors |= {flag: torch.empty(0) for flag in flags}
    return tensors


def _last_layer(entries: Mapping[str, ldm.Entry]) -> dict[str, str]:
    """Keys of the 24th layer of SD 2's text encoder -> those of the 23rd, where the pipeline has no
    more, as diffusers' has.

    Its output is never used, but ComfyUI and A1111 build the layer, and warn where it has no
    weights. sd-scripts fills it likewise.
    """
    last, missing = (
        f"{ldm.TEXTS['sd2']['text_encoder'][1]}transformer.resblocks.{i}." for i in (22, 23)
    )
    if any(key.startswith(missing) for key in entries):
        return {}
    return {missing + key.removeprefix(last): key for key in entries if key.startswith(last)}


def _head(text_encoder: ldm.Network, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Stand-ins of sd-scripts for the projection and temperature of OpenCLIP, which programs build
    and do not use."""
    prefix, width = ldm.TEXTS["sd2"]["text_encoder"][1], text_encoder.config.hidden_size
    dtype = dtype or text_encoder.dtype
    return {
        f"{prefix}text_projection": torch.ones(width, width, dtype=dtype),
        f"{prefix}logit_scale": torch.ones((), dtype=dtype),
    }
