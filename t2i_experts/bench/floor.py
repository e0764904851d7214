"""What the machine can do at best, measured in the same run: its matrix rate, its memory's bandwidth, and the operations of a module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from t2i_experts.bench.timing import interleave


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int | None = None, repeats: int = 20) -> float:
    """FLOP/s of a product of two square matrices; their side is by default 8192 on CUDA and 1024 elsewhere."""
    side = side or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / interleave({"product": lambda: a @ b}, device, repeats=repeats)["product"].median


def bandwidth(device: torch.device, repeats: int = 20) -> float:
    """Bytes/s of a copy, read and written bytes counted: 1 GiB on CUDA, 64 MiB elsewhere."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / interleave({"copy": lambda: target.copy_(source)}, device, repeats=repeats)["copy"].median


def flops(forward: Callable[[], object]) -> int:
    """Floating-point operations of matrix products, convolutions and attention in a call without gradients (2 for a multiply-add)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return int(counter.get_total_flops())
