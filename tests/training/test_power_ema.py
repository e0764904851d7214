"""The power-function average against its definition, and what is made of snapshots against what was tracked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from t2i_experts.training.power_ema import (
    PowerFunctionEMA,
    Profile,
    inner_products,
    posthoc_coefficients,
    power_beta,
    sigma_rel_to_gamma,
)

TAU = (np.arange(200_000) + 0.5) / 200_000  # midpoints of (0, 1)


def density(gamma: float, end: float = 1.0) -> np.ndarray:
    """p(tau) at TAU by its definition, not normalised by hand."""
    raw = np.where(end >= TAU, (TAU / end) ** gamma, 0.0)
    return raw / raw.mean()


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_sigma_rel_is_the_standard_deviation_of_the_profile(sigma_rel: float) -> None:
    p = density(sigma_rel_to_gamma(sigma_rel))
    mean = (p * TAU).mean()
    assert np.sqrt((p * (TAU - mean) ** 2).mean()) == pytest.approx(sigma_rel, rel=1e-6)
    assert sigma_rel_to_gamma(sigma_rel) > 0


def test_gammas_of_the_paper() -> None:
    assert sigma_rel_to_gamma(0.05) == pytest.approx(16.97, abs=0.005)
    assert sigma_rel_to_gamma(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.289, float("nan")])
def test_a_width_that_no_profile_has(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=f"sigma_rel={sigma_rel} must be positive and below 0.2887"):
        PowerFunctionEMA(nn.Linear(1, 1), [sigma_rel])


class Weights(nn.Module):
    """A network of one parameter, (N,)."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values.clone())


def test_weights_of_the_steps_are_the_profile_and_sum_to_one() -> None:
    """The network after step k is the k-th unit vector, so the average holds the weight of each step; that before the first has none."""
    steps, batch, sigma_rel = 200, 8, 0.1
    unit = torch.eye(steps)
    ema = PowerFunctionEMA(Weights(torch.full((steps,), 1e6)), [sigma_rel])
    for k in range(steps):
        ema.update(Weights(unit[k]), batch, (k + 1) * batch)
    weights = ema.network.values.double()
    assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
    expected = density(sigma_rel_to_gamma(sigma_rel)).reshape(steps, -1).mean(1) / steps
    torch.testing.assert_close(weights, torch.from_numpy(expected), rtol=1e-3, atol=1e-7)


def test_the_average_does_not_depend_on_how_the_images_are_cut_into_steps() -> None:
    gamma = sigma_rel_to_gamma(0.08)
    halves = power_beta(gamma, 4, 36) * power_beta(gamma, 4, 40)
    assert halves == pytest.approx(power_beta(gamma, 8, 40))
    assert power_beta(gamma, 8, 8) == 0


def test_averages_are_frozen_copies_and_the_first_is_the_one_to_show() -> None:
    network = nn.Linear(2, 2)
    ema = PowerFunctionEMA(network, [0.1, 0.05])
    before = network.weight.detach().clone()
    for k in range(1, 9):
        nn.init.constant_(network.weight, k)
        ema.update(network, 1, k)
    assert not torch.equal(ema.network.weight, before)
    assert not any(p.requires_grad for p in ema.networks.parameters())
    assert ema.network is ema.networks[0]
    assert float(ema.networks[0].weight.mean()) < float(ema.networks[1].weight.mean()), "the narrower one is nearer to the end"


def test_going_on_equals_never_stopping() -> None:
    torch.manual_seed(0)
    walk = torch.randn(20, 50).cumsum(0)
    unbroken, broken, resumed = (PowerFunctionEMA(Weights(torch.zeros(50)), [0.05, 0.1]) for _ in range(3))
    for k in range(20):
        unbroken.update(Weights(walk[k]), 4, 4 * (k + 1))
        if k < 11:
            broken.update(Weights(walk[k]), 4, 4 * (k + 1))
    resumed.load_state_dict({name: tensor.clone() for name, tensor in broken.state_dict().items()})
    for k in range(11, 20):
        resumed.update(Weights(walk[k]), 4, 4 * (k + 1))
    for name, tensor in unbroken.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_inner_products_are_integrals() -> None:
    profiles = [Profile(1000, 0.05), Profile(1000, 0.1), Profile(700, 0.2), Profile(400, 0.1)]
    densities = [density(sigma_rel_to_gamma(p.sigma_rel), p.images_seen / 1000) for p in profiles]
    expected = [[(a * b).mean() / 1000 for b in densities] for a in densities]
    np.testing.assert_allclose(inner_products(profiles, profiles), expected, rtol=1e-4)


def test_a_tracked_profile_is_met_exactly_and_others_closely() -> None:
    tracked = [Profile(100 * k, s) for k in range(1, 33) for s in (0.05, 0.1)]
    coefficients, error = posthoc_coefficients(tracked, Profile(1600, 0.1))
    assert coefficients.tolist() == [float(p == Profile(1600, 0.1)) for p in tracked]
    assert error == 0
    for sigma_rel, bound in [(0.07, 2e-3), (0.15, 5e-3), (0.25, 0.05), (0.03, 0.02)]:
        coefficients, error = posthoc_coefficients(tracked, Profile(3200, sigma_rel))
        assert coefficients.sum() == pytest.approx(1, abs=1e-9)
        assert 0 < error < bound
        gammas = [sigma_rel_to_gamma(p.sigma_rel) for p in tracked]
        reached = sum(c * density(g, p.images_seen / 3200) for c, g, p in zip(coefficients, gammas, tracked, strict=True))
        wanted = density(sigma_rel_to_gamma(sigma_rel))
        assert error == pytest.approx(np.sqrt(((reached - wanted) ** 2).mean() / (wanted**2).mean()), rel=0.01)
        assert error < min(np.sqrt(((density(g) - wanted) ** 2).mean() / (wanted**2).mean()) for g in gammas[:2]) / 10
