"""The toy experiment: its ideal denoiser and its distance are what they claim, and every row of its table is made."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from t2i_experts.types import Conditioning, Embedding

SCRIPTS = Path(__file__).parents[2] / "scripts" / "experiments"


@pytest.fixture(scope="module")
def toy() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        import toy_data
        import toy_experts
        import toy_report

        patch.setattr(toy_experts, "denoising_loss", partial(toy_experts.denoising_loss, count=64))
        yield SimpleNamespace(data=toy_data, experts=toy_experts, report=toy_report, points=toy_data.spiral_of_rings())


def test_the_ideal_denoiser_follows_the_slope_of_the_density(toy: SimpleNamespace) -> None:
    """Tweedie: E[y | x] = x + sigma^2 grad log p(x)."""
    sigma = torch.tensor([0.01, 0.1, 0.5, 3.0]).repeat(64)
    generator = torch.Generator().manual_seed(0)
    x = toy.points.sample(256, generator) + sigma[:, None, None, None] * torch.randn(256, 2, 1, 1, generator=generator)
    at = x[:, :, 0, 0].double().requires_grad_()
    variance = (sigma.double().square() + toy.points.std**2)[:, None]
    distance = (at[:, None] - toy.points.centres.double()).square().sum(-1)
    (slope,) = torch.autograd.grad(torch.logsumexp(-distance / (2 * variance), dim=1).sum(), at)
    ideal = x[:, :, 0, 0] + sigma[:, None] ** 2 * slope
    torch.testing.assert_close(toy.points.denoise(x, sigma)[:, :, 0, 0].double(), ideal, rtol=1e-3, atol=1e-3)


def test_points_have_the_scale_that_the_denoiser_expects(toy: SimpleNamespace) -> None:
    points = toy.points.spread(98 * 50, torch.Generator().manual_seed(1))[:, :, 0, 0]
    assert points.mean(0).tolist() == pytest.approx([0, 0], abs=1e-3) and points.std(0).tolist() == pytest.approx([0.5, 0.5], abs=1e-3)


def test_the_distance_of_shifted_points_is_their_shift_seen_from_all_sides(toy: SimpleNamespace) -> None:
    points = toy.points.sample(2000, torch.Generator().manual_seed(2))
    shifted = points + torch.tensor([0.3, 0.0])[None, :, None, None]
    assert toy.data.sliced_wasserstein(points, points) == 0
    assert toy.data.sliced_wasserstein(points, shifted) == pytest.approx(0.3 * 2 / torch.pi, rel=1e-3)


def test_all_that_is_compared_is_made_and_the_table_has_a_row_for_each(toy: SimpleNamespace) -> None:
    plan = toy.experts.grow(root_steps=4, steps=1)
    assert [leaf.name for leaf in plan.leaves] == ["E^3_0", "complement", "E^3_7"] and len(plan.nodes) == 8
    grown = toy.experts.run(0, toy.points, plan, 4)
    x, sigma, nothing = torch.randn(3, 2, 1, 1), torch.tensor([0.01, 0.3, 5.0]), Conditioning({"none": Embedding.null(3, 1, 1)})
    answers = {name: denoiser(x, sigma, nothing) for name, denoiser in grown.denoisers.items()}
    assert all(answer.shape == x.shape and answer.isfinite().all() for answer in answers.values())
    assert not torch.equal(answers["root"], answers["three experts"])
    assert grown.bytes["root"] < grown.bytes["low rank, trained"] < grown.bytes["three experts"] == 3 * grown.bytes["root"]
    rows = {name: {"all noise": 0.1, "distance": 0.2} for name in [*grown.denoisers, "fresh points"]}
    text = toy.report.table([rows, rows], ["all noise"], grown.bytes, {name: [weights] for name, weights in grown.weights.items()})
    assert text.count("100.0 ± 0.0") == 2 * len(grown.bytes) + 1 and "Weights of merged" in text
