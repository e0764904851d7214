"""What the commands that measure pictures share: how fast they go, and what they say of the machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from t2i_experts.shards.parallel import cores

if TYPE_CHECKING:
    import torch


def check_pace(batch: int, workers: int | None) -> int:
    """The threads that decode pictures, this process's share of the cores if not given. Raises ValueError for less than one."""
    if workers is None:
        workers = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    for name, value in (("batch", batch), ("workers", workers)):
        if value < 1:
            raise ValueError(f"--{name}={value} must be at least 1")
    return workers


def machine(device: torch.device) -> dict[str, Any]:
    """What it was computed on and with. JPEG's decoder counts among the versions: others differ in the last bit."""
    from importlib.metadata import version

    from PIL import features

    from t2i_experts.bench.machine import describe

    packages = {name: version(name) for name in ("torch", "numpy", "pillow", "open-clip-torch")}
    return {"machine": describe(device), "versions": {**packages, "libjpeg-turbo": features.version("libjpeg_turbo")}}
