"""What is done to a device around the calls that are timed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def free(device: torch.device) -> None:
    """Gives back the memory of what nobody holds any longer."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def cudnn_attention(allowed: bool) -> Iterator[None]:
    """Whether PyTorch may choose cuDNN's attention by itself for what is called or compiled in here: yes by default, no in training."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
