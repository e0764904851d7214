"""Training of experts that are to be merged: the loss near the parent, draws from beyond the own noise, projections that fold away."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from t2i_experts.config import ResolutionSpec
from t2i_experts.diffusion.loss import EDMLoss
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.experts.decouple import DecoupleLoss, ProbabilisticInterval
from t2i_experts.experts.interval import NoiseInterval
from t2i_experts.experts.merge import merge
from t2i_experts.experts.projections import add_projections, fold
from t2i_experts.nn.unet import UNet
from t2i_experts.types import Conditioning, Embedding

GENERATOR = torch.Generator().manual_seed(0)
IMAGES, EPS = torch.randn(2, 4, 3, 8, 8, generator=GENERATOR) / 2
SIGMA = torch.tensor([0.02, 0.3, 2.0, 30.0])
PROMPTS = Conditioning({"t5": Embedding(torch.randn(4, 3, 6, generator=GENERATOR), torch.ones(4, 3) > 0)})
LOW = NoiseInterval.node(3, 0)


class Constant:
    """Denoises everything to one number."""

    def __init__(self, value: float) -> None:
        self.value = torch.tensor(value, requires_grad=True)

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return self.value.expand_as(x)


def test_without_weight_it_is_the_loss_of_edm() -> None:
    expert = Constant(0.3)
    ours = DecoupleLoss(Constant(-0.5), weight=0.0)(expert, IMAGES, SIGMA, EPS, PROMPTS)
    assert torch.equal(ours, EDMLoss()(expert, IMAGES, SIGMA, EPS, PROMPTS))


@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0])
def test_its_minimum_lies_between_the_data_and_the_parent(weight: float) -> None:
    parent, expert = Constant(-0.5), Constant(0.0)
    target = float((IMAGES.mean() + weight * -0.5) / (1 + weight))
    with torch.no_grad():
        expert.value.fill_(target)
    same_noise = torch.full((4,), 0.3)
    loss = DecoupleLoss(parent, weight)(expert, IMAGES, same_noise, EPS, PROMPTS).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert expert.value.grad is not None and expert.value.grad.abs() < 1e-4 * loss
    assert parent.value.grad is None


def test_the_distance_from_the_parent_is_weighed_as_the_noise_that_it_predicts() -> None:
    """In predicted noise the paper's two terms are plain; here both carry the same lambda sigma^2."""
    parent, expert = Constant(0.1), Constant(0.3)
    both = DecoupleLoss(parent, 2.0)(expert, IMAGES, SIGMA, EPS, PROMPTS)
    one = EDMLoss()(expert, IMAGES, SIGMA, EPS, PROMPTS)
    scale = EDMLoss().weight(SIGMA) * SIGMA.square()
    torch.testing.assert_close((both - one) / scale, 2 * (0.2 / SIGMA).square())


def test_shares_of_own_and_other_noise() -> None:
    draws = ProbabilisticInterval(LOW, 0.3).sample(200_000, generator=torch.Generator().manual_seed(1))
    assert draws.dtype == torch.float64
    inside = float(LOW.contains(draws).double().mean())
    assert inside == pytest.approx(0.7 + 0.3 / 8, abs=0.004)
    beyond = draws[~LOW.contains(draws)]
    quantiles = LOW.distribution.cdf(beyond)
    assert float(quantiles.mean()) == pytest.approx((1 / 8 + 1) / 2, abs=0.004), "evenly over the rest"
    own = LOW.distribution.cdf(draws[LOW.contains(draws)])
    assert float(own.mean()) == pytest.approx(1 / 16, abs=0.001)


@pytest.mark.parametrize("interval", [LOW, NoiseInterval.node(9, 511)])
def test_the_ends_of_the_probability(interval: NoiseInterval) -> None:
    v = torch.tensor([0.0, 2.0**-53, 0.25, 0.7, 0.7 + 1e-16, 1 - 2.0**-53], dtype=torch.float64)
    assert torch.equal(ProbabilisticInterval(interval, 0.0).from_uniform(v), interval.from_uniform(v))
    everything = NoiseInterval(Fraction(0), Fraction(1))
    assert torch.equal(ProbabilisticInterval(interval, 1.0).from_uniform(v), everything.from_uniform(v))
    mixed = ProbabilisticInterval(interval, 0.3).from_uniform(v)
    assert mixed.isfinite().all() and (mixed > 0).all()
    assert interval.contains(mixed[:3]).all() and torch.equal(mixed[3:4], everything.from_uniform(v[:1])), "all noise from 0.7 on"
    singles = ProbabilisticInterval(interval, 0.3).from_uniform(v, torch.float32)
    assert singles.dtype == torch.float32 and interval.contains(singles[:3]).all()
    assert torch.equal(ProbabilisticInterval(interval, 0.0).from_uniform(v, torch.float32), interval.from_uniform(v, torch.float32))


def test_the_largest_number_is_finite_for_every_probability() -> None:
    """Divided by p, it may come to 1, which stands for infinite noise."""
    v = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    largest = torch.cat([ProbabilisticInterval(LOW, i / 64 + 1e-3).from_uniform(v) for i in range(63)])
    assert largest.max() < 1e6


def test_wrong_values_are_refused() -> None:
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="p="):
            ProbabilisticInterval(LOW, p)
    with pytest.raises(ValueError, match="weight=-1"):
        DecoupleLoss(Constant(0.0), -1.0)


def denoiser(seed: int = 0) -> EDMPrecond:
    torch.manual_seed(seed)
    network = UNet(
        [ResolutionSpec(16, 2), ResolutionSpec(24, 1, True, True)],
        {"t5": (6, 0)},
        embedding_channels=16,
        context_channels=12,
        head_channels=8,
    )
    for parameter in network.parameters():
        if parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.05)
    return EDMPrecond(network).to(memory_format=torch.channels_last)


def answer(model: EDMPrecond) -> Tensor:
    result: Tensor = model(IMAGES + SIGMA[:, None, None, None] * EPS, SIGMA, PROMPTS)
    return result


def trained(model: EDMPrecond, parent: EDMPrecond, seed: int = 0, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    loss = DecoupleLoss(parent)
    for step in range(steps):
        eps = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(100 * seed + step))
        optimizer.zero_grad()
        loss(model, IMAGES, SIGMA, eps, PROMPTS).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("placement", ["branch", "stream"])
def test_projections_start_as_the_identity_and_train(placement: str) -> None:
    root, model = denoiser(), denoiser()
    add_projections(model, placement)  # type: ignore[arg-type]
    assert torch.equal(answer(model), answer(root))
    added = {n: p for n, p in model.named_parameters() if "matrix" in n or "projection" in n}
    before = {name: p.detach().clone() for name, p in added.items()}
    trained(model, root)
    assert all(not torch.equal(p, before[name]) for name, p in added.items())
    if placement == "stream":
        places = [name.removeprefix("network.").removesuffix(".projection.weight") for name in added]
        assert places == ["down.1", "down.3", "middle.1", "up.1", "up.5"], "two resolutions down, the middle, two resolutions up"
        assert fold(model.state_dict()).keys() == model.state_dict().keys()
    else:
        blocks = [name for name in root.state_dict() if name.endswith("conv_out.weight") and "residual" in name]
        assert len(added) == len(blocks) == 12


def test_folding_gives_an_ordinary_network_with_the_same_answers() -> None:
    root, model = denoiser(), denoiser()
    add_projections(model, "branch")
    trained(model, root)
    plain = denoiser(1)
    plain.load_state_dict(fold(model.state_dict()))
    assert list(fold(model.state_dict())) != list(model.state_dict()) and set(fold(model.state_dict())) == set(root.state_dict())
    assert (answer(plain) - answer(model)).abs().max() < 1e-5
    assert (answer(plain) - answer(root)).abs().max() > 1e-2
    unprojected = {
        name.replace(".parametrizations.weight.original", ".weight"): t for name, t in model.state_dict().items() if "matrix" not in name
    }
    plain.load_state_dict(unprojected)
    assert (answer(plain) - answer(model)).abs().max() > 1e-3, "the projections had their part"


def test_a_projection_of_the_weight_is_one_of_the_branch() -> None:
    """Against a 1x1 convolution of the branch's output."""
    model = denoiser()
    add_projections(model, "branch")
    block = model.network.down[0].residual  # type: ignore[attr-defined]
    nn.init.normal_(block.conv_out.parametrizations.weight[0].matrix)
    matrix = block.conv_out.parametrizations.weight[0].matrix
    h = torch.randn(2, 8, 8, 16)
    plain = copy.deepcopy(block.conv_out)
    nn.init.eye_(plain.parametrizations.weight[0].matrix)
    torch.testing.assert_close(block.conv_out(h), plain(h) @ matrix.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("placement", ["branch", "stream"])
def test_projected_experts_merge_into_one_network(placement: str) -> None:
    root = denoiser()
    projected = copy.deepcopy(root)
    add_projections(projected, placement)  # type: ignore[arg-type]
    experts = [copy.deepcopy(projected) for _ in range(2)]
    for seed, expert in enumerate(experts):
        trained(expert, root, seed)
    merged = copy.deepcopy(projected)
    if placement == "branch":  # folded first, so that the root needs no projections
        merged = denoiser(1)
        merged.load_state_dict(merge(root.state_dict(), [fold(e.state_dict()) for e in experts], [1.0, 0.0]))
    else:
        merged.load_state_dict(merge(projected.state_dict(), [e.state_dict() for e in experts], [1.0, 0.0]))
    torch.testing.assert_close(answer(merged), answer(experts[0]), rtol=1e-5, atol=1e-5)


def test_checkpointed_blocks_project_too() -> None:
    model = denoiser()
    add_projections(model, "stream")
    for parameter in (p for n, p in model.named_parameters() if "projection" in n):
        nn.init.normal_(parameter, std=0.2)
    again = copy.deepcopy(model)
    for module in again.modules():
        if hasattr(module, "checkpointed"):
            module.checkpointed = True
    torch.testing.assert_close(answer(again), answer(model))
    answer(model).square().sum().backward()
    answer(again).square().sum().backward()
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_a_network_without_the_places_is_refused() -> None:
    with pytest.raises(ValueError, match="placement=branch: Linear has no ResidualBlock"):
        add_projections(nn.Linear(2, 2), "branch")
