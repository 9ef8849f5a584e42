"""Whether another version of diffusers and transformers draws what this one draws of a folder.

  python scripts/bench/check_readers.py draw FOLDER --out here.npy
      in this environment
  OTHER/bin/python scripts/bench/check_readers.py draw FOLDER --out other.npy
      in another one, which needs nothing of this toolkit
  python scripts/bench/check_readers.py compare here.npy other.npy
      the relative error; exit code 1 if it is above 1e-4

FOLDER is what `erase-export` wrote, or `erase/models/canvas`. Not part of the tests, since it needs
further environments, such as `pip install torch diffusers==0.30.3 transformers==4.44.2`.
docs/formats.md has the versions that were compared.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np


def draw(folder: str, out: str, prompt: str) -> None:
    """Write the pixels of one image, shape (H, W, 3), drawn by the code of the card and without any
    argument of precision."""
    import diffusers
    import torch
    import transformers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    pixels = pipeline(prompt, num_inference_steps=4, generator=generator, output_type="np").images[
        0
    ]
    np.save(out, pixels)
    print(f"diffusers {diffusers.__version__}, transformers {transformers.__version__}: {out}")


def compare(one: str, other: str) -> float:
    """||one - other|| / ||one||."""
    a, b = np.load(one).astype(float), np.load(other).astype(float)
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def main() -> int:
    """Run one job; the exit code says whether it agreed."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    jobs = parser.add_subparsers(dest="job", required=True)
    drawing = jobs.add_parser("draw")
    drawing.add_argument("folder")
    drawing.add_argument("--out", required=True)
    drawing.add_argument("--prompt", default="a red heart")
    comparing = jobs.add_parser("compare")
    comparing.add_argument("one")
    comparing.add_argument("other")
    options = parser.parse_args()

    if options.job == "draw":
        draw(options.folder, options.out, options.prompt)
        return 0
    error = compare(options.one, options.other)
    print(f"relative error {error:.1e}")
    return int(not error < 1e-4)


if __name__ == "__main__":
    sys.exit(main())
