"""Where to split the noise so that every expert has the same amount to learn: balanced boundaries, measured on a trained denoiser.

Complexity-Balanced Splitting (2606.06477) lays the boundaries by de Boor's equidistribution of a monitor, the acceleration of the sampling
trajectory or the Dirichlet energy of the model, which a small model estimates. Norms, scales and parametrisation of the paper were not
at hand; what is here is chosen. Both monitors are of the straight path x_tau = (1 - tau) y + tau sigma_data eps of flow matching, with
tau = sigma / (sigma + sigma_data) and x_tau = (1 - tau) x; its velocity is v = sigma_data (x - D) / sigma - D.

    acceleration   |dv/dtau| dtau = (1 + sigma_data / sigma) |dD|   along the trajectory: zero while the denoised image stays what it is
    dirichlet      |grad v| dtau = |(1 - tau) I - dD/dx| dln(sigma)   the Frobenius norm: how strongly the answer depends on the input

both as root mean squares over images and values, and as densities over ln(sigma), a coordinate on which their integrals do not depend.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from t2i_experts.diffusion.guidance import prepare
from t2i_experts.diffusion.noise import NoiseDistribution
from t2i_experts.experts.interval import EDM_NOISE, NoiseInterval
from t2i_experts.types import Conditioning, Denoiser

MonitorKind = Literal["acceleration", "dirichlet"]
Batch = tuple[Tensor, Conditioning]
"""Clean images (or latents), (B, C, H, W), and their conditioning of B rows."""

_STEP = 0.05  # of the differences, in ln(sigma) or in units of sigma


@dataclass(frozen=True, eq=False)
class Monitor:
    """How much there is to learn at each noise level. sigmas: (G,) float64, ascending. density: (G,) float64, per unit of ln(sigma)."""

    sigmas: Tensor
    density: Tensor

    def cumulative(self) -> Tensor:
        """The integral of the density from the first sigma to each, (G,), by trapezoids."""
        masses = self.sigmas.log().diff() * (self.density[1:] + self.density[:-1]) / 2
        return torch.cat([masses.new_zeros(1), masses.cumsum(0)])


@torch.no_grad()
def estimate_monitor(
    denoiser: Denoiser,
    batches: Iterable[Batch],
    *,
    kind: MonitorKind = "acceleration",
    sigma_data: float = 0.5,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    points: int = 33,
    seed: int = 0,
) -> Monitor:
    """The monitor at `points` noise levels, evenly spaced in ln(sigma), of noisy versions of the images.

    Derivatives are central differences: three evaluations of a batch at each level for the acceleration, two for the Dirichlet energy,
    whose norm is estimated by one random direction for each image (Hutchinson). Noise and directions follow from the seed.

    Raises ValueError without any batch, for fewer than 2 points and unless 0 < sigma_min < sigma_max.
    """
    if points < 2 or not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"points={points}, sigma_min={sigma_min}, sigma_max={sigma_max} must satisfy points >= 2, 0 < sigma_min < sigma_max"
        )
    sigmas = torch.logspace(math.log10(sigma_min), math.log10(sigma_max), points, dtype=torch.float64)
    squares, images_seen, generator = torch.zeros(points, dtype=torch.float64), 0, torch.Generator().manual_seed(seed)
    for images, conditioning in batches:
        eps, direction = (torch.randn(images.shape, generator=generator).to(images.device) for _ in range(2))
        prepared = prepare(denoiser, conditioning)
        for i, sigma in enumerate(sigmas):
            x = images + float(sigma) * eps
            if kind == "acceleration":
                change = (1 + sigma_data / float(sigma)) * _change(denoiser, x, sigma, prepared)
            else:
                stays = sigma_data / (float(sigma) + sigma_data)
                change = stays * direction - _derivative(denoiser, x, sigma, prepared, direction)
            squares[i] += change.double().square().mean(dim=(1, 2, 3)).sum().cpu()
        images_seen += len(images)
    if not images_seen:
        raise ValueError("the monitor needs at least one batch of images")
    return Monitor(sigmas, (squares / images_seen).sqrt())


def _change(denoiser: Denoiser, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
    """dD/dln(sigma) along the trajectory dx/dln(sigma) = x - D, whose straight continuation is exact for an image that is known."""
    slope = x - denoiser(x, sigma, conditioning)
    above, below = (denoiser(x + math.expm1(h) * slope, sigma * math.exp(h), conditioning) for h in (_STEP, -_STEP))
    return (above - below) / (2 * _STEP)


def _derivative(denoiser: Denoiser, x: Tensor, sigma: Tensor, conditioning: Conditioning, direction: Tensor) -> Tensor:
    """The derivative of D with respect to x in a direction."""
    step = _STEP * float(sigma)
    above, below = (denoiser(x + h * direction, sigma, conditioning) for h in (step, -step))
    return (above - below) / (2 * step)


def equidistribute(monitor: Monitor, parts: int) -> list[float]:
    """The parts - 1 inner edges, sigmas in ascending order, between which the monitor has equal integrals (de Boor).

    Between the monitor's levels the integral is taken as linear in ln(sigma). Raises ValueError for parts < 1, and for a density that is
    negative, not finite or zero everywhere.
    """
    if parts < 1:
        raise ValueError(f"parts={parts} must be >= 1")
    if not (monitor.density.isfinite().all() and (monitor.density >= 0).all() and monitor.density.sum() > 0):
        raise ValueError(f"the monitor's density must be finite, not negative, and positive somewhere; received {monitor.density.tolist()}")
    mass, logs = monitor.cumulative(), monitor.sigmas.log()
    wanted = mass[-1] * torch.arange(1, parts, dtype=torch.float64) / parts
    cell = torch.searchsorted(mass, wanted).clamp(1, len(mass) - 1)
    fraction = (wanted - mass[cell - 1]) / (mass[cell] - mass[cell - 1])
    edges: list[float] = (logs[cell - 1] + fraction * (logs[cell] - logs[cell - 1])).exp().tolist()
    return edges


def balanced_quantiles(
    monitor: Monitor, parts: int, noise: NoiseDistribution = EDM_NOISE, *, tolerance: float = 0.01
) -> list[tuple[Fraction, Fraction]]:
    """The parts of p(sigma) that are equally much to learn, from low noise to high, as `experts.nodes.NAME.quantiles` takes them.

    Each edge is the fraction with the smallest power of two below it whose sigma is the balanced one to a relative `tolerance`.

    Raises ValueError as `equidistribute` does, for edges that are equal to that tolerance, and for one that the distribution never reaches.
    """
    edges = [Fraction(0), *(_short_quantile(sigma, noise, tolerance) for sigma in equidistribute(monitor, parts)), Fraction(1)]
    if any(lower >= upper for lower, upper in pairwise(edges)):
        raise ValueError(f"parts={parts}: some of the edges {', '.join(map(str, edges))} are equal to {tolerance:.1%}; ask for fewer")
    return list(pairwise(edges))


def _short_quantile(sigma: float, noise: NoiseDistribution, tolerance: float) -> Fraction:
    at = torch.tensor(sigma, dtype=torch.float64)
    below, above = Fraction(float(noise.cdf(at))), Fraction(float(noise.sf(at)))
    exact = below if below < above else 1 - above
    for power in range(1, 53):
        u = Fraction(round(exact * 2**power), 2**power)
        if 0 < u < 1 and abs(math.log(NoiseInterval(Fraction(0), u, noise).sigma_hi / sigma)) <= tolerance:
            return u
    raise ValueError(f"sigma={sigma:.4g} lies beyond the quantiles of {noise} that can be told from 0 and 1")
