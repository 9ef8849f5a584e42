"""Each family at its full size, on random weights: minutes and up to 24 GB of memory, so only with
`-m slow`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd3", "klein"])
def test_an_erasure_of_the_real_size_stays_within_20_gb(family, tmp_path):
    """Load, mask, one step on small images, delta, export: every weight of the real architecture
    passes through, whatever the images' size. klein has more weights than that; its file is mapped
    while it is read, and counts."""
    flags = [
        "--family",
        family,
        "--scope",
        "xattn_kv",
        "--size",
        "128",
        "--folder",
        tmp_path,
        "--json",
        tmp_path / "figures.json",
    ]
    flags += ["--checkpointing"] if family == "klein" else []
    subprocess.run(
        [sys.executable, str(ROOT / "scripts/bench/full_size.py"), *map(str, flags)],
        check=True,
        cwd=ROOT,
    )
    stages = json.loads((tmp_path / "figures.json").read_text())["stages"]
    assert [row["stage"] for row in stages] == [
        "load",
        "statistics and mask, benefit",
        "one training step",
        "delta",
        "apply and export",
    ]
    assert stages[-1]["peak_host_gb"] < (24 if family == "klein" else 20)
