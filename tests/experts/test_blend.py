"""Blends of two experts: the algebra, what an evaluation costs, and that all of it trains."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from t2i_experts.diffusion.guidance import ClassifierFreeGuidance
from t2i_experts.diffusion.loss import EDMLoss
from t2i_experts.diffusion.noise import LogNormalSigma
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.diffusion.samplers import karras_sigmas, sample_heun
from t2i_experts.experts.blend import RatioBlend
from t2i_experts.experts.ensemble import ExpertEnsemble
from t2i_experts.experts.interval import NoiseInterval
from t2i_experts.experts.ratio import LearnedRatio, LinearRatio, Ratio, SigmoidRatio
from t2i_experts.types import Conditioning, Embedding

SIGMAS = torch.tensor([0.003, 0.05, 0.3, 0.45, 7.0, 60.0])
X = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * (1 + SIGMAS[:, None, None, None])
PROMPTS = Conditioning({"text": Embedding(torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(1)), torch.ones(6, 3) > 0)})


class Pixelwise(nn.Module):
    """A network of every pixel, the noise and the prompt, which counts its rows and its projections."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(4, 8)
        self.hidden = nn.Linear(3, 8)
        self.out = nn.Linear(8, 2)
        self.rows: list[int] = []
        self.projections = 0

    def project(self, embeddings: Mapping[str, Embedding]) -> dict[str, Tensor]:
        self.projections += 1
        return {"text": self.text(embeddings["text"].tokens.mean(dim=1))}

    def forward(self, x: Tensor, c_noise: Tensor, projected: Mapping[str, Tensor]) -> Tensor:
        self.rows.append(len(x))
        noise = c_noise.to(x.dtype)[:, None, None, None].expand(-1, -1, *x.shape[2:])
        h = self.hidden(torch.cat([x, noise], 1).permute(0, 2, 3, 1)) + projected["text"][:, None, None]
        return self.out(torch.tanh(h)).permute(0, 3, 1, 2)


def expert(seed: int) -> EDMPrecond:
    torch.manual_seed(seed)
    return EDMPrecond(Pixelwise())


def blend(ratio: Ratio, saturation: float = 1e-3) -> RatioBlend:
    return RatioBlend(expert(1), expert(2), ratio, saturation=saturation)


def constant(r: float) -> Ratio:
    return lambda sigma: torch.full_like(sigma, r, dtype=torch.float64)


def counted(model: RatioBlend) -> tuple[list[int], list[int]]:
    return model.high.network.rows, model.low.network.rows  # type: ignore[attr-defined]


@pytest.mark.parametrize("at", [SIGMAS, *SIGMAS.double()[2:4]])
def test_the_sum_of_what_the_experts_denoise_alone(at: Tensor) -> None:
    model = blend(constant(0.3))
    high, low = model.apart(X, at, PROMPTS)
    assert torch.equal(high, expert(1)(X, at, PROMPTS)) and torch.equal(low, expert(2)(X, at, PROMPTS))
    torch.testing.assert_close(model(X, at, PROMPTS), 0.3 * high + 0.7 * low, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(high, low, atol=1e-2)


@pytest.mark.parametrize("at", [SIGMAS, torch.tensor(0.4, dtype=torch.float64)])
@pytest.mark.parametrize(("r", "seed"), [(1.0, 1), (0.0, 2), (0.9995, 1), (0.0005, 2)])
def test_where_the_ratio_saturates_one_expert_answers_and_alone(at: Tensor, r: float, seed: int) -> None:
    model = blend(constant(r))
    assert torch.equal(model(X, at, PROMPTS), expert(seed)(X, at, PROMPTS)), "to the last bit"
    evaluated = counted(model)
    assert evaluated[seed - 1] == [6] and evaluated[2 - seed] == []


def test_without_saturation_only_exact_ends_leave_an_expert_out() -> None:
    model = blend(constant(1e-9), saturation=0.0)
    model(X, SIGMAS[0], PROMPTS)
    assert counted(model) == ([6], [6])
    model = blend(constant(0.0), saturation=0.0)
    model(X, SIGMAS[0], PROMPTS)
    assert counted(model) == ([], [6])


def test_rows_that_need_one_expert_cost_that_one() -> None:
    model = blend(SigmoidRatio(40.0))
    r = model.saturated(SIGMAS)
    assert (r == 0).sum() == 2 and (r == 1).sum() == 2, "quantiles below .33 and above .67"
    together = model(X, SIGMAS, PROMPTS)
    assert counted(model) == ([4], [4])
    alone = [model(X[i : i + 1], SIGMAS[i], PROMPTS.rows(i, i + 1)) for i in range(6)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_projections_are_made_once_a_prompt_also_under_guidance() -> None:
    model = blend(SigmoidRatio(40.0))
    null = PROMPTS.rows(0, 1).map(torch.zeros_like)
    guided = ClassifierFreeGuidance(model, null, 2.0)
    sigmas = karras_sigmas(8)
    unprepared = sample_heun(guided, 80 * X, sigmas, PROMPTS)
    before = [model.high.network.projections, model.low.network.projections]  # type: ignore[attr-defined]
    prepared = sample_heun(guided, 80 * X, sigmas, guided.prepare(PROMPTS))
    after = [model.high.network.projections, model.low.network.projections]  # type: ignore[attr-defined]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1]
    assert torch.equal(prepared, unprepared)
    assert model.prepare(once := model.prepare(PROMPTS)) is once


def test_prepared_rows_are_the_rows_of_the_experts() -> None:
    model = blend(SigmoidRatio(40.0))
    assert torch.equal(model(X, SIGMAS, model.prepare(PROMPTS)), model(X, SIGMAS, PROMPTS))


def test_a_blend_can_be_an_expert_of_an_ensemble() -> None:
    """Of an ensemble's networks, each projects a prompt for itself; so do the two of the blend."""
    model, other = blend(SigmoidRatio(5.0, 0.2)), expert(3)
    ensemble = ExpertEnsemble([(NoiseInterval.node(1, 0), model), (NoiseInterval.node(1, 1), other)])
    prepared = ensemble.prepare(PROMPTS)
    for _ in range(2):
        assert torch.equal(ensemble(X, SIGMAS[1].double(), prepared), model(X, SIGMAS[1].double(), PROMPTS))
    assert model.high.network.projections == 1 + 2  # type: ignore[attr-defined]


def test_the_projections_of_a_single_network_are_refused() -> None:
    model = blend(constant(0.5))
    for call in (lambda c: model(X, SIGMAS, c), model.prepare):
        with pytest.raises(ValueError, match="projections of a single network"):
            call(expert(1).prepare(PROMPTS))


def test_the_linear_ratio_is_the_quantile() -> None:
    noise = LogNormalSigma(-0.4, 1.0)
    edges = noise.icdf(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    torch.testing.assert_close(LinearRatio(noise)(edges), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    assert LinearRatio()(SIGMAS[0]).shape == ()


def test_the_hard_split_is_that_of_intervals_and_the_limit_of_sigmoids() -> None:
    """At the edge and one number beside it, where the sigmoid of the quantile cannot tell."""
    edge = torch.tensor(NoiseInterval.node(3, 1).sigma_lo, dtype=torch.float64)
    sigmas = torch.cat([SIGMAS.double(), torch.stack([edge, edge.nextafter(edge + 1), edge.nextafter(edge * 0)])])
    hard = SigmoidRatio(math.inf, Fraction(1, 8))(sigmas)
    above = NoiseInterval(Fraction(1, 8), Fraction(1)).contains(sigmas)
    assert torch.equal(hard, above.double())
    distance = [(SigmoidRatio(k, Fraction(1, 8))(SIGMAS) - hard[:6]).abs().max() for k in (10.0, 100.0, 1000.0)]
    assert distance[0] > 4 * distance[1] > 16 * distance[2]


def test_a_learned_ratio_begins_at_its_sigmoid() -> None:
    start = SigmoidRatio(12.0, 0.3)
    learned = LearnedRatio(start)
    for sigma in (SIGMAS, SIGMAS[1].double()):
        assert torch.equal(learned(sigma), start(sigma)) and learned(sigma).shape == sigma.shape
    nn.init.normal_(learned.out.weight)
    assert not torch.allclose(learned(SIGMAS), start(SIGMAS))
    with torch.no_grad():
        torch.testing.assert_close(learned(SIGMAS.double()[2]), learned(SIGMAS)[2])


def test_a_copied_ratio_follows_its_parameters() -> None:
    """What a sampler uses on the CPU when the parameters are on another device is renewed after they change."""
    learned = LearnedRatio()
    parameters = list(learned.parameters())
    first = learned._on_cpu(parameters)
    assert learned._on_cpu(parameters) is first
    with torch.no_grad():
        learned.out.bias += 1
    assert learned._on_cpu(parameters)[-1] == learned.out.bias and learned._on_cpu(parameters) is not first


def losses(model: nn.Module) -> Tensor:
    images = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(3)) / 2
    eps = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(4))
    return EDMLoss()(model, images, SIGMAS, eps, PROMPTS)


def test_gradients_reach_both_experts_and_the_ratio_and_are_those_of_the_sum() -> None:
    model = blend(LearnedRatio(SigmoidRatio(12.0)), saturation=0.0)
    losses(model).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.high.parameters())  # type: ignore[attr-defined]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.low.parameters())  # type: ignore[attr-defined]
    learned = model.ratio
    assert isinstance(learned, LearnedRatio) and learned.out.weight.grad is not None and learned.out.weight.grad.abs().sum() > 0

    plain = copy.deepcopy(model)
    plain.zero_grad()
    plain.forward = lambda x, sigma, c: (  # type: ignore[method-assign]
        plain.ratio(sigma).float()[:, None, None, None] * plain.high(x, sigma, c)
        + (1 - plain.ratio(sigma).float()[:, None, None, None]) * plain.low(x, sigma, c)
    )
    losses(plain).sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_one_sigma_for_all_rows_passes_gradients_on_too() -> None:
    model = blend(LearnedRatio(SigmoidRatio(12.0)))
    model(X, SIGMAS[3].double(), PROMPTS).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_training_a_blend_lowers_its_loss_and_moves_the_ratio() -> None:
    model = blend(LearnedRatio(SigmoidRatio(5.0)))
    before, start = losses(model).mean().item(), model.ratio(SIGMAS).detach()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        losses(model).mean().backward()
        optimizer.step()
    assert losses(model).mean().item() < 0.9 * before
    assert (model.ratio(SIGMAS) - start).abs().max() > 0.02


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"saturation=0\.5"):
        blend(constant(0.5), saturation=0.5)
    with pytest.raises(ValueError, match="steepness=0"):
        SigmoidRatio(0.0)
    with pytest.raises(ValueError, match="middle=1"):
        SigmoidRatio(3.0, 1)
    with pytest.raises(ValueError, match="hard split"):
        LearnedRatio(SigmoidRatio(math.inf))
