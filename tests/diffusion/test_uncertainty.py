"""The learned weighting of noise levels against what its objective promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from t2i_experts.diffusion.noise import LogNormalSigma
from t2i_experts.diffusion.uncertainty import UncertaintyWeighting

NOISE = LogNormalSigma(-1.2, 1.2)
LEVELS = NOISE.icdf(torch.linspace(0.02, 0.98, 25, dtype=torch.float64)).float()


def expected_loss(sigma: Tensor) -> Tensor:
    """A loss that falls from 0.9 to 0.02 over the noise levels, as EDM's does."""
    return 0.02 + 0.88 * torch.sigmoid(-1.5 * (sigma.log() + 1.2))


@pytest.fixture(scope="module")
def learned() -> UncertaintyWeighting:
    """After 2000 steps on losses that scatter about `expected_loss` by a factor with mean 1."""
    weighting, generator = UncertaintyWeighting(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(weighting.parameters())
    for step in range(2000):
        sigma = NOISE.sample(256, generator=generator)
        scatter = -torch.log1p(-torch.rand(256, generator=generator))  # exponential
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 2000)
        optimizer.zero_grad()
        weighting.objective(expected_loss(sigma) * scatter, sigma).mean().backward()
        optimizer.step()
    return weighting


def test_it_begins_as_the_plain_loss() -> None:
    losses, weighting = torch.rand(25), UncertaintyWeighting()
    assert torch.equal(weighting.objective(losses, LEVELS), losses)


def test_u_is_learned_to_be_the_logarithm_of_the_expected_loss(learned: UncertaintyWeighting) -> None:
    torch.testing.assert_close(learned(LEVELS), expected_loss(LEVELS).log(), atol=0.1, rtol=0)


def test_all_noise_levels_then_pull_equally_hard(learned: UncertaintyWeighting) -> None:
    """A network with one scale for each noise level: the gradients with respect to the logarithms of the scales agree."""
    log_scales = torch.zeros(25, requires_grad=True)
    losses = expected_loss(LEVELS) * log_scales.exp()
    plain = torch.autograd.grad(losses.sum(), log_scales, retain_graph=True)[0]
    assert plain.max() / plain.min() > 10
    weighted = torch.autograd.grad(learned.objective(losses, LEVELS).sum(), log_scales)[0]
    torch.testing.assert_close(weighted, torch.ones(25), atol=0.1, rtol=0)
