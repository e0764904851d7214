"""What is done to a device around the calls that are timed."""

from __future__ import annotations

import gc

import torch


def free(device: torch.device) -> None:
    """Gives back the memory of what nobody holds any longer."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
