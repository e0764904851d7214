"""Balanced boundaries: monitors of denoisers that are known in closed form, and the equidistribution of known densities."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from t2i_experts.diffusion.noise import LogNormalSigma
from t2i_experts.experts.boundaries import Batch, Monitor, balanced_quantiles, equidistribute, estimate_monitor
from t2i_experts.experts.interval import NoiseInterval
from t2i_experts.types import Conditioning, Embedding

SD = 0.5


def batches(images: Tensor, size: int = 4096) -> Iterator[Batch]:
    for part in images.split(size):
        yield part, Conditioning({"none": Embedding.null(len(part), 1, 1)})


def gaussian(std: float) -> Tensor:
    return std * torch.randn(8192, 2, 2, 2, generator=torch.Generator().manual_seed(5))


class Gaussian:
    """The ideal denoiser of pictures whose values are independent N(0, std^2)."""

    def __init__(self, std: float) -> None:
        self.std = std

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return x * float(self.std**2 / (self.std**2 + sigma**2))


@pytest.mark.parametrize("std", [0.1, 0.5])
def test_the_acceleration_of_gaussian_pictures(std: float) -> None:
    """On the trajectory x grows as sqrt(std^2 + sigma^2), and D = std^2 x / (std^2 + sigma^2)."""
    monitor = estimate_monitor(Gaussian(std), batches(gaussian(std)), points=13)
    s = monitor.sigmas
    exact = (1 + SD / s) * std**2 * s**2 / (std**2 + s**2) ** 1.5
    torch.testing.assert_close(monitor.density, exact, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("std", [0.1, 0.5])
def test_the_dirichlet_energy_of_gaussian_pictures(std: float) -> None:
    monitor = estimate_monitor(Gaussian(std), batches(gaussian(std)), kind="dirichlet", points=13)
    s = monitor.sigmas
    exact = (SD / (SD + s) - std**2 / (std**2 + s**2)).abs()
    torch.testing.assert_close(monitor.density, exact, rtol=0.02, atol=1e-4)


class Coin:
    """The ideal denoiser of values that are a or -a: a tanh(a x / sigma^2)."""

    a = 0.5

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return self.a * torch.tanh(self.a * x.double() / sigma**2).float()


def coin_monitors(sigma: float) -> tuple[float, float]:
    """Both monitors of the coin by quadrature over x, with derivatives by hand."""
    a = Coin.a
    eps = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weight = torch.exp(-(eps**2) / 2)
    x = a + sigma * eps  # the other side is its mirror image
    d = a * torch.tanh(a * x / sigma**2)
    by_x = a**2 / sigma**2 / torch.cosh(a * x / sigma**2) ** 2
    by_log_sigma = -2 * x * by_x
    change = (1 + SD / sigma) * (by_x * (x - d) + by_log_sigma)
    energy = SD / (SD + sigma) - by_x
    return tuple(float((weight * f**2).sum() / weight.sum()) ** 0.5 for f in (change, energy))  # type: ignore[return-value]


def test_both_monitors_of_a_coin() -> None:
    """Here the trajectory bends: where sigma is about a, the sign is decided."""
    toss = torch.randint(0, 2, (16384, 1, 4, 4), generator=torch.Generator().manual_seed(1)) - 0.5
    found = [
        estimate_monitor(Coin(), batches(toss), kind=kind, sigma_min=0.15, sigma_max=5, points=6).density
        for kind in ("acceleration", "dirichlet")
    ]
    exact = torch.tensor([coin_monitors(float(s)) for s in torch.logspace(math.log10(0.15), math.log10(5), 6)]).T
    torch.testing.assert_close(found[0].float(), exact[0].float(), rtol=0.03, atol=2e-3)
    torch.testing.assert_close(found[1].float(), exact[1].float(), rtol=0.03, atol=2e-3)
    assert exact[0].argmax() not in (0, 5)


def test_the_number_of_batches_does_not_matter_beyond_chance_and_seeds_repeat() -> None:
    def density(size: int, seed: int) -> Tensor:
        return estimate_monitor(Gaussian(0.3), batches(gaussian(0.3), size), points=5, seed=seed).density

    assert torch.equal(density(4096, 1), density(4096, 1)) and not torch.equal(density(4096, 1), density(4096, 2))
    torch.testing.assert_close(density(4096, 1), density(1000, 2), rtol=0.02, atol=0)


def grid(function: object, points: int = 801) -> Monitor:
    sigmas = torch.logspace(-2, 2, points, dtype=torch.float64)
    return Monitor(sigmas, function(sigmas))  # type: ignore[operator]


def test_edges_of_densities_with_a_known_integral() -> None:
    even = equidistribute(grid(torch.ones_like), 4)
    assert even == pytest.approx([0.1, 1.0, 10.0], rel=1e-9), "equal steps in ln(sigma)"
    steep = equidistribute(grid(lambda s: s), 4)  # its integral over ln(sigma) is sigma
    assert steep == pytest.approx([25.0, 50.0, 75.0], rel=1e-3)
    assert equidistribute(grid(lambda s: s), 1) == []


def test_the_integrals_between_the_edges_of_a_measured_monitor_are_equal() -> None:
    monitor = estimate_monitor(Gaussian(0.5), batches(gaussian(0.5)[:1024]), points=65)
    edges = equidistribute(monitor, 5)
    fine = torch.logspace(math.log10(0.002), math.log10(80), 200_001, dtype=torch.float64)
    exact = (1 + SD / fine) * SD**2 * fine**2 / (SD**2 + fine**2) ** 1.5
    part = torch.bucketize(fine, torch.tensor(edges, dtype=torch.float64))
    masses = torch.stack([exact[part == i].sum() for i in range(5)])
    torch.testing.assert_close(masses / masses.sum(), torch.full((5,), 0.2, dtype=torch.float64), rtol=0.03, atol=0)


def test_flat_stretches_have_no_edge_inside() -> None:
    monitor = grid(lambda s: ((s < 0.1) | (s > 10)).double())
    edges = equidistribute(monitor, 4)
    assert edges[0] < 0.1 and edges[2] > 10 and 0.09 < edges[1] < 11


def test_quantiles_partition_all_noise_and_are_short() -> None:
    noise = LogNormalSigma(-0.4, 1.0)
    monitor = grid(torch.ones_like)
    parts = balanced_quantiles(monitor, 4, noise)
    assert parts[0][0] == 0 and parts[-1][1] == 1 and all(a[1] == b[0] for a, b in pairwise(parts))
    for (_, u), sigma in zip(parts, equidistribute(monitor, 4), strict=False):
        assert NoiseInterval(Fraction(0), u, noise).sigma_hi == pytest.approx(sigma, rel=0.0101)
        assert u.denominator & (u.denominator - 1) == 0
        coarser = Fraction(round(u * u.denominator / 2), u.denominator // 2)
        assert not 0 < coarser < 1 or NoiseInterval(Fraction(0), coarser, noise).sigma_hi != pytest.approx(sigma, rel=0.0099)


def test_an_edge_far_up_keeps_its_digits() -> None:
    """ln(sigma) 6.5 deviations above the mean: 1 - 4e-11."""
    sigma = math.exp(-1.2 + 1.2 * 6.5)
    monitor = Monitor(torch.tensor([sigma / 2, sigma, 2 * sigma], dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    ((_, u), _) = balanced_quantiles(monitor, 2)
    assert NoiseInterval(Fraction(0), u).sigma_hi == pytest.approx(sigma, rel=0.0101) and 1 - u < Fraction(1, 10**10)


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        estimate_monitor(Gaussian(0.5), [])
    with pytest.raises(ValueError, match="points=1"):
        estimate_monitor(Gaussian(0.5), [], points=1)
    with pytest.raises(ValueError, match="parts=0"):
        equidistribute(grid(torch.ones_like), 0)
    with pytest.raises(ValueError, match="positive somewhere"):
        equidistribute(grid(torch.zeros_like), 2)
    with pytest.raises(ValueError, match="parts=4000"):
        balanced_quantiles(grid(torch.ones_like), 4000)
    far = Monitor(torch.tensor([1e30, 1e32], dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="lies beyond"):
        balanced_quantiles(far, 2)
