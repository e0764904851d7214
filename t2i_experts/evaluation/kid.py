"""The kernel distance between two sets of features (KID; Binkowski et al., arXiv 1801.01401): the unbiased squared MMD with the kernel
(x . y / D + 1)^3, over random subsets. Unlike a Frechet distance it has no bias from the number of images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from t2i_experts.evaluation.statistics import checked_pair


@dataclass(frozen=True)
class KernelDistance:
    """mean, spread: of the subsets, spread as their standard deviation. subsets, size: how many there were, and images in each."""

    mean: float
    spread: float
    subsets: int
    size: int


def kernel_distance(first: Tensor, second: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 2020) -> KernelDistance:
    """first: (N, D), second: (M, D). Subsets have `size` images, or all of the smaller set; the draws are those of torch-fidelity.

    Slightly negative values are right for sets of one distribution. Raises ValueError for features that are not such a pair, or fewer
    than two images or one subset.
    """
    checked_pair(first, second)
    size = min(size, len(first), len(second))
    if size < 2 or subsets < 1:
        raise ValueError(f"{subsets} subsets of {size} images: at least 1 subset of 2 images is needed")
    random = np.random.RandomState(seed)
    distances = np.empty(subsets)
    for i in range(subsets):
        x, y = (features[torch.from_numpy(random.choice(len(features), size, replace=False))].double() for features in (first, second))
        distances[i] = _squared_mmd(x, y)
    return KernelDistance(float(distances.mean()), float(distances.std()), subsets, size)


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    """Of two sets of n features, (n, D) each; an image is not compared with itself."""
    n = len(x)
    within = sum((kernel.sum() - kernel.trace()) / (n * (n - 1)) for kernel in (_kernel(x, x), _kernel(y, y)))
    return float(within - 2 * _kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
