"""The shell loop of docs/sweeps.md: the parsers take its commands, which share what they say."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

from erase.scripts import run_erase, run_evaluate
from erase.scripts.cli import parse

DOC = Path(__file__).parents[1] / "docs" / "sweeps.md"
ECHO = (
    'erase-concept() { echo "erase-concept $*"; }; erase-evaluate() { echo "erase-evaluate $*"; }'
)


def commands() -> list[list[str]]:
    """The words of every command that the loop runs, in order."""
    (loop,) = re.findall(r"```sh\n(.*?)```", DOC.read_text(encoding="utf-8"), re.S)
    names = re.sub(r"erase-(concept|evaluate)", r"erase_\1", ECHO + "\n" + loop)
    done = subprocess.run(["sh", "-c", names], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_each_run_of_the_loop_takes_its_latents_and_statistics_from_the_first_of_its_seed(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for seed in range(3):  # what the first runs leave
        folder = tmp_path / "runs" / "sweep" / f"seed{seed}-first"
        folder.mkdir(parents=True)
        (folder / "saliency.safetensors").touch()
    erasures = [words[1:] for words in commands() if words[0] == "erase_concept"]
    runs = [parse(run_erase.make_parser("salun"), words) for words in erasures]
    assert len(runs) == 3 * (1 + 3 * 2) and len({run.out for run in runs}) == len(runs)
    assert len({run.latents.cache for run in runs}) == 1

    first = {run.seed: run.out for run in runs if run.mask.saliency is None}
    assert len(first) == 3
    for run in runs:
        if run.mask.saliency:
            assert run.mask.saliency == f"{first[run.seed]}/saliency.safetensors"
    swept = {(run.mask.density, run.train.lr) for run in runs if run.mask.saliency}
    assert len(swept) == 3 * 2


def test_each_run_of_the_loop_but_the_first_is_evaluated_beside_one_base():
    given = [words[1:] for words in commands() if words[0] == "erase_evaluate"]
    scored = [parse(run_evaluate.make_parser({}), words) for words in given]
    assert len({each.delta for each in scored}) == 3 * 3 * 2
    assert len({each.base_images for each in scored}) == 1
