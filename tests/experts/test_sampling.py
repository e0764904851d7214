"""Schedules and guidance of particular experts: what is not said stays as it was, and what is said holds in that expert's range alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from t2i_experts.config import ExpertSamplingConfig, SamplingConfig
from t2i_experts.diffusion.guidance import ScaleBySigma
from t2i_experts.diffusion.samplers import karras_sigmas
from t2i_experts.experts.interval import NoiseInterval
from t2i_experts.experts.sampling import guidance_scale, schedule

EDGES = [Fraction(u) for u in ("0", "1/8", "511/512", "1")]
LEAVES = dict(zip(("E^3_0", "complement", "E^9_511"), itertools.starmap(NoiseInterval, pairwise(EDGES)), strict=True))
LOW, MIDDLE, HIGH = LEAVES.values()


def sampling(steps: int = 25, rho: float = 7.0, **own: int) -> SamplingConfig:
    names = {"low": "E^3_0", "middle": "complement", "high": "E^9_511"}
    return SamplingConfig(steps=steps, rho=rho, experts={names[key]: ExpertSamplingConfig(steps=n) for key, n in own.items()})


@pytest.mark.parametrize("leaves", [{}, LEAVES])
@pytest.mark.parametrize("steps", [1, 2, 25])
def test_without_counts_the_schedule_is_karras(leaves: Mapping[str, NoiseInterval], steps: int) -> None:
    guided = SamplingConfig(steps=steps, experts={name: ExpertSamplingConfig(guidance=2.0) for name in leaves})
    assert torch.equal(schedule(guided, leaves), karras_sigmas(steps))


@pytest.mark.parametrize("rho", [1.0, 7.0])
@pytest.mark.parametrize(("low", "middle", "high"), [(1, 1, 1), (2, 3, 4), (5, 11, 9), (40, 1, 7)])
def test_every_leaf_has_the_levels_it_was_given(low: int, middle: int, high: int, rho: float) -> None:
    sigmas = schedule(sampling(low=low, middle=middle, high=high, rho=rho), LEAVES)
    assert [interval.evaluations(sigmas) for interval in (LOW, MIDDLE, HIGH)] == [low, middle, high]
    assert len(sigmas) == low + middle + high + 1 and (sigmas.diff() < 0).all() and sigmas.dtype == torch.float64
    assert sigmas[0] == 80.0 and sigmas[high] == MIDDLE.sigma_hi and sigmas[high + middle] == LOW.sigma_hi, "upper edges, exactly"
    assert sigmas[-1] == 0 and (low == 1 or sigmas[-2] == 0.002)
    roots = sigmas[:-1] ** (1 / rho)
    for part, last in ((roots[: high + 1], False), (roots[high : high + middle + 1], False), (roots[high + middle :], True)):
        steps = part.diff()
        torch.testing.assert_close(steps, steps[:1].expand_as(steps) if len(steps) else steps, rtol=1e-6, atol=1e-12)
        assert last or len(steps), "the next leaf begins one equal step after the last level"


def test_a_leaf_without_a_count_keeps_its_part_of_the_common_schedule() -> None:
    common = karras_sigmas(25)
    sigmas = schedule(sampling(high=4), LEAVES)
    assert torch.equal(sigmas[4:], common[9:]) and len(sigmas) == 1 + 4 + 11 + 5
    sigmas = schedule(sampling(middle=3), LEAVES)
    assert torch.equal(sigmas[:9], common[:9]) and torch.equal(sigmas[12:], common[20:]) and sigmas[9] == MIDDLE.sigma_hi


def test_the_range_that_is_sampled_bounds_the_outer_leaves() -> None:
    narrow = SamplingConfig(sigma_min=0.01, sigma_max=20.0, experts={"E^3_0": ExpertSamplingConfig(steps=3)})
    sigmas = schedule(narrow, LEAVES)
    assert sigmas[0] == 20.0 and sigmas[-2] == 0.01 and sigmas[-4] == LOW.sigma_hi
    within = SamplingConfig(sigma_min=0.5, sigma_max=5.0, experts={"complement": ExpertSamplingConfig(steps=3)})
    torch.testing.assert_close(schedule(within, LEAVES), karras_sigmas(3, 0.5, 5.0))
    for bounds in ({"sigma_max": 5.0}, {"sigma_max": MIDDLE.sigma_hi}):
        beyond = SamplingConfig(**bounds, experts={"E^9_511": ExpertSamplingConfig(steps=3)})  # type: ignore[arg-type]
        with pytest.raises(
            ValueError, match=r"experts\.E\^9_511\.steps=3 would be ignored: .* nothing to sample in sigma in \(9\.61, inf\)"
        ):
            schedule(beyond, LEAVES)
    with pytest.raises(ValueError, match=r"E\^3_0\.steps=3 would be ignored"):
        schedule(SamplingConfig(sigma_min=0.1, experts={"E^3_0": ExpertSamplingConfig(steps=3)}), LEAVES)


def test_guidance_holds_in_the_leafs_range() -> None:
    own = SamplingConfig(guidance=4.0, experts={"E^9_511": ExpertSamplingConfig(7.0), "E^3_0": ExpertSamplingConfig(1.0)})
    scale = guidance_scale(own, LEAVES)
    assert isinstance(scale, ScaleBySigma)
    sigmas = torch.cat([karras_sigmas(50)[:-1], torch.tensor([LOW.sigma_hi, MIDDLE.sigma_hi], dtype=torch.float64)])
    expected = torch.where(LOW.contains(sigmas), 1.0, torch.where(HIGH.contains(sigmas), 7.0, 4.0))
    assert [scale.at(float(sigma)) for sigma in sigmas] == expected.tolist() == scale.of(sigmas).tolist()
    assert guidance_scale(SamplingConfig(guidance=4.0), LEAVES) == 4.0


@pytest.mark.parametrize("leaves", [{}, LEAVES])
def test_a_leaf_that_is_not_there_is_named(leaves: Mapping[str, NoiseInterval]) -> None:
    wrong = SamplingConfig(experts={"E^2_0": ExpertSamplingConfig(7.0, 3)})
    for function in (schedule, guidance_scale):
        with pytest.raises(ValueError, match=r"sampling\.experts\.E\^2_0: .*" + ("E\\^3_0, complement" if leaves else "single network")):
            function(wrong, leaves)


def test_what_is_said_for_all_takes_the_place_of_the_experts_own() -> None:
    own = SamplingConfig(experts={"E^9_511": ExpertSamplingConfig(7.0, 3), "E^3_0": ExpertSamplingConfig(steps=2)})
    assert own.for_all() == own
    assert own.for_all(guidance=2.0).experts == {"E^9_511": ExpertSamplingConfig(None, 3), "E^3_0": ExpertSamplingConfig(steps=2)}
    assert own.for_all(steps=9).experts == {"E^9_511": ExpertSamplingConfig(7.0)}
    assert own.for_all(steps=9, guidance=2.0) == SamplingConfig(steps=9, guidance=2.0)
