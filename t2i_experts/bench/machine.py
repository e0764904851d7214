"""What a benchmark runs on."""

from __future__ import annotations

import platform
from typing import Any

import torch

from t2i_experts import __version__
from t2i_experts.cascade.device import open_device
from t2i_experts.shards.parallel import cores


def bench_device(name: str | None) -> torch.device:
    """The named device, or CUDA if there is one, or the CPU. Raises ValueError for one that is not to be had."""
    device = open_device(name or ("cuda" if torch.cuda.is_available() else "cpu"), f"--device={name!r}")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # whose streams and events the timings are taken with
    return device


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and the versions that a result belongs to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "CPU cores": cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "t2i-experts": __version__,
    }
