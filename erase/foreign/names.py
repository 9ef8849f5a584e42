"""The names under which other programs write the weights of a pipeline, and which weight each of
them means.

A file may name its weights as diffusers and transformers do or as the original programs do (the
LDM layout), whole (`unet.`, `model.diffusion_model.`, `cond_stage_model.transformer.`) or with any
part of that beginning left off. The table is made of the base's own modules, so a name either is
one of its weights or is none: nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from erase.models import DiffusionModel
from erase.models.naming import former_prefix, named_layers, named_weights
from erase.models.pipelines import Pipeline, modules
from erase.models.single_file import ldm
from erase.models.single_file.layouts import layout_of
from erase.models.single_file.spec import family_name

Places = dict[str, list[ldm.Entry]]
"""name in a file -> the weights that it may mean: one, or those of several text encoders"""
OLD_VAE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""layers of the VAE's attention -> their names in diffusers before 0.17"""
STORED = {"model.language_model.": "model.", "model.visual.": "visual."}
"""beginnings of names of Qwen2.5-VL in memory -> those that transformers writes"""


def places(model: DiffusionModel) -> Places:
    """Every name that a file may have for a weight of the model or of its VAE."""
    pipeline = model.pipeline()
    found: Places = {}
    for entry in (*_diffusers(pipeline), *_original(pipeline)):
        known = found.setdefault(entry.key, [])
        if entry.names not in [other.names for other in known]:
            known.append(entry)
    return found


def _diffusers(pipeline: Pipeline) -> Iterator[ldm.Entry]:
    for component, module in modules(pipeline).items():
        for name, _ in weights_of(module):
            for key in _spellings(component, name):
                yield ldm.Entry(key, (f"{component}.{name}",))


def weights_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a file may hold of a module: its parameters, and statistics (FLUX.2's VAE's)."""
    yield from named_weights(module)
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            yield name, buffer


def _spellings(component: str, name: str) -> list[str]:
    """A weight's names in the files of diffusers: with its component's name and without."""
    if not component.startswith("text_encoder"):
        old = name
        if component == "vae":
            for new, before in OLD_VAE.items():
                old = old.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        prefixes = (f"{component}.", *(ldm.BEFORE if component == "transformer" else ("",)))
        return [f"{prefix}{one}" for prefix in prefixes for one in {name, old}]

    bare = name.removeprefix("text_model.")
    spelt = [f"text_model.{bare}", bare]
    for inside, stored in STORED.items():
        if bare.startswith(inside):
            spelt.append(stored + bare.removeprefix(inside))
    if bare.startswith("embeddings."):  # as AdvUnlearn's wrapper calls them
        spelt.append("embedding." + bare.removeprefix("embeddings."))
    # `transformer` is the encoder within the original programs' wrapper
    return [f"{prefix}{one}" for prefix in (f"{component}.", "transformer.", "") for one in spelt]


def _original(pipeline: Pipeline) -> Iterator[ldm.Entry]:
    family, parts = family_name(pipeline), modules(pipeline)
    if layout := layout_of(pipeline):
        held = {f"{part}.{name}" for part in parts for name, _ in named_weights(parts[part])}
        for prefix in ldm.BEFORE:
            entries = [_lasting(entry, parts) for entry in layout.entries(parts, prefix)]
            yield from (entry for entry in entries if entry.names[0] in held)
    if family not in ldm.TEXTS:
        return
    prefixes = [ldm.UNET, ldm.VAE, *(prefix for _, prefix in ldm.TEXTS[family].values())]
    for entry in ldm.table(family, parts):
        prefix = next(prefix for prefix in prefixes if entry.key.startswith(prefix))
        for key in _shortened(entry.key, prefix):
            yield replace(_lasting(entry, parts), key=key)


def _lasting(entry: ldm.Entry, parts: Mapping[str, nn.Module]) -> ldm.Entry:
    """The entry with the names of the model's own parameters."""
    names = []
    for full in entry.names:
        part, _, name = full.partition(".")
        names.append(f"{part}.{name.removeprefix(former_prefix(parts[part]))}")
    return replace(entry, names=tuple(names))


def _shortened(key: str, prefix: str) -> list[str]:
    """The key with each word of its prefix left off in turn, from the first."""
    words, rest = prefix.rstrip(".").split("."), key.removeprefix(prefix)
    return [".".join([*words[i:], rest]) for i in range(len(words) + 1)]


def layers(model: DiffusionModel, known: Places) -> Places:
    """Every name that a LoRA may have for a layer of the model, with the layer's weight, or the
    weights that a file stacks in one.

    These are the weights' own names without `.weight`, and kohya's: `lora_unet_`, `lora_te_`,
    `lora_te1_` or `lora_te2_` before one of these, its dots turned into `_`.
    """
    held = _held(model)
    found: Places = {}
    for key, entries in known.items():
        mine = [entry for entry in entries if held.issuperset(entry.names)]
        if not mine or not key.endswith(".weight"):
            continue
        layer = key.removesuffix(".weight")
        found[layer] = mine
        for entry in mine:
            for prefix in KOHYA.get(entry.names[0].split(".")[0], ()):
                same = found.setdefault(prefix + layer.replace(".", "_"), [])
                if entry.names not in [other.names for other in same]:
                    same.append(entry)
    return found


KOHYA: Mapping[str, tuple[str, ...]] = {
    "unet": ("lora_unet_",),
    "transformer": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}


def _held(model: DiffusionModel) -> set[str]:
    """Names of the weights of linear and convolutional layers."""
    names = set()
    for component in {name.split(".")[0] for name in model.parameters()}:
        for name, module in named_layers(model.component(component)):
            if isinstance(module, nn.Linear | nn.Conv2d):
                names.add(f"{component}.{name}.weight")
    return names
