"""Two experts that answer together, in a ratio that depends on the noise: D = r D_high + (1 - r) D_low (see `ratio.py`).

Between a single network, r constant, and the hard routing of eDiff-I, r a step. Where r is as good as 0 or 1, one expert is evaluated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from t2i_experts.diffusion.guidance import prepare
from t2i_experts.experts.ratio import Ratio
from t2i_experts.types import Conditioning, Denoiser


class RatioBlend(nn.Module):
    """A `Denoiser` of two, D(x; sigma) = r D_high + (1 - r) D_low with r = ratio(sigma).

    An `nn.Module`, whose parameters are those of experts and ratio that are modules themselves: all of it trains under `EDMLoss`.

    Args:
        high, low: the experts for high and low noise.
        ratio: see `Ratio`.
        saturation: r at most this far from 0 or 1 counts as 0 or 1 and costs one evaluation of the one expert. The other one, and the
            ratio, then get no gradients there; 0 leaves out an expert only where r is exactly 0 or 1. None: for (B,) sigmas both are
            evaluated on all rows, whatever r is: for training, where nothing then waits for the device, and every process has
            gradients of all weights.

    Raises ValueError unless 0 <= saturation < 1/2.
    """

    def __init__(self, high: Denoiser, low: Denoiser, ratio: Ratio, *, saturation: float | None = 1e-3) -> None:
        super().__init__()
        if saturation is not None and not 0 <= saturation < 0.5:
            raise ValueError(f"saturation={saturation} must lie in [0, 0.5)")
        self.high: Denoiser = high
        self.low: Denoiser = low
        self.ratio = ratio
        self.saturation = saturation

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """The conditioning, with which each expert's projections will be kept from its first evaluation on: for many calls with one prompt.

        Raises ValueError for a conditioning that another denoiser has prepared.
        """
        _refuse_prepared(conditioning)
        return conditioning if conditioning.each_for_itself else replace(conditioning, each_for_itself=True)

    def forward(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """x: (B, C, H, W); sigma: 0-d, which on the CPU chooses without a copy from the device, or (B,), where rows that need one expert
        cost that one; conditioning: of B rows, prepared or not. Returns (B, C, H, W) float32.

        Raises ValueError for a conditioning that another denoiser has prepared.
        """
        _refuse_prepared(conditioning)
        r = self.saturated(sigma)
        if sigma.ndim == 0:
            return self._together(x, sigma, r, conditioning)
        weights = r.to(x.device, torch.float32)
        if self.saturation is None:
            high, low = self.apart(x, sigma, conditioning)
            share = weights[:, None, None, None]
            return share * high + (1 - share) * low
        high = self._share(x, sigma, weights, "high", conditioning)
        low = self._share(x, sigma, 1 - weights, "low", conditioning)
        return high + low

    def saturated(self, sigma: Tensor) -> Tensor:
        """The ratio in effect, float64 of sigma's shape: r, and 0 or 1 where one expert answers alone."""
        r = self.ratio(sigma)
        if self.saturation is None:
            return r
        r = torch.where(r <= self.saturation, torch.zeros_like(r), r)
        return torch.where(r >= 1 - self.saturation, torch.ones_like(r), r)

    def map(self, function: Callable[[Denoiser], Denoiser]) -> RatioBlend:
        """The blend with function(expert) in the place of each of the two."""
        return RatioBlend(function(self.high), function(self.low), self.ratio, saturation=self.saturation)

    def apart(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """What each expert denoises alone, at any noise level: D_high and D_low, arguments and shapes as of a call. For looking at."""
        return self._expert("high", x, sigma, conditioning), self._expert("low", x, sigma, conditioning)

    def _together(self, x: Tensor, sigma: Tensor, r: Tensor, conditioning: Conditioning) -> Tensor:
        if r == 1:
            return self._expert("high", x, sigma, conditioning)
        if r == 0:
            return self._expert("low", x, sigma, conditioning)
        high, low = self.apart(x, sigma, conditioning)
        return r * high + (1 - r) * low  # a 0-d r on the CPU is a number to every device

    def _share(self, x: Tensor, sigma: Tensor, weights: Tensor, name: str, conditioning: Conditioning) -> Tensor:
        """One expert's part of the sum, (B, C, H, W) float32; weights: (B,). It sees only the rows that need it."""
        rows = weights.nonzero().flatten()
        if len(rows) == len(x):
            return weights[:, None, None, None] * self._expert(name, x, sigma, conditioning)
        result = torch.zeros_like(x, dtype=torch.float32)
        if len(rows) == 0:
            return result
        some = self._expert(name, x[rows], sigma[rows], conditioning.map(lambda tensor: tensor[rows]))
        return result.index_add(0, rows, weights[rows][:, None, None, None] * some)

    def _expert(self, name: str, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """One expert's answer, with its own projections of the conditioning."""
        expert: Denoiser = getattr(self, name)
        if conditioning.each_for_itself:
            conditioning = conditioning.once((self, name), lambda: prepare(expert, Conditioning(conditioning.embeddings)))
        return expert(x, sigma, conditioning)


def _refuse_prepared(conditioning: Conditioning) -> None:
    if conditioning.projected:
        raise ValueError("the conditioning holds the projections of a single network; the experts of a blend each need their own")
