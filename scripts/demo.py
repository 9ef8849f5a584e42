"""Watch a diffusion model forget: erase, evaluate, report, export.

On the shipped model; minutes on a CPU.

the heart becomes a mushroom:
  erase-demo
any object, style or colour of the embedded world:
  erase-demo --concept Neon
"""

from __future__ import annotations

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

from erase.scripts import run_erase, run_evaluate, run_export
from erase.scripts.cli import Parser, alone, check_folder, parse, parser, run


def make_parser() -> Parser:
    """All options."""
    command = parser("erase-demo", __doc__)
    command.add_argument(
        "--concept",
        type=str,
        default="heart",
        help="an object, style or colour of the embedded world",
    )
    command.add_argument(
        "--anchor",
        type=str | None,
        default=None,
        help=(
            "what to put in its place; by default what prompts/data/canvas.yaml names, else the "
            "next of its kind"
        ),
    )
    command.add_argument(
        "--out",
        type=str | None,
        default=None,
        help="folder for everything; runs/demo-CONCEPT by default",
    )
    return command


def main(argv: list[str] | None = None) -> None:
    """Chain the three jobs on the shipped model, and say what can be looked at."""
    options = parse(make_parser(), argv)
    alone("erase-demo")
    check_folder(options.out or "")
    out = Path(options.out or f"runs/demo-{options.concept}")
    delta = str(out / "delta.safetensors")

    print(f"1/3  erasing {options.concept} from the shipped model")
    anchor = ["--anchor", options.anchor] if options.anchor else []
    run_erase.main(["--concept", options.concept, *anchor, "--out", str(out)])
    print("2/3  drawing the answer set before and after, and scoring both")
    run_evaluate.main(
        [
            "--delta",
            delta,
            "--generate.steps",
            "12",
            "--base_images",
            str(out / "base"),
            "--out",
            str(out / "report"),
        ]
    )
    print("3/3  exporting the erased weights")
    if (out / "model").exists():
        print(f"{out}/model is there already, and stays as it is")
    else:
        run_export.main(
            [
                "--delta",
                delta,
                "--report",
                str(out / "report" / "report.json"),
                "--out",
                str(out / "model"),
            ]
        )
    print(f"\nLook at {out}/report/report.html and {out}/report/before_after.png")
    print(f"Draw your own prompts, the base and the erased model side by side: {live(out)}")


def live(out: Path) -> str:
    """The live page's command, behind what it needs where that is not installed."""
    command = shlex.join(["erase-live", "--delta", str(out)])
    if find_spec("gradio"):
        return command
    return f"pip install 'concept-erasure-toolkit[live]' && {command}"


def cli() -> None:
    """The installed command."""
    sys.exit(run(main, resumes=True))


if __name__ == "__main__":
    cli()
