"""The formats that erased weights are exported in, and how each is loaded: the code that its model
card shows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from erase.models import DiffusionModel
from erase.models.pipelines import stock
from erase.models.single_file.layouts import layout_of
from erase.models.single_file.spec import family_name, prediction
from erase.models.single_file.tensor_file import SINGLE_FILES
from erase.models.stock import Pipeline

FORMATS = {
    "diffusers": "a whole pipeline folder",
    "components": "only the folders of the components that changed",
    "single-file": "one checkpoint file in the original layout (A1111, ComfyUI); of SD 3 the "
    "transformer and the VAE, of FLUX, Z-Image and Qwen-Image the transformer",
    "lora": "a LoRA file, an approximation",
    "delta": "the changed values themselves, composed and rounded as asked",
}
FILES = {
    "single-file": "model.safetensors",
    "lora": "pytorch_lora_weights.safetensors",
    "delta": "delta.safetensors",
}
"""format -> name of its one file inside an exported folder; for a LoRA the one that diffusers looks
for"""


@dataclass(frozen=True)
class Usage:
    """The text of a model card on the files of an export."""

    about: str
    """the noun phrase for the files, after `This is`"""
    code: str
    """Python that makes `pipeline` of them; it has the placeholders path/to/this/folder and, where
    it is needed, path/to/base"""
    call: str = ""
    """what a call of `pipeline` must be told beside the prompt, as code"""
    relation: str = "finetune"
    """base_model_relation on the hub: finetune, or adapter for what does not work without its
    base"""
    library: str = "diffusers"
    tags: tuple[str, ...] = ()


DIFFUSERS = Usage(
    "a whole pipeline: it loads in stock diffusers, without the code that made it",
    """\
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder"{without})""",
)
COMPONENTS = Usage(
    "the erased {components} alone; the rest of the pipeline comes from the base",
    """\
{imports}

folder = "path/to/this/folder"
pipeline = {load_base}(
    "path/to/base",
{loads}
)""",
)
SINGLE_FILE = Usage(
    "one file in the layout that Stable Diffusion was published in, for A1111, ComfyUI and stock "
    "diffusers",
    """\
from diffusers import {pipeline}

pipeline = {pipeline}.from_single_file("path/to/this/folder/model.safetensors"{config})""",
)
TRANSFORMER = Usage(
    "the {held}, in the layout that it was published in, for ComfyUI ({place}) and stock "
    "diffusers; the rest of the pipeline comes from the base",
    """\
from diffusers import {pipeline}, {network}

transformer = {network}.from_single_file(
    "path/to/this/folder/model.safetensors", config="path/to/base", subfolder="transformer"
)
pipeline = {pipeline}.from_pretrained("path/to/base", transformer=transformer{without})""",
)
LORA = Usage(
    "a LoRA: the base with it is close to the erased model, and not the same (see Limits); loading "
    "it needs peft",
    """\
{import_base}

pipeline = {load_base}("path/to/base"{without})
pipeline.load_lora_weights("path/to/this/folder")""",
    relation="adapter",
    tags=("lora",),
)
DELTA = Usage(
    "a delta: the changed values and where they go, and nothing else; it needs "
    "concept-erasure-toolkit",
    """\
from erase.delta import ErasedDelta
from erase.delta.base import load_base

delta = ErasedDelta.load("path/to/this/folder/delta.safetensors")
pipeline = delta.apply(load_base(delta, "path/to/base")).pipeline()""",
    relation="adapter",
    library="concept-erasure-toolkit",
)
PREDICTED = {"sd2": "v_prediction"}
"""family -> what diffusers takes a single file of it to predict, where that is not epsilon"""
USAGES = {
    "diffusers": DIFFUSERS,
    "components": COMPONENTS,
    "single-file": SINGLE_FILE,
    "lora": LORA,
    "delta": DELTA,
}


def usage(format: str, model: DiffusionModel, components: list[str]) -> Usage:
    """How one of `FORMATS` is loaded, in the classes of this base; `components` are those that
    changed."""
    pipeline = type(model.pipeline()).__name__
    alone = layout_of(model.pipeline())
    one_file = Path(model.name).suffix.lower() in SINGLE_FILES and not alone
    base_class = pipeline if one_file else "DiffusionPipeline"
    classes = {name: type(model.component(name)) for name in components}
    imports = sorted(
        {
            ("diffusers", base_class),
            *((kind.__module__.split(".")[0], kind.__name__) for kind in classes.values()),
        }
    )
    lacking = _lacking(model.pipeline())
    texts = {
        "components": " and ".join(components),
        "imports": "\n".join(f"from {library} import {name}" for library, name in imports),
        "loads": "\n".join(
            f'    {name}={kind.__name__}.from_pretrained(f"{{folder}}/{name}"),'
            for name, kind in classes.items()
        )
        + "".join(f"\n    {name}=None," for name in lacking),
        "without": "".join(f", {name}=None" for name in lacking),
        "pipeline": pipeline,
        "network": alone.network if alone else "",
        "held": alone.held if alone else "",
        "place": alone.place if alone else "",
        "import_base": f"from diffusers import {base_class}",
        "load_base": f"{base_class}.{'from_single_file' if one_file else 'from_pretrained'}",
        "config": "" if one_file else ', config="path/to/base"',
    }
    template = TRANSFORMER if alone and format == "single-file" else USAGES[format]
    stated = stock(model.pipeline()).stated()
    code = template.code.format(**texts)
    if one_file and ".from_single_file(" in code:
        code += _prediction(model.pipeline())
    return replace(
        template,
        about=template.about.format(**texts),
        code=code,
        call="".join(f", {name}={value}" for name, value in stated.items()),
    )


def _prediction(pipeline: Pipeline) -> str:
    """Code that sets what a pipeline predicts, where diffusers takes a single file of its family
    for one that predicts something else."""
    own = prediction(pipeline.scheduler.config)
    if own == PREDICTED.get(family_name(pipeline), "epsilon"):
        return ""
    return f"""
pipeline.scheduler = pipeline.scheduler.from_config(
    pipeline.scheduler.config, prediction_type="{own}"
)"""


def _lacking(pipeline: Pipeline) -> list[str]:
    """Parts that the pipeline is without and that diffusers must be told so (SD 3's T5)."""
    optional = pipeline._optional_components
    return [
        name for name, part in pipeline.components.items() if part is None and name not in optional
    ]
