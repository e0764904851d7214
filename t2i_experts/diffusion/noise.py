"""How much noise the training sees: the log-normal p(sigma) of EDM (Karras et al. 2206.00364, table 1), and draws from a part of it.

An expert is trained on a range of quantiles of p(sigma) (eDiff-I, 2211.01324), and the outermost ranges are thin: E^9_511 is the last
1/512. A quantile very near 1 cannot be told from 1 in floating point, but its distance to 1 can. So a distribution has two pairs of
functions, one for each tail, and whatever lies in the upper half is computed from its distance to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor


class NoiseDistribution(Protocol):
    """A continuous distribution of the noise level sigma > 0; all four functions map float64 tensors elementwise."""

    def cdf(self, sigma: Tensor) -> Tensor:
        """u = P(noise level <= sigma), relatively exact near 0."""
        ...

    def sf(self, sigma: Tensor) -> Tensor:
        """q = P(noise level > sigma) = 1 - u, relatively exact near 0."""
        ...

    def icdf(self, u: Tensor) -> Tensor:
        """The sigma with cdf(sigma) = u; u = 0 and u = 1 give the ends of the support, 0 and infinity for a log-normal."""
        ...

    def isf(self, q: Tensor) -> Tensor:
        """The sigma with sf(sigma) = q."""
        ...


@dataclass(frozen=True)
class LogNormalSigma:
    """ln sigma ~ N(mean, std^2): P_mean and P_std of EDM and eDiff-I.

    Raises ValueError unless both are finite and std > 0.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean):
            raise ValueError(f"mean={self.mean} must be finite")
        if not (math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"std={self.std} must be finite and > 0")

    def cdf(self, sigma: Tensor) -> Tensor:
        """u = Phi((ln sigma - mean) / std), float64; by erfc, as `torch.special.ndtr` loses digits in the lower tail."""
        return torch.erfc(-self._standardised(sigma) / math.sqrt(2)) / 2

    def sf(self, sigma: Tensor) -> Tensor:
        """q = 1 - cdf(sigma) without the cancellation, float64."""
        return torch.erfc(self._standardised(sigma) / math.sqrt(2)) / 2

    def icdf(self, u: Tensor) -> Tensor:
        """sigma = exp(mean + std * Phi^-1(u)), float64."""
        return torch.exp(self.mean + self.std * torch.special.ndtri(u.double()))

    def isf(self, q: Tensor) -> Tensor:
        """sigma = exp(mean - std * Phi^-1(q)), float64."""
        return torch.exp(self.mean - self.std * torch.special.ndtri(q.double()))

    def sample(
        self, shape: int | Sequence[int], *, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Draws of sigma, float32 of `shape`; see `sample_sigma`."""
        return sample_sigma(self, shape, generator=generator, device=device)

    def _standardised(self, sigma: Tensor) -> Tensor:
        return (sigma.double().log() - self.mean) / self.std


def sigma_from_uniform(distribution: NoiseDistribution, v: Tensor, *, u_lo: Fraction | float = 0, u_hi: Fraction | float = 1) -> Tensor:
    """The sigmas, float64, that uniform numbers stand for when the quantile of sigma is to lie in (u_lo, u_hi).

    u = u_lo + (u_hi - u_lo) v. Both u and 1 - u are computed from the exact ends, each without cancellation, and the smaller one is
    inverted: sigma is always positive and finite. Float32 quantiles would make some draws of E^9_511 infinite.

    Args:
        v: float64 in [0, 1), multiples of 2^-53 as generators give them; 0 stands for 2^-54.
        u_lo, u_hi: quantiles with 0 <= u_lo < u_hi <= 1; give Fractions where an end is not a binary fraction.

    Raises ValueError for quantiles out of order or out of [0, 1].
    """
    if not 0 <= u_lo < u_hi <= 1:
        raise ValueError(f"u_lo={u_lo}, u_hi={u_hi} must satisfy 0 <= u_lo < u_hi <= 1")
    below, above = float(Fraction(u_lo)), float(1 - Fraction(u_hi))
    width = float(Fraction(u_hi) - Fraction(u_lo))
    v = v.clamp(min=2.0**-54)
    u, q = below + width * v, above + width * (1 - v)
    return torch.where(u < q, distribution.icdf(u), distribution.isf(q))


def sample_sigma(
    distribution: NoiseDistribution,
    shape: int | Sequence[int],
    *,
    u_lo: Fraction | float = 0,
    u_hi: Fraction | float = 1,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draws of sigma given that its quantile lies in (u_lo, u_hi), by `sigma_from_uniform`.

    Args:
        shape: of the result.
        u_lo, u_hi: as there.
        generator: the draw is made in float64 on its device (the CPU without one), hence does not depend on `device`.
        device: of the result; the generator's unless given.

    Returns: sigma, float32 of `shape` on `device`.

    Raises ValueError for quantiles out of order or out of [0, 1].
    """
    drawn_on = generator.device if generator is not None else torch.device("cpu")
    size = (shape,) if isinstance(shape, int) else tuple(shape)
    v = torch.rand(size, generator=generator, dtype=torch.float64, device=drawn_on)
    sigma = sigma_from_uniform(distribution, v, u_lo=u_lo, u_hi=u_hi)
    return sigma.to(drawn_on if device is None else device, torch.float32)
