from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from t2i_experts.diffusion.noise import LogNormalSigma
from t2i_experts.diffusion.samplers import karras_sigmas
from t2i_experts.experts.interval import NoiseInterval, complement, node_name, parse_node

LOW, HIGH = NoiseInterval.node(3, 0), NoiseInterval.node(9, 511)
ALL = NoiseInterval(Fraction(0), Fraction(1))
(MIDDLE,) = complement([LOW, HIGH], ALL)


@pytest.mark.parametrize(
    ("level", "index", "lo", "hi"),
    [
        (0, 0, 0, math.inf),
        (1, 0, 0, 0.3012),
        (1, 1, 0.3012, math.inf),
        (2, 0, 0, 0.1341),
        (2, 1, 0.1341, 0.3012),
        (2, 2, 0.3012, 0.6766),
        (2, 3, 0.6766, math.inf),
        (3, 0, 0, 0.07574),
        (3, 7, 1.198, math.inf),
        (4, 15, 1.898, math.inf),
        (5, 31, 2.816, math.inf),
        (6, 63, 3.993, math.inf),
        (7, 127, 5.480, math.inf),
        (8, 255, 7.331, math.inf),
        (9, 511, 9.610, math.inf),
    ],
)
def test_edges_of_the_tree_to_four_digits(level: int, index: int, lo: float, hi: float) -> None:
    node = NoiseInterval.node(level, index)
    assert float(f"{node.sigma_lo:.4g}") == lo and float(f"{node.sigma_hi:.4g}") == hi
    assert node.share == Fraction(1, 2**level)


@pytest.mark.parametrize("u", [Fraction(1, 512), Fraction(1, 3), Fraction(1, 2), Fraction(2, 3), Fraction(511, 512)])
def test_edges_agree_with_the_standard_library(u: Fraction) -> None:
    edge = math.exp(-0.4 + 1.7 * NormalDist().inv_cdf(float(u)))
    assert NoiseInterval(Fraction(0), u, LogNormalSigma(-0.4, 1.7)).sigma_hi == pytest.approx(edge, rel=1e-12)


def test_the_complement_of_ediffi() -> None:
    assert (MIDDLE.u_lo, MIDDLE.u_hi) == (Fraction(1, 8), Fraction(511, 512))
    assert LOW.share + MIDDLE.share + HIGH.share == 1
    assert LOW.sigma_hi == MIDDLE.sigma_lo and MIDDLE.sigma_hi == HIGH.sigma_lo, "bit for bit"


@pytest.mark.parametrize(("steps", "shares"), [(18, (6, 8, 4)), (25, (9, 11, 5)), (40, (14, 18, 8)), (256, (86, 121, 49))])
def test_shares_of_a_karras_schedule(steps: int, shares: tuple[int, int, int]) -> None:
    """Published for high, middle and low noise; all n levels are somewhere, and the final 0 is nowhere."""
    sigmas = karras_sigmas(steps)
    assert tuple(interval.evaluations(sigmas) for interval in (HIGH, MIDDLE, LOW)) == shares
    assert sum(shares) == steps == ALL.evaluations(sigmas)


def test_half_open_at_the_edge_in_either_precision() -> None:
    edge = torch.tensor(LOW.sigma_hi, dtype=torch.float64)
    above = torch.nextafter(edge, edge + 1)
    assert LOW.contains(edge) and not MIDDLE.contains(edge)
    assert MIDDLE.contains(above) and not LOW.contains(above)
    assert LOW.contains(edge).shape == () and LOW.contains(torch.ones(2, 3)).shape == (2, 3)
    near = edge.float() + torch.arange(-4, 5) * 2.0**-27
    assert torch.equal(LOW.contains(near), near.double() <= edge), "the edge itself is never rounded"
    assert (LOW.contains(near) ^ MIDDLE.contains(near)).all()


def test_every_level_of_the_tree_partitions_all_positive_numbers() -> None:
    ends = torch.tensor([5e-324, 1e-300, 0.002, 80.0, 1e300, math.nextafter(math.inf, 0)], dtype=torch.float64)
    for level in range(8):
        nodes = [NoiseInterval.node(level, index) for index in range(2**level)]
        edges = torch.tensor([node.sigma_hi for node in nodes[:-1]], dtype=torch.float64)
        sigma = torch.cat([ends, edges, torch.nextafter(edges, edges + 1), torch.nextafter(edges, edges * 0)])
        assert (torch.stack([node.contains(sigma) for node in nodes]).sum(dim=0) == 1).all()
        assert all(a.u_hi == b.u_lo and a.sigma_hi == b.sigma_lo for a, b in pairwise(nodes))
        assert not any(node.contains(torch.zeros(())) for node in nodes)


class Extremes:
    """Stands in for torch.rand: its draws, between the smallest and largest numbers that it can draw."""

    def __init__(self) -> None:
        self.rand, self.tiny = torch.rand, torch.tensor([0.0, 2.0**-53, 2.0**-52], dtype=torch.float64)

    def __call__(self, size: tuple[int, ...], **options: object) -> Tensor:
        return torch.cat([self.tiny, self.rand(size[0] - 6, **options), 1 - 2.0**-53 - self.tiny])  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "interval",
    [
        HIGH,
        LOW,
        MIDDLE,
        ALL,
        NoiseInterval.node(3, 7),
        NoiseInterval.node(1, 0),
        NoiseInterval.node(45, 2**45 - 1),
        NoiseInterval.node(40, 3),
    ],
    ids=str,
)
def test_draws_are_finite_and_strictly_inside(monkeypatch: pytest.MonkeyPatch, interval: NoiseInterval) -> None:
    monkeypatch.setattr(torch, "rand", Extremes())
    sigma = interval.sample(1_000_000, generator=torch.Generator().manual_seed(0))
    assert sigma.dtype == torch.float64 and sigma.isfinite().all()
    assert sigma.min() > interval.sigma_lo and sigma.max() < interval.sigma_hi
    assert sigma.float().isfinite().all() and (sigma.float() > 0).all()
    assert len(sigma.unique()) > 990_000, "thin ranges are drawn from as finely as wide ones"


SIXTEEN_FLOATS = NoiseInterval.node(21, 2**20 + 1)


@pytest.mark.parametrize("interval", [HIGH, LOW, MIDDLE, ALL, SIXTEEN_FLOATS, NoiseInterval.node(45, 2**45 - 1)], ids=str)
def test_draws_in_float32_stay_inside(monkeypatch: pytest.MonkeyPatch, interval: NoiseInterval) -> None:
    """Rounding alone takes the outermost draws to an edge, or beyond it; the ends of thin intervals are but a few numbers apart."""
    v = Extremes()((200_000,), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma, exact = interval.from_uniform(v, torch.float32), interval.from_uniform(v)
    assert sigma.dtype == torch.float32 and interval.contains(sigma).all() and (sigma.double() < interval.sigma_hi).all()
    torch.testing.assert_close(sigma.double(), exact, rtol=2**-23, atol=0)
    if interval in (LOW, MIDDLE, SIXTEEN_FLOATS):
        assert not interval.contains(exact.float()).all()
    if interval == ALL:
        assert torch.equal(sigma, exact.float()), "where there is no edge nothing is moved"


def test_an_interval_without_a_float32_inside_can_be_no_networks() -> None:
    narrow = NoiseInterval.node(40, 2**39)
    assert narrow.ends(torch.float64)[0] < narrow.ends(torch.float64)[1]
    with pytest.raises(ValueError, match="too narrow: no float32 sigma lies inside"):
        narrow.ends(torch.float32)


@pytest.mark.parametrize("interval", [ALL, HIGH, MIDDLE], ids=str)
def test_edges_of_equally_probable_parts(interval: NoiseInterval) -> None:
    edges = interval.edges(4)
    assert (edges[0], edges[-1]) == (interval.sigma_lo, interval.sigma_hi)
    half = NoiseInterval(interval.u_lo, (interval.u_lo + interval.u_hi) / 2)
    assert edges[2] == half.sigma_hi and edges[1] == half.edges(2)[1]


def test_draws_follow_the_training_noise_inside() -> None:
    """Half of a node's draws lie in each of its children, and the complement's as its parts' shares say."""

    def shares(of: NoiseInterval, parts: list[NoiseInterval]) -> list[float]:
        sigma = of.sample((400, 1000), generator=torch.Generator().manual_seed(3))
        return [float(part.contains(sigma).double().mean()) for part in parts]

    for level, index in ((0, 0), (3, 0), (8, 255), (6, 20)):
        children = [NoiseInterval.node(level + 1, 2 * index + i) for i in (0, 1)]
        assert shares(NoiseInterval.node(level, index), children) == pytest.approx([0.5, 0.5], abs=0.004)
    parts = [NoiseInterval.node(3, i) for i in range(1, 7)]
    expected = [float(part.share / MIDDLE.share) for part in parts]
    assert shares(MIDDLE, parts) == pytest.approx(expected, abs=0.003)


def test_draws_repeat_with_their_generator() -> None:
    first, second, other = (HIGH.sample(5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert HIGH.sample((2, 3)).shape == (2, 3)


@dataclass(frozen=True)
class Bounded:
    """Noise between 1/4 and 5/4, as an imported model's schedule may have it."""

    def cdf(self, sigma: Tensor) -> Tensor:
        return (sigma.double() - 0.25).clamp(0, 1)

    def sf(self, sigma: Tensor) -> Tensor:
        return 1 - self.cdf(sigma)

    def icdf(self, u: Tensor) -> Tensor:
        return u.double() + 0.25

    def isf(self, q: Tensor) -> Tensor:
        return 1.25 - q.double()


def test_the_outer_intervals_answer_for_what_lies_beyond_the_training_noise() -> None:
    low, high = (NoiseInterval.node(1, index, Bounded()) for index in (0, 1))
    assert (low.sigma_lo, low.sigma_hi, high.sigma_lo, high.sigma_hi) == (0, 0.75, 0.75, math.inf)
    sigma = low.sample(10_000, generator=torch.Generator().manual_seed(0))
    assert sigma.min() >= 0.25 and sigma.max() < 0.75, "but are trained on nothing there"


def test_complements_are_exact() -> None:
    thirds = [NoiseInterval(Fraction(i, 3), Fraction(i + 1, 3)) for i in range(3)]
    assert complement(thirds, ALL) == []
    assert complement([], ALL) == [ALL]
    assert complement([thirds[1]], ALL) == [thirds[0], thirds[2]]
    assert complement([thirds[2], thirds[0]], ALL) == [thirds[1]]
    assert complement([LOW, NoiseInterval.node(1, 0), HIGH], ALL) == [NoiseInterval(Fraction(1, 2), Fraction(511, 512))], (
        "overlaps count once"
    )
    assert complement([thirds[0]], NoiseInterval.node(1, 1)) == [NoiseInterval.node(1, 1)]
    assert complement([HIGH], NoiseInterval.node(1, 0)) == [NoiseInterval.node(1, 0)]
    assert complement(thirds, MIDDLE) == []


def test_quantiles_are_fractions_whatever_they_were() -> None:
    tenth = NoiseInterval(0, 0.1)  # type: ignore[arg-type]
    assert tenth.u_hi == Fraction(0.1) != Fraction(1, 10) and isinstance(tenth.u_lo, Fraction)
    assert NoiseInterval(0.125, 511 / 512) == MIDDLE and hash(NoiseInterval(0.125, 511 / 512)) == hash(MIDDLE)  # type: ignore[arg-type]


@pytest.mark.parametrize(("lo", "hi"), [(-0.1, 0.5), (0.5, 0.5), (0.6, 0.5), (0.5, 1.1), (math.nan, 1), (0, math.nan)])
def test_quantiles_out_of_order_or_range_are_named(lo: float, hi: float) -> None:
    with pytest.raises(ValueError, match=r"u_lo=.*u_hi=.*0 <= u_lo < u_hi <= 1"):
        NoiseInterval(lo, hi)  # type: ignore[arg-type]


def test_an_interval_without_a_number_inside_is_refused() -> None:
    with pytest.raises(ValueError, match="too narrow"):
        NoiseInterval(Fraction(1, 3), Fraction(1, 3) + Fraction(1, 10**20))


@pytest.mark.parametrize(("level", "index"), [(0, 0), (3, 0), (9, 511), (52, 2**52 - 1)])
def test_names_of_nodes_come_back(level: int, index: int) -> None:
    assert parse_node(node_name(level, index)) == (level, index)
    assert node_name(9, 511) == "E^9_511"


@pytest.mark.parametrize("name", ["complement", "root", "E^3", "E3_0", "E^03_0", "E^3_00", "E^-1_0", "E^3_0 ", "e^3_0", ""])
def test_other_names_are_no_nodes(name: str) -> None:
    assert parse_node(name) is None


@pytest.mark.parametrize("name", ["E^3_8", "E^0_1", "E^53_0", "E^99999999999_0"])
def test_nodes_that_there_cannot_be(name: str) -> None:
    with pytest.raises(ValueError, match="is no node"):
        parse_node(name)
