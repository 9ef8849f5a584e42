"""What an erasure cost: seconds, peak memory and bytes on disk, as UnlearnCanvas tables them."""

from __future__ import annotations

import json
from pathlib import Path

from erase.delta import ErasedDelta
from erase.files import errors_named


def cost_of(delta: ErasedDelta) -> dict[str, float]:
    """As far as the delta's folder tells: `delta_bytes`, the size of its file; `seconds` and
    `peak_memory_bytes` of the method, as its run wrote them into `training.json`.

    Raises:
        ErasureError: that file is damaged.
    """
    file, cost = Path(delta.source), dict[str, float]()
    if not file.is_file():
        return cost
    cost["delta_bytes"] = file.stat().st_size
    training = file.parent / "training.json"
    with errors_named(training, "delete it to report without the costs, or erase again"):
        record = json.loads(training.read_text(encoding="utf-8")) if training.exists() else {}
        if record.get("delta_sha256") == delta.sha256:
            cost |= {name: float(value) for name, value in record.get("cost", {}).items()}
    return cost
