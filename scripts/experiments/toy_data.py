"""Points in the plane for `toy_experts.py`: a mixture of many small Gaussians, whose ideal denoiser is known in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Mixture:
    """Equally likely Gaussians. centres: (K, 2); std: of each, the same in both directions."""

    centres: Tensor
    std: float

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 2, 1, 1) float32: pictures of one pixel and two channels."""
        return self._around(torch.randint(len(self.centres), (count,), generator=generator), generator)

    def spread(self, count: int, generator: torch.Generator) -> Tensor:
        """As `sample`, but equally many of each Gaussian: what samples are compared with."""
        return self._around(torch.arange(count) % len(self.centres), generator)

    def _around(self, which: Tensor, generator: torch.Generator) -> Tensor:
        points = self.centres[which] + self.std * torch.randn(len(which), 2, generator=generator)
        return points[:, :, None, None]

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[y | x], the minimum of the training loss. x: (B, 2, 1, 1) = y + sigma eps; sigma: (B,). Returns (B, 2, 1, 1)."""
        noisy, variance = x[:, :, 0, 0], (sigma.square() + self.std**2)[:, None]
        odds = torch.softmax(-torch.cdist(noisy, self.centres).square() / (2 * variance), dim=1)
        nearby = odds @ self.centres
        return (nearby + self.std**2 / variance * (noisy - nearby))[:, :, None, None]


def spiral_of_rings(arms: int = 2, rings: int = 7, dots: int = 7) -> Mixture:
    """Dots on small rings on the arms of a spiral: shapes at three scales, each of which another range of noise has to draw.

    Both coordinates have mean 0 and standard deviation 1/2, to which the denoiser is scaled.
    """
    centres = []
    for arm in range(arms):
        for ring in range(rings):
            turn = 2 * math.pi * (arm / arms + 0.09 * ring)
            radius, size = 0.25 + 0.75 * ring / (rings - 1), 0.05 + 0.07 * ring / (rings - 1)
            for dot in range(dots):
                angle = 2 * math.pi * dot / dots
                centres.append(
                    (radius * math.cos(turn) + size * math.cos(angle), radius * math.sin(turn) + size * math.sin(angle)),
                )
    points = torch.tensor(centres)
    points = points - points.mean(dim=0)
    return Mixture(points * (0.5 / points.std(dim=0, correction=0)), std=0.008)


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 128) -> float:
    """The mean over directions of the distance between sorted projections, in the points' units. a, b: (N, 2, 1, 1), equally many."""
    angles = math.pi * (torch.arange(directions) + 0.5) / directions
    axes = torch.stack([angles.cos(), angles.sin()])
    one, other = ((points[:, :, 0, 0] @ axes).sort(dim=0).values for points in (a, b))
    return float((one - other).abs().mean())
