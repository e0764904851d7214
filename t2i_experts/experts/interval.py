"""Ranges of noise: the part of p(sigma) that an expert is trained on and answers for (eDiff-I, 2211.01324, training of experts).

The node E^level_index of the binary tree has the index-th of 2^level equally probable ranges of p(sigma), index 0 the lowest noise. Edges
are quantiles, kept as exact fractions: whether two ranges meet, overlap or leave something out is never a question of rounding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from t2i_experts.config import NoiseConfig
from t2i_experts.config.expert_rules import read_quantiles
from t2i_experts.diffusion.noise import LogNormalSigma, NoiseDistribution, sigma_from_uniform

MAX_LEVEL = 52
"""Of a node: float64 tells numbers in [1/2, 1) apart down to 2^-53."""

EDM_NOISE = LogNormalSigma()
"""p(sigma) of EDM and eDiff-I."""


def node_name(level: int, index: int) -> str:
    """`E^level_index`."""
    return f"E^{level}_{index}"


def parse_node(name: str) -> tuple[int, int] | None:
    """Level and index of `E^level_index`; None for a name of another form. Raises ValueError for an index that the level does not have."""
    found = re.fullmatch(r"E\^(0|[1-9][0-9]*)_(0|[1-9][0-9]*)", name)
    if not found:
        return None
    level, index = map(int, found.groups())
    _check_node(level, index)
    return level, index


def _check_node(level: int, index: int) -> None:
    if not (0 <= level <= MAX_LEVEL and 0 <= index < 2**level):
        raise ValueError(f"{node_name(level, index)} is no node: level must lie in 0 .. {MAX_LEVEL}, index in 0 .. 2^level - 1")


@dataclass(frozen=True)
class NoiseInterval:
    """The noise levels sigma in (sigma_lo, sigma_hi], whose quantiles in p(sigma) lie in (u_lo, u_hi].

    Half-open, so that intervals that partition the quantiles partition (0, inf). The quantiles 0 and 1 stand for sigma = 0 and infinity,
    also where the support of the distribution ends earlier: the lowest and the highest interval answer for all that lies beyond it.

    u_lo, u_hi: kept as Fractions; a float is taken at its exact value.

    Raises ValueError for quantiles out of order or out of [0, 1], and for an interval inside which there is no float64.
    """

    u_lo: Fraction
    u_hi: Fraction
    distribution: NoiseDistribution = EDM_NOISE

    @classmethod
    def from_config(cls, noise: NoiseConfig) -> NoiseInterval:
        """What the network of a stage is trained on. Raises ValueError for an interval that is too narrow."""
        u_lo, u_hi = read_quantiles(noise.quantiles, "stage.noise.quantiles")
        return cls(u_lo, u_hi, LogNormalSigma(noise.mean, noise.std))

    def __post_init__(self) -> None:
        if not 0 <= self.u_lo < self.u_hi <= 1:
            raise ValueError(f"u_lo={self.u_lo}, u_hi={self.u_hi} must satisfy 0 <= u_lo < u_hi <= 1")
        object.__setattr__(self, "u_lo", Fraction(self.u_lo))
        object.__setattr__(self, "u_hi", Fraction(self.u_hi))
        if not math.nextafter(self.sigma_lo, math.inf) < self.sigma_hi:
            raise ValueError(f"u_lo={self.u_lo}, u_hi={self.u_hi} is too narrow: no float64 sigma lies inside")

    @classmethod
    def node(cls, level: int, index: int, distribution: NoiseDistribution = EDM_NOISE) -> NoiseInterval:
        """The interval of E^level_index, quantiles index / 2^level to (index + 1) / 2^level. Raises ValueError if there is no such node."""
        _check_node(level, index)
        return cls(Fraction(index, 2**level), Fraction(index + 1, 2**level), distribution)

    @cached_property
    def sigma_lo(self) -> float:
        """The lower edge, not inside."""
        return _sigma_at(self.u_lo, self.distribution)

    @cached_property
    def sigma_hi(self) -> float:
        """The upper edge, inside unless it is infinity. Bit for bit the `sigma_lo` of an interval that begins there."""
        return _sigma_at(self.u_hi, self.distribution)

    @property
    def share(self) -> Fraction:
        """Of the noise levels that training on the whole of p(sigma) would draw."""
        return self.u_hi - self.u_lo

    def contains(self, sigma: Tensor) -> Tensor:
        """Whether each sigma lies inside: bool of its shape. Compared in float64: every sigma > 0 lies in one part of a partition."""
        sigma = sigma.double()
        return (sigma > self.sigma_lo) & (sigma <= self.sigma_hi)

    def evaluations(self, sigmas: Tensor) -> int:
        """How many levels of a schedule, (n + 1,) with a final 0, lie inside: evaluations of a sampler that makes one a step."""
        return int(self.contains(sigmas).sum())

    def from_uniform(self, v: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """The sigmas, strictly inside and finite at any level, that uniform numbers stand for.

        v: float64 in [0, 1), multiples of 2^-53 as generators give them; see `sigma_from_uniform`. dtype: of the result, float64 or
        float32. The computation is in float64; one that rounding to float32 would take to an edge, or beyond it, becomes the outermost
        float32 inside. Raises ValueError if there is none.
        """
        lowest, highest = self.ends(dtype)
        return sigma_from_uniform(self.distribution, v, u_lo=self.u_lo, u_hi=self.u_hi).to(dtype).clamp(lowest, highest)

    def ends(self, dtype: torch.dtype) -> tuple[float, float]:
        """The lowest and the highest number of a type strictly inside. Raises ValueError if there is none."""
        lo, hi = (torch.tensor(edge, dtype=dtype) for edge in (self.sigma_lo, self.sigma_hi))
        lowest = lo if float(lo) > self.sigma_lo else torch.nextafter(lo, torch.full_like(lo, math.inf))
        highest = hi if float(hi) < self.sigma_hi else torch.nextafter(hi, torch.zeros_like(hi))
        if lowest > highest:
            raise ValueError(f"u_lo={self.u_lo}, u_hi={self.u_hi} is too narrow: no {str(dtype).removeprefix('torch.')} sigma lies inside")
        return float(lowest), float(highest)

    def edges(self, parts: int) -> list[float]:
        """The (parts + 1) sigmas that begin and end its equally probable parts, from `sigma_lo` to `sigma_hi`."""
        return [_sigma_at(self.u_lo + self.share * Fraction(part, parts), self.distribution) for part in range(parts + 1)]

    def sample(self, shape: int | Sequence[int], *, generator: torch.Generator | None = None) -> Tensor:
        """Draws of sigma from p(sigma) inside the interval, float64 of `shape` on the generator's device, the CPU without one."""
        size = (shape,) if isinstance(shape, int) else tuple(shape)
        device = generator.device if generator is not None else torch.device("cpu")
        return self.from_uniform(torch.rand(size, generator=generator, dtype=torch.float64, device=device))

    def within(self, other: NoiseInterval) -> bool:
        """Whether all of it lies inside another interval."""
        return other.u_lo <= self.u_lo and self.u_hi <= other.u_hi

    def __str__(self) -> str:
        end = "inf)" if self.sigma_hi == math.inf else f"{self.sigma_hi:.4g}]"
        return f"sigma in ({self.sigma_lo:.4g}, {end}, quantiles {self.u_lo} to {self.u_hi}"


def complement(parts: Iterable[NoiseInterval], whole: NoiseInterval) -> list[NoiseInterval]:
    """What the parts leave of the whole, as intervals from low noise to high, none of which meet. Parts may overlap."""
    left, reached = [], whole.u_lo
    for part in sorted(parts, key=lambda part: part.u_lo):
        if reached < min(part.u_lo, whole.u_hi):
            left.append(NoiseInterval(reached, min(part.u_lo, whole.u_hi), whole.distribution))
        reached = max(reached, part.u_hi)
    if reached < whole.u_hi:
        left.append(NoiseInterval(reached, whole.u_hi, whole.distribution))
    return left


def _sigma_at(u: Fraction, distribution: NoiseDistribution) -> float:
    """The sigma of a quantile; in the upper half by its distance to 1, which float64 still tells from 0."""
    if u == 0:
        return 0.0
    if u == 1:
        return math.inf
    if u < 1 - u:
        return float(distribution.icdf(torch.tensor(float(u), dtype=torch.float64)))
    return float(distribution.isf(torch.tensor(float(1 - u), dtype=torch.float64)))
