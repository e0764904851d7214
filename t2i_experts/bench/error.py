"""How far results are from those that float32 gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def exact_float32() -> Iterator[None]:
    """Convolutions and matrix products of float32 tensors in float32, not in TF32, by kernels that nobody spends time to choose."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.benchmark, products.allow_tf32
    cudnn.allow_tf32 = cudnn.benchmark = products.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark, products.allow_tf32 = before


def relative_rms(found: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """Root mean square of the differences over that of the references, over all values of all tensors."""
    off = size = 0.0
    for value, reference in zip(found, references, strict=True):
        off += float((value.double() - reference.double()).square().sum())
        size += float(reference.double().square().sum())
    return (off / size) ** 0.5
