from __future__ import annotations

import math
from fractions import Fraction
from statistics import NormalDist

import pytest
import torch

from t2i_experts.diffusion.noise import LogNormalSigma, NoiseDistribution, sample_sigma

DISTRIBUTION = LogNormalSigma()


@pytest.mark.parametrize("u", [1e-300, 1e-15, 1e-12, 1e-6, 1 / 512, 0.125, 0.3, 0.5])
def test_quantiles_agree_with_the_standard_library_in_both_tails(u: float) -> None:
    at, z = torch.tensor(u, dtype=torch.float64), NormalDist().inv_cdf(u)
    torch.testing.assert_close(DISTRIBUTION.icdf(at).item(), math.exp(-1.2 + 1.2 * z), rtol=1e-13, atol=0)
    torch.testing.assert_close(DISTRIBUTION.isf(at).item(), math.exp(-1.2 - 1.2 * z), rtol=1e-13, atol=0)


def test_round_trips_keep_the_distance_to_either_end() -> None:
    tail = torch.logspace(-15, math.log10(0.5), 200, dtype=torch.float64)
    torch.testing.assert_close(DISTRIBUTION.cdf(DISTRIBUTION.icdf(tail)), tail, rtol=1e-12, atol=0)
    torch.testing.assert_close(DISTRIBUTION.sf(DISTRIBUTION.isf(tail)), tail, rtol=1e-12, atol=0)
    torch.testing.assert_close(DISTRIBUTION.cdf(DISTRIBUTION.isf(tail)), 1 - tail, rtol=1e-15, atol=0)
    torch.testing.assert_close(DISTRIBUTION.icdf(1 - tail[-50:]), DISTRIBUTION.isf(tail[-50:]), rtol=1e-12, atol=0)
    sigma = torch.logspace(-4, 4, 200, dtype=torch.float64)
    torch.testing.assert_close(DISTRIBUTION.cdf(sigma) + DISTRIBUTION.sf(sigma), torch.ones_like(sigma), rtol=1e-15, atol=0)


def test_known_edges_of_the_tree() -> None:
    """The edges of the nodes of eDiff-I's tree, as computed from its formula."""
    u = torch.tensor([1 / 8, 1 / 4, 1 / 2, 3 / 4, 511 / 512], dtype=torch.float64)
    expected = torch.tensor([0.07574, 0.1341, 0.3012, 0.6766, 9.610], dtype=torch.float64)
    torch.testing.assert_close(DISTRIBUTION.icdf(u), expected, rtol=5e-4, atol=0)


def test_ends_of_the_support() -> None:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert DISTRIBUTION.icdf(ends).tolist() == [0.0, math.inf]
    assert DISTRIBUTION.isf(ends).tolist() == [math.inf, 0.0]
    assert DISTRIBUTION.cdf(DISTRIBUTION.icdf(ends)).tolist() == [0.0, 1.0]


def test_sample_has_the_moments_and_repeats_with_its_generator() -> None:
    generator = torch.Generator().manual_seed(5)
    sigma = DISTRIBUTION.sample((400, 500), generator=generator)
    assert sigma.shape == (400, 500) and sigma.dtype == torch.float32
    log = sigma.double().log()
    assert abs(log.mean().item() + 1.2) < 0.01 and abs(log.std().item() - 1.2) < 0.01
    assert torch.equal(sigma, DISTRIBUTION.sample((400, 500), generator=torch.Generator().manual_seed(5)))
    assert DISTRIBUTION.sample(3).shape == (3,)


@pytest.mark.parametrize("level, index", [(9, 511), (9, 0), (3, 0), (2, 1), (40, 2**40 - 1)])
def test_draws_are_uniform_in_quantile_inside_a_node(level: int, index: int) -> None:
    u_lo, u_hi = Fraction(index, 2**level), Fraction(index + 1, 2**level)
    sigma = sample_sigma(DISTRIBUTION, 100_000, u_lo=u_lo, u_hi=u_hi, generator=torch.Generator().manual_seed(0)).double()
    assert sigma.isfinite().all() and (sigma > 0).all()
    from_below, from_above = DISTRIBUTION.cdf(sigma) - float(u_lo), DISTRIBUTION.sf(sigma) - float(1 - u_hi)
    v = 1 - from_above * 2**level if u_hi == 1 else from_below * 2**level  # measured from the nearer end
    assert v.min() > -1e-4 and v.max() < 1 + 1e-4
    v = v.sort().values
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert (v - uniform).abs().max() < 0.006  # Kolmogorov-Smirnov, p about 0.001


class EdgeRand:
    """Stands in for torch.rand with the values at the two ends of its range."""

    def __call__(self, size: tuple[int, ...], **_: object) -> torch.Tensor:
        return torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)


@pytest.mark.parametrize("u_lo, u_hi", [(0, 1), (Fraction(511, 512), 1), (0, Fraction(1, 512))])
def test_extreme_uniforms_give_finite_positive_sigmas(monkeypatch: pytest.MonkeyPatch, u_lo: Fraction, u_hi: Fraction) -> None:
    monkeypatch.setattr(torch, "rand", EdgeRand())
    sigma = sample_sigma(DISTRIBUTION, 2, u_lo=u_lo, u_hi=u_hi)
    assert sigma.isfinite().all() and (sigma > 0).all() and sigma[0] < sigma[1]


def test_any_distribution_can_be_drawn_from() -> None:
    class LogUniform:
        """ln sigma ~ U(0, 1)."""

        def cdf(self, sigma: torch.Tensor) -> torch.Tensor:
            return sigma.log()

        def sf(self, sigma: torch.Tensor) -> torch.Tensor:
            return 1 - sigma.log()

        def icdf(self, u: torch.Tensor) -> torch.Tensor:
            return u.exp()

        def isf(self, q: torch.Tensor) -> torch.Tensor:
            return (1 - q).exp()

    distribution: NoiseDistribution = LogUniform()
    sigma = sample_sigma(distribution, 1000, u_lo=0.25, u_hi=0.5, generator=torch.Generator().manual_seed(0))
    assert sigma.log().min() >= 0.25 and sigma.log().max() <= 0.5 and sigma.log().std() > 0.06


def test_bad_values_are_refused() -> None:
    for values in [{"std": 0.0}, {"std": -1.0}, {"std": math.inf}, {"mean": math.nan}]:
        with pytest.raises(ValueError, match=next(iter(values))):
            LogNormalSigma(**values)
    for u_lo, u_hi in [(0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (0.5, 1.1), (math.nan, 1)]:
        with pytest.raises(ValueError, match="u_lo"):
            sample_sigma(DISTRIBUTION, 1, u_lo=u_lo, u_hi=u_hi)
