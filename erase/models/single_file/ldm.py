"""The LDM layout: which key of a single-file checkpoint holds which weight of a diffusers pipeline.

The table is derived from the configuration of the modules, so it holds for every width and depth.
The names are those of the original programs: CompVis/latent-diffusion (`openaimodel.py`,
`diffusionmodules/model.py`), Stability-AI/stablediffusion and generative-models
(`encoders/modules.py`), openai/CLIP and OpenCLIP (`transformer.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from erase.prompts.errors import ErasureError

Form = Literal["same", "conv1x1", "transposed", "stacked", "swapped"]
# a module of diffusers or transformers: its config is an attribute made at run time, which no type
# checker sees
Network = Any

UNET, VAE = "model.diffusion_model.", "first_stage_model."
BEFORE = (UNET, "diffusion_model.", "")
"""what may stand before the keys of a transformer: ComfyUI's and ai-toolkit's files have a part of
the prefix"""
TEXTS = {
    "sd1": {"text_encoder": ("clip", "cond_stage_model.transformer.text_model.")},
    "sd2": {"text_encoder": ("open_clip", "cond_stage_model.model.")},
    "sdxl": {
        "text_encoder": ("clip", "conditioner.embedders.0.transformer.text_model."),
        "text_encoder_2": ("open_clip", "conditioner.embedders.1.model."),
    },
}
"""family -> text encoder -> (its layout, the prefix of its keys)"""

UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.attentions.0": "middle_block.1",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP_ENDS = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a single file, and the weight or the weights that it holds."""

    key: str
    """in the file"""
    names: tuple[str, ...]
    """`component.parameter` in the pipeline; query, key and value where the file stacks them"""
    form: Form = "same"
    """how the values lie in the file: as they are, as a 1x1 convolution, transposed, stacked along
    the first axis, or with that axis's halves exchanged"""
    rows: tuple[int, ...] = ()
    """of each of several that are stacked; none: as many of each of three"""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the file of a weight (or the first of several) of this shape."""
        match self.form:
            case "conv1x1":
                return (*shape, 1, 1)
            case "transposed":
                return shape[::-1]
            case "stacked":
                return (sum(self.rows) or 3 * shape[0], *shape[1:])
        return shape

    def pack(self, weights: list[Tensor]) -> Tensor:
        """Weights of the pipeline as one tensor of the file."""
        match self.form:
            case "conv1x1":
                return weights[0][..., None, None]
            case "transposed":
                return weights[0].T.contiguous()
            case "stacked":
                return torch.cat(weights)
            case "swapped":
                return torch.cat(weights[0].chunk(2)[::-1])
        return weights[0]

    def unpack(self, tensor: Tensor) -> list[Tensor]:
        """A tensor of the file as weights of the pipeline; each owns its memory if the tensor
        does."""
        match self.form:
            case "conv1x1":
                return [tensor.reshape(tensor.shape[:2])]
            case "transposed":
                return [tensor.T.contiguous()]
            case "stacked":
                parts = tensor.split(self.rows) if self.rows else tensor.chunk(3)
                return [part.clone() for part in parts]
            case "swapped":
                return [torch.cat(tensor.chunk(2)[::-1])]
        return [tensor]


def table(family: str, modules: Mapping[str, Network]) -> list[Entry]:
    """Every weight of the modules (`unet`, `vae`, `text_encoder`, ...) exactly once, in their
    order.

    Raises:
        ErasureError: a weight for which the layout has no key, or two for one key.
    """
    unet = modules["unet"]
    entries = list(_renamed("unet", unet, UNET, unet_places(unet.config)))
    entries += vae_table(modules["vae"]) if "vae" in modules else []
    for component, (layout, prefix) in TEXTS[family].items():
        entries += (_clip if layout == "clip" else _open_clip)(
            component, modules[component], prefix
        )
    if len({entry.key for entry in entries}) != len(entries):
        raise ErasureError(
            "this architecture gives two weights the same key in the single-file layout; export a "
            "folder instead"
        )
    return entries


def vae_table(vae: Network) -> list[Entry]:
    """Every weight of a VAE, in its order."""
    return [_as_convolution(entry) for entry in _renamed("vae", vae, VAE, vae_places(vae.config))]


def ema_table(entries: Iterable[Entry]) -> list[Entry]:
    """The same table, with the UNet taken from the moving average (`LitEma` drops the dots of a
    name)."""
    return [
        replace(entry, key="model_ema." + entry.key.removeprefix("model.").replace(".", ""))
        if entry.key.startswith(UNET)
        else entry
        for entry in entries
    ]


def unet_places(config: Mapping[str, Any]) -> dict[str, str]:
    """Module of the UNet -> its place under `model.diffusion_model.`; modules inside an attention
    keep their names.

    The original counts blocks through: each level is `layers_per_block` layers and a down-sampler
    going down, one layer more going up, where the up-sampler stands in the last layer, behind its
    attention if there is one.
    """
    places, step = dict(UNET_ENDS), config["layers_per_block"] + 1
    for i, place in ((0, "middle_block.0"), (1, "middle_block.2")):
        places |= _inside(f"mid_block.resnets.{i}", place, UNET_RESNET)
    for level in range(len(config["down_block_types"])):
        for i in range(step - 1):
            place = f"input_blocks.{1 + level * step + i}"
            places |= _inside(f"down_blocks.{level}.resnets.{i}", f"{place}.0", UNET_RESNET)
            places[f"down_blocks.{level}.attentions.{i}"] = f"{place}.1"
        places[f"down_blocks.{level}.downsamplers.0.conv"] = (
            f"input_blocks.{(level + 1) * step}.0.op"
        )
    for level, kind in enumerate(config["up_block_types"]):
        for i in range(step):
            place = f"output_blocks.{level * step + i}"
            places |= _inside(f"up_blocks.{level}.resnets.{i}", f"{place}.0", UNET_RESNET)
            places[f"up_blocks.{level}.attentions.{i}"] = f"{place}.1"
        places[f"up_blocks.{level}.upsamplers.0.conv"] = (
            f"{place}.{2 if 'Attn' in kind else 1}.conv"
        )
    return places


def unet_module(config: Mapping[str, Any], name: str) -> str:
    """The place of one module of the UNet under `model.diffusion_model.`.

    Raises:
        ErasureError: the layout has none for it.
    """
    return _place("unet", name, unet_places(config))


def vae_places(config: Mapping[str, Any]) -> dict[str, str]:
    """Module of the VAE -> its place under `first_stage_model.`; the decoder's levels are counted
    from the finest."""
    levels, layers = len(config["up_block_types"]), config["layers_per_block"]
    places = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        places |= _inside(
            half, half, {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
        )
        places |= _inside(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", VAE_ATTENTION)
        for i in (0, 1):
            places |= _inside(
                f"{half}.mid_block.resnets.{i}", f"{half}.mid.block_{i + 1}", VAE_RESNET
            )
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for i in range(layers):
            places |= _inside(f"{down}.resnets.{i}", f"encoder.down.{level}.block.{i}", VAE_RESNET)
        for i in range(layers + 1):
            places |= _inside(f"{up}.resnets.{i}", f"decoder.up.{level}.block.{i}", VAE_RESNET)
        places[f"{down}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        places[f"{up}.upsamplers.0.conv"] = f"decoder.up.{level}.upsample.conv"
    return places


def _inside(ours: str, theirs: str, parts: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{mine}": f"{theirs}.{other}" for mine, other in parts.items()}


def _renamed(
    component: str, module: Network, prefix: str, places: Mapping[str, str]
) -> Iterator[Entry]:
    for name in module.state_dict():
        yield Entry(prefix + _place(component, name, places), (f"{component}.{name}",))


def _place(component: str, name: str, places: Mapping[str, str]) -> str:
    """The name with its longest known beginning replaced."""
    head, tail = name, ""
    while head:
        if head in places:
            return places[head] + tail
        head, dot, last = head.rpartition(".")
        tail = dot + last + tail
    raise ErasureError(
        f"the single-file layout has no key for {component}.{name}; export a diffusers folder "
        "instead"
    )


def _as_convolution(entry: Entry) -> Entry:
    """The originals write the linear layers of the VAE's attention as 1x1 convolutions."""
    return (
        replace(entry, form="conv1x1")
        if re.search(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$", entry.key)
        else entry
    )


def _clip(component: str, module: Network, prefix: str) -> list[Entry]:
    """CLIP as transformers names it; `text_model.` stands before each name in some versions of
    transformers, not in all."""
    return [
        Entry(prefix + name.removeprefix("text_model."), (f"{component}.{name}",))
        for name in module.state_dict()
    ]


def _open_clip(component: str, module: Network, prefix: str) -> list[Entry]:
    """CLIP as OpenCLIP names it: query, key and value stacked in one `in_proj`, the text projection
    transposed."""
    places = dict(OPEN_CLIP_ENDS)
    for i in range(module.config.num_hidden_layers):
        places |= _inside(f"encoder.layers.{i}", f"transformer.resblocks.{i}", OPEN_CLIP_LAYER)
    entries: list[Entry] = []
    stacks: dict[str, dict[str, str]] = {}
    for name in module.state_dict():
        bare, full = name.removeprefix("text_model."), f"{component}.{name}"
        part = re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", bare)
        if part:
            stacks.setdefault(f"transformer.resblocks.{part[1]}.attn.in_proj_{part[3]}", {})[
                part[2]
            ] = full
        else:
            form: Form = "transposed" if bare == "text_projection.weight" else "same"
            entries.append(Entry(prefix + _place(component, bare, places), (full,), form))
    for key, parts in stacks.items():
        entries.append(Entry(prefix + key, (parts["q"], parts["k"], parts["v"]), "stacked"))
    return entries


def bare(key: str) -> str:
    """The key of a transformer's weight without what of `BEFORE` stands before it."""
    return key.removeprefix(next(prefix for prefix in BEFORE if key.startswith(prefix)))


SCHEDULE = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "logvar",
    "scale_factor", "denoiser.sigmas",
)  # fmt: skip


def spare_keys(family: str, modules: Mapping[str, Network]) -> re.Pattern[str]:
    """The keys of the originals that hold nothing which the pipeline uses.

    They are the noise schedule, which every program computes from its configuration; the moving
    average; CLIP's position ids, contrastive temperature and, where no pooled text is used, its
    projection; the last layer of SD 2's text encoder, which attends to the layer before it (so
    diffusers' configuration has 23 of its 24); the flags of v prediction.
    """
    keys = [re.escape(key) for key in SCHEDULE] + [r"model_ema\..*", "v_pred", "ztsnr"]
    keys.append(r"(cond_stage_model|conditioner)\.(.*\.)?(position_ids|logit_scale|attn_mask)")
    keys.append(r"(cond_stage_model|conditioner\.embedders\.0)\.(.*\.)?text_projection(\.weight)?")
    if family == "sd2":
        last = modules["text_encoder"].config.num_hidden_layers
        keys.append(rf"cond_stage_model\.model\.transformer\.resblocks\.{last}\..*")
    return re.compile("|".join(keys))
