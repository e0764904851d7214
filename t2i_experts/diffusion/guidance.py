"""Classifier-free guidance (Ho & Salimans 2207.12598) within an interval of noise levels (Kynkaanniemi et al. 2404.07724)."""

from __future__ import annotations

import math
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


class ClassifierFreeGuidance:
    """A denoiser guided towards its conditioning: D = D_null + scale * (D_cond - D_null) for sigma in (lo, hi], D_cond elsewhere.

    scale 1 is the plain conditional model and 0 the unconditional one; these, and any sigma outside the interval, cost one evaluation of B
    rows. Otherwise both branches run as one evaluation of 2B rows, the conditional ones first.

    Args:
        denoiser: called with B or 2B rows.
        null: the conditioning of the null branch, 1 row; an encoded negative prompt works too.
        scale: g, finite and >= 0.
        interval: (lo, hi] in sigma, 0 <= lo < hi; the default guides everywhere.

    Raises ValueError for values outside these ranges.
    """

    def __init__(self, denoiser: Denoiser, null: Conditioning, scale: float, interval: tuple[float, float] = (0.0, math.inf)) -> None:
        if null.batch != 1:
            raise ValueError(f"null has {null.batch} rows; it must have 1, which all images share")
        if not 0 <= scale < math.inf:
            raise ValueError(f"guidance scale={scale} must be finite and >= 0; 1 is the plain conditional model")
        lo, hi = interval
        if not 0 <= lo < hi:
            raise ValueError(f"guidance interval={interval} must satisfy 0 <= lo < hi, in units of sigma")
        self.denoiser = denoiser
        self.null = null
        self.scale = float(scale)
        self.interval = (lo, hi)

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """Joins B unprepared rows to 2B, [conditional; null], and lets the denoiser prepare them: do this once a prompt, not once a step.

        With scale 1 there is no null branch, and B rows are returned.
        """
        return prepare(self.denoiser, conditioning if self.scale == 1 else self._join(conditioning))

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The guided estimate, (B, C, H, W).

        Args:
            x: (B, C, H, W).
            sigma: 0-d, which chooses the branches without a copy from the device if it is on the CPU; or (B,), where each row has its own
                scale and an interval with bounds costs both branches for all rows.
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
        """The scale for one sigma; for (B,) sigmas with bounds, (B,) scales in float32."""
        lo, hi = self.interval
        if sigma.ndim == 0:
            return self.scale if lo < float(sigma) <= hi else 1.0
        if self.scale == 1 or (lo == 0 and hi == math.inf):
            return self.scale
        return torch.where((lo < sigma) & (sigma <= hi), self.scale, 1.0)

    def _join(self, conditioning: Conditioning) -> Conditioning:
        return Conditioning.cat([conditioning, self.null.expand(conditioning.batch)])
