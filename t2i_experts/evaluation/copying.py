"""Do generated pictures lie nearer to the training pictures than they should? Real pictures that were not trained on say what they should.

Two questions, both answered by ranks alone, given the training set. Of all pictures together: the statistic of Meehan, Chaudhuri and
Dasgupta (arXiv 2004.05675), the z-score of Mann and Whitney's U, in one cell. A few copies among many pictures do not move it; for them,
the share that lies nearer than all but one in a hundred of the real ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

QUANTILE = 0.01
"""Of the held-out pictures' distances: what is nearer counts as suspiciously near."""

Distances = NDArray[np.floating]


@dataclass(frozen=True)
class Copying:
    """z: below zero if generated pictures are nearer than held-out ones, above if they are further, of unit variance if they are alike.

    p: the chance of such a z or a lower one if they are alike. further: the chance that a generated picture is further than a held-out one;
    0.5 if they are alike.
    """

    z: float
    p: float
    further: float


def copying(generated: Distances, held_out: Distances) -> Copying:
    """(M,) and (N,) distances to the nearest training picture. Raises ValueError if there are none of one kind."""
    m, n = _counts(generated, held_out)
    _, places, counts = np.unique(np.concatenate([generated, held_out]), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]  # equal distances share the mean of their ranks
    above = float(ranks[:m].sum()) - m * (m + 1) / 2  # pairs of which the generated picture is further
    ties = float((counts.astype(float) ** 3 - counts).sum())
    total = m + n
    variance = m * n / 12 * (total + 1 - ties / (total * (total - 1)))
    z = (above - m * n / 2) / math.sqrt(variance) if variance > 0 else 0.0
    return Copying(z, math.erfc(-z / math.sqrt(2)) / 2, above / (m * n))


@dataclass(frozen=True)
class Below:
    """Generated pictures that are nearer to a training picture than `threshold`, a held-out picture's distance.

    share: of all generated ones; error: its standard error; expected: what it would be if generated and held-out pictures were alike. p:
    the chance of as many or more if they are alike, with the threshold's own chance in it.
    """

    threshold: float
    count: int
    share: float
    error: float
    expected: float
    p: float


def share_below(generated: Distances, held_out: Distances) -> Below:
    """(M,) and (N,) distances to the nearest training picture. The threshold is that of the k-th nearest held-out picture, k = QUANTILE N.

    Raises ValueError if there are none of one kind.
    """
    m, n = _counts(generated, held_out)
    k = max(1, math.ceil(QUANTILE * n))
    threshold = float(np.sort(held_out)[k - 1])
    count = int((generated < threshold).sum())
    share = count / m
    return Below(threshold, count, share, math.sqrt(share * (1 - share) / m), k / (n + 1), _as_many(count, k, m, n))


def _as_many(count: int, k: int, m: int, n: int) -> float:
    """The chance that of m + n pictures in random order, at least `count` of the m come before the k-th of the n: that of the first
    count + k - 1, fewer than k are of the n (hypergeometric)."""
    first = count + k - 1
    chances = [
        math.exp(_log_choices(n, i) + _log_choices(m, first - i) - _log_choices(m + n, first))
        for i in range(max(0, first - m), min(k - 1, n, first) + 1)
    ]
    return min(1.0, math.fsum(chances))


def _log_choices(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _counts(generated: Distances, held_out: Distances) -> tuple[int, int]:
    if not len(generated) or not len(held_out):
        raise ValueError(f"{len(generated)} generated and {len(held_out)} held-out pictures: at least one of each is needed")
    return len(generated), len(held_out)
