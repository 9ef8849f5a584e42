"""Generate the images of a prompt set: seeded row by row, resumable, split among processes by `accelerate launch`.

erase-generate --prompts canvas --out runs/base                            the shipped model, its whole answer set
erase-generate --prompts canvas --delta runs/heart/delta.safetensors --out runs/heart/images
erase-generate --model PATH --prompts i2p.csv --steps 50 --guidance 7.5 --out runs/i2p
accelerate launch --num_processes 4 scripts/run_generate.py --prompts prompts.csv --out runs/images
"""

from __future__ import annotations

import sys

from erase.delta import ErasedDelta
from erase.models import LoadConfig, load_model
from erase.processes import default_device
from eval.generate import GenerateConfig, generate
from prompts.prompt_sets import PromptSet, shipped_sets
from scripts.front import add_config, build, parse, parser, run


def main(argv: list[str] | None = None) -> None:
    """Parse, generate, say where the images are."""
    made = parser("erase-generate", __doc__)
    made.add_argument(
        "--model", type=str, default="canvas", help="canvas (shipped), a diffusers folder, a single file, or a hub id"
    )
    made.add_argument("--load", type=LoadConfig, default=LoadConfig(), help="how the checkpoint is read")
    made.add_argument("--delta", type=str | None, default=None, help="an erasure to apply to the model first")
    made.add_argument(
        "--prompts",
        type=str,
        default="canvas",
        help=f"a shipped set ({', '.join(shipped_sets())}), or a .csv (the field's columns) or .yaml file (templates)",
    )
    made.add_argument("--out", type=str, default="runs/images", help="folder of the images and their manifest")
    add_config(made, GenerateConfig())
    options = parse(made, argv)
    prompts = PromptSet.load(options.prompts)
    delta = ErasedDelta.load(options.delta) if options.delta else None
    model = load_model(options.model, default_device(), options.load)
    provenance = {"model": model.name, "delta": "none"}
    if delta:
        delta.apply(model)
        provenance["delta"] = delta.origin.method
    provenance["fingerprint"] = model.fingerprint
    images = generate(model.pipeline(), prompts, options.out, build(GenerateConfig, options), provenance)
    print(f"{options.out}: {len(images.rows)} images")


def cli() -> None:
    """The installed command."""
    sys.exit(run(main))


if __name__ == "__main__":
    cli()
