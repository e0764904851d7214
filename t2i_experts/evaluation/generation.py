"""Pictures for a list of prompts, batch by batch, straight from the sampler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from t2i_experts.cascade.pipeline import CascadePipeline
from t2i_experts.config import SamplingConfig


def draw(
    pipeline: CascadePipeline,
    prompts: Sequence[str],
    *,
    indices: Sequence[int] | None = None,
    seed: int = 0,
    sampling: SamplingConfig | None = None,
    batch_size: int = 64,
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """(indices, pictures as (B, 3, H, W) uint8 on the CPU) of each batch, rounded as `generate` saves them.

    indices: of which of the prompts, all by default. The picture of prompts[i] starts from the noise of (seed, i), whatever its batch is.
    Raises ValueError, which names the prompt, where a picture is not finite: rounding would hide it.
    """
    indices = range(len(prompts)) if indices is None else indices
    finite = torch.ones(0, dtype=torch.bool)

    def look(done: int, steps: int, denoised: Tensor) -> None:
        nonlocal finite
        if done == steps:
            finite = denoised.isfinite().flatten(1).all(1)

    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        images = pipeline([prompts[i] for i in batch], seed=seed, indices=batch, sampling=sampling, progress=look)
        for i, fine in zip(batch, finite.tolist(), strict=True):
            if not fine:
                raise ValueError(f"picture {i}, {prompts[i]!r}: the model gave NaN or infinity; in float32 it may not")
        yield batch, images
