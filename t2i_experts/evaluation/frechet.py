"""The Frechet distance between two sets of features taken for normal distributions (Heusel et al., arXiv 1706.08500, eq. 6), and its
extrapolation to infinitely many samples (Chong and Forsyth, arXiv 1911.07023).

    d^2 = |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)

With factors C = L L^T, the last trace is the sum of the singular values of L1^T L2. So no matrix square root is taken, and nothing complex
can come out. Where both covariances have full rank, these are the roots of the eigenvalues of the symmetric L1^T C2 L1, which are several
times as fast to get. Where one has not, as with fewer images than dimensions, that would take the roots of rounding errors, so that the
singular values themselves are computed, of a matrix that is no larger than the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from t2i_experts.evaluation.statistics import FeatureStatistics, Gaussian

FEWEST_TO_EXTRAPOLATE = 30
"""Images that `frechet_infinity` needs: fewer do not give fifteen different counts from a half to all."""

_SINGULAR = 1e-12
"""A covariance with a pivot below this share of the largest is taken for singular."""


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """The squared distance d^2, which is what FID reports. mean: (D,), cov: (D, D), any float dtype; computed in float64 on the CPU.

    Raises ValueError for sets of different dimensions, NaN, and what is no covariance.
    """
    return gaussian_distance(Gaussian.checked(mean1, cov1, "the first set"), Gaussian.checked(mean2, cov2, "the second set"))


def gaussian_distance(first: Gaussian, second: Gaussian) -> float:
    """`frechet_distance` of two normal distributions, through the factors that they bring."""
    if len(first.mean) != len(second.mean):
        raise ValueError(f"the first set has features of {len(first.mean)} dimensions, the second of {len(second.mean)}")
    overlap = _overlap(_Factor.of(first, "the first set"), _Factor.of(second, "the second set"), second.covariance)
    traces = first.covariance.trace() + second.covariance.trace()
    return max(0.0, float((first.mean - second.mean).square().sum() + traces - 2 * overlap))


@dataclass(frozen=True)
class InfiniteFrechet:
    """value: the distance that a straight line through (1 / count, distance) has at 1 / count = 0. error: its standard error, from how
    far the points lie off the line; not that of other images, since all points are made of the same ones. counts, distances: the points."""

    value: float
    error: float
    counts: tuple[int, ...]
    distances: tuple[float, ...]


def frechet_infinity(
    features: Tensor, reference: Gaussian, *, points: int = 15, fewest: int | None = None, seed: int = 0
) -> InfiniteFrechet:
    """The distance that infinitely many images would have from `reference`, whose own count stays as it is.

    features: (N, D) of the images to be judged. points: numbers of images, evenly spaced from `fewest` (5000, or N / 2 if that is less)
    to N, each drawn at random without replacement. Raises ValueError for too few images.
    """
    total = len(features)
    fewest = min(5000, total // 2) if fewest is None else fewest
    if not 2 <= fewest <= total - points or points < 3:
        raise ValueError(f"{total} images are too few for {points} different counts from {fewest} on; {FEWEST_TO_EXTRAPOLATE} are enough")
    random = np.random.default_rng(seed)
    counts = np.unique(np.linspace(fewest, total, points).round().astype(int)).tolist()
    distances = []
    for count in counts:
        statistics = FeatureStatistics(features.shape[1])
        statistics.add(features[torch.from_numpy(random.permutation(total)[:count])].cpu())
        distances.append(gaussian_distance(statistics.gaussian(), reference))
    line = np.stack([np.ones(len(counts)), 1 / np.array(counts)], axis=1)
    solution = np.linalg.lstsq(line, np.array(distances), rcond=None)[0]
    residual = np.array(distances) - line @ solution
    covariance = np.linalg.inv(line.T @ line) * (residual @ residual) / (len(counts) - 2)
    return InfiniteFrechet(float(solution[0]), float(covariance[0, 0] ** 0.5), tuple(counts), tuple(distances))


@dataclass(frozen=True)
class _Factor:
    """matrix: (D, R) with covariance = matrix matrix^T. full: whether that covariance has full rank for certain."""

    matrix: Tensor
    full: bool

    @staticmethod
    def of(gaussian: Gaussian, what: str) -> _Factor:
        """Raises ValueError for a matrix with negative eigenvalues, which is no covariance."""
        if gaussian.factor is not None:
            return _Factor(gaussian.factor, False)
        lower, failed = torch.linalg.cholesky_ex(gaussian.covariance)
        pivots = lower.diagonal().square()
        if not failed and pivots.min() > _SINGULAR * pivots.max():
            return _Factor(lower, True)
        values, vectors = torch.linalg.eigh(gaussian.covariance)
        largest = values[-1].clamp_min(0)
        if values[0] < -1e-5 * largest or (largest == 0 and values[0] < 0):
            raise ValueError(f"{what}: its covariance has the negative eigenvalue {float(values[0]):.3g}")
        kept = values > len(values) * torch.finfo(values.dtype).eps * largest
        return _Factor(vectors[:, kept] * values[kept].sqrt(), False)


def _overlap(first: _Factor, second: _Factor, covariance: Tensor) -> Tensor:
    """tr (C1 C2)^(1/2), where `covariance` is C2."""
    if first.full and second.full:
        return torch.linalg.eigvalsh(first.matrix.T @ covariance @ first.matrix).clamp_min_(0).sqrt_().sum()
    return torch.linalg.svdvals(first.matrix.T @ second.matrix).sum()
