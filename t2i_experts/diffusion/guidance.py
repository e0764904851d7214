"""Classifier-free guidance (Ho & Salimans 2207.12598) within an interval of noise levels (Kynkaanniemi et al. 2404.07724)."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from t2i_experts.types import Conditioning, Denoiser


@runtime_checkable
class Preparing(Protocol):
    """A denoiser that can compute ahead what depends on the conditioning alone."""

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """The same conditioning with `projected` filled in, to be passed to the denoiser at every step."""
        ...


def prepare(denoiser: Denoiser, conditioning: Conditioning) -> Conditioning:
    """What `denoiser` makes of the conditioning once a prompt; the conditioning as it is if the denoiser has no `prepare`."""
    return denoiser.prepare(conditioning) if isinstance(denoiser, Preparing) else conditioning


@dataclass(frozen=True)
class ScaleBySigma:
    """A guidance scale that depends on the noise: scales[i] for sigma in (edges[i - 1], edges[i]], the last one above all edges.

    edges: ascending and positive, in units of sigma, one fewer than the scales. Raises ValueError for other edges, and for a scale that is
    not finite or negative.
    """

    edges: tuple[float, ...]
    scales: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(lower < upper for lower, upper in pairwise((0.0, *self.edges, math.inf))) or len(self.scales) != len(self.edges) + 1:
            raise ValueError(f"edges={self.edges} must be ascending and positive, one fewer than {len(self.scales)} scales")
        for scale in self.scales:
            if not 0 <= scale < math.inf:
                raise ValueError(f"guidance scale={scale} must be finite and >= 0; 1 is the plain conditional model")

    def at(self, sigma: float) -> float:
        """The scale of one noise level."""
        return self.scales[bisect_left(self.edges, sigma)]

    def of(self, sigma: Tensor) -> Tensor:
        """The scale of each noise level of (B,), float32 on its device."""
        edges = torch.tensor(self.edges, dtype=torch.float64, device=sigma.device)
        return torch.tensor(self.scales, device=sigma.device)[torch.bucketize(sigma.double(), edges)]

    def within(self, lo: float, hi: float) -> ScaleBySigma:
        """The same inside (lo, hi], and 1 elsewhere."""
        edges = tuple(sorted({*self.edges, lo, hi} - {0.0, math.inf}))
        return ScaleBySigma(edges, tuple(self.at(upper) if lo < upper <= hi else 1.0 for upper in (*edges, math.inf)))


class ClassifierFreeGuidance:
    """A denoiser guided towards its conditioning: D = D_null + scale * (D_cond - D_null) for sigma in (lo, hi], D_cond elsewhere.

    scale 1 is the plain conditional model and 0 the unconditional one; where the scale is one of these, as 1 is outside the interval, an
    evaluation costs B rows. Otherwise both branches run as one evaluation of 2B rows, the conditional ones first.

    Args:
        denoiser: called with B or 2B rows.
        null: the conditioning of the null branch, 1 row; an encoded negative prompt works too.
        scale: g, finite and >= 0, or one for each range of noise.
        interval: (lo, hi] in sigma, 0 <= lo < hi; the default guides everywhere.

    Raises ValueError for values outside these ranges.
    """

    def __init__(
        self, denoiser: Denoiser, null: Conditioning, scale: float | ScaleBySigma, interval: tuple[float, float] = (0.0, math.inf)
    ) -> None:
        if null.batch != 1:
            raise ValueError(f"null has {null.batch} rows; it must have 1, which all images share")
        lo, hi = interval
        if not 0 <= lo < hi:
            raise ValueError(f"guidance interval={interval} must satisfy 0 <= lo < hi, in units of sigma")
        self.denoiser = denoiser
        self.null = null
        self._scale = (scale if isinstance(scale, ScaleBySigma) else ScaleBySigma((), (float(scale),))).within(lo, hi)

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """Joins B unprepared rows to 2B, [conditional; null], and lets the denoiser prepare them: do this once a prompt, not once a step.

        With scale 1 everywhere there is no null branch, and B rows are returned.
        """
        return prepare(self.denoiser, conditioning if set(self._scale.scales) == {1} else self._join(conditioning))

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The guided estimate, (B, C, H, W).

        Args:
            x: (B, C, H, W).
            sigma: 0-d, which chooses the branches without a copy from the device if it is on the CPU; or (B,), where each row has its own
                scale, and a scale that depends on sigma costs both branches for all rows.
            conditioning: B unprepared rows, or the result of `prepare`.

        Raises ValueError for another number of rows.
        """
        batch = x.shape[0]
        joined = conditioning.batch == 2 * batch
        if not joined and conditioning.batch != batch:
            raise ValueError(f"conditioning has {conditioning.batch} rows; for {batch} images it must have {batch} or {2 * batch}")

        scale = self._scale_at(sigma)
        if isinstance(scale, Tensor):
            scale = scale.to(x.device).reshape(-1, *[1] * (x.ndim - 1))
        elif scale == 1:
            return self.denoiser(x, sigma, conditioning.rows(0, batch) if joined else conditioning)
        elif scale == 0:
            return self.denoiser(x, sigma, conditioning.rows(batch, 2 * batch) if joined else self.null.expand(batch))

        both = self.denoiser(
            torch.cat([x, x]),
            sigma if sigma.ndim == 0 else sigma.repeat(2),
            conditioning if joined else self._join(conditioning),
        )
        conditional, null = both.chunk(2)
        return null + scale * (conditional - null)

    def _scale_at(self, sigma: Tensor) -> float | Tensor:
        """The scale for one sigma, or if it is the same for all; else (B,) scales for (B,) sigmas, in float32."""
        if len(set(self._scale.scales)) == 1:
            return self._scale.scales[0]
        return self._scale.at(float(sigma)) if sigma.ndim == 0 else self._scale.of(sigma)

    def _join(self, conditioning: Conditioning) -> Conditioning:
        return Conditioning.cat([conditioning, self.null.expand(conditioning.batch)])
