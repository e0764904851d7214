"""Every evaluation goes to the expert whose interval holds its sigma, whatever the sampler, and costs nothing else."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from t2i_experts.diffusion.guidance import ClassifierFreeGuidance
from t2i_experts.diffusion.noise import LogNormalSigma
from t2i_experts.diffusion.samplers import karras_sigmas, sample_dpmpp_2m, sample_heun
from t2i_experts.experts.ensemble import ExpertEnsemble
from t2i_experts.experts.interval import NoiseInterval
from t2i_experts.types import Conditioning, Embedding

LOW, MIDDLE, HIGH = (NoiseInterval(Fraction(a), Fraction(b)) for a, b in pairwise(("0", "1/8", "511/512", "1")))


def prompts(batch: int, seed: int = 0) -> Conditioning:
    tokens = torch.randn(batch, 3, 2, generator=torch.Generator().manual_seed(seed))
    return Conditioning({"text": Embedding(tokens, torch.ones(batch, 3, dtype=torch.bool))})


class Net:
    """Depends on all that it is given, and on its own number; notes its evaluations. Reads no text that it has not prepared."""

    def __init__(self, number: float) -> None:
        self.number = number
        self.calls: list[tuple[float, ...]] = []
        self.seen: list[Conditioning] = []
        self.prepared = 0

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        self.prepared += 1
        text = conditioning.embeddings["text"].tokens.flatten(1)
        return Conditioning(conditioning.embeddings, {"mean": text.mean(1) * self.number, "sum": text.sum(1)})

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        assert sigma.ndim == 0 or sigma.shape == (x.shape[0],) == (conditioning.batch,)
        self.calls.append(tuple(sigma.flatten().tolist()))
        self.seen.append(conditioning)
        projected = conditioning.projected or self.prepare(conditioning).projected
        assert set(projected) == {"mean", "sum"}
        text = projected["mean"] + 0.1 * projected["sum"]
        return torch.tanh(x / (1 + sigma.to(x.dtype).reshape(-1, 1, 1, 1))) * self.number + text.reshape(-1, 1, 1, 1)


def three() -> tuple[ExpertEnsemble, list[Net]]:
    nets = [Net(1.0), Net(2.0), Net(3.0)]
    return ExpertEnsemble([(HIGH, nets[2]), (LOW, nets[0]), (MIDDLE, nets[1])]), nets  # in any order


def levels(net: Net) -> list[float]:
    return [sigma for (sigma,) in net.calls]


def sigma(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def test_an_edge_belongs_to_the_lower_expert() -> None:
    ensemble, nets = three()
    for edge, lower, upper in ((LOW.sigma_hi, 0, 1), (MIDDLE.sigma_hi, 1, 2)):
        for value, expert in ((math.nextafter(edge, 0), lower), (edge, lower), (math.nextafter(edge, math.inf), upper)):
            before = len(nets[expert].calls)
            ensemble(X, sigma(value), prompts(2))
            assert len(nets[expert].calls) == before + 1, (value, expert)
    ensemble(X, sigma(5e-324), prompts(2))
    ensemble(X, sigma(1e300), prompts(2))
    assert levels(nets[0])[-1] == 5e-324 and levels(nets[2])[-1] == 1e300, "beyond all that is sampled"


def test_heuns_second_evaluation_exactly_at_an_edge_and_beyond_it() -> None:
    ensemble, nets = three()
    edge = LOW.sigma_hi
    sample_heun(ensemble, X * 20, torch.tensor([20.0, 1.0, edge, edge / 2, 0.0], dtype=torch.float64), prompts(2))
    assert levels(nets[2]) == [20.0]
    assert levels(nets[1]) == [1.0, 1.0], "the corrector of the first step, and the second step"
    assert levels(nets[0]) == [edge, edge, edge / 2, edge / 2], "the corrector of the second step is at the edge, and the edge is inside"


def test_a_multistep_sampler_hands_over_between_steps_and_its_history_is_of_images() -> None:
    ensemble, nets = three()
    sigmas = karras_sigmas(25)
    found = sample_dpmpp_2m(ensemble, X * 80, sigmas, ensemble.prepare(prompts(2)))
    assert [len(net.calls) for net in nets] == [interval.evaluations(sigmas) for interval in (LOW, MIDDLE, HIGH)] == [5, 11, 9]
    assert levels(nets[2]) + levels(nets[1]) + levels(nets[0]) == sigmas[:-1].tolist()

    def by_hand(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        number = 1.0 if sigma <= LOW.sigma_hi else 2.0 if sigma <= MIDDLE.sigma_hi else 3.0
        return Net(number)(x, sigma, conditioning)

    assert torch.equal(found, sample_dpmpp_2m(by_hand, X * 80, sigmas, prompts(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_prepared", [False, True])
def test_a_batch_of_sigmas_equals_one_row_at_a_time(dtype: torch.dtype, is_prepared: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, 4, 4, generator=generator, requires_grad=True)
    sigmas = torch.logspace(-2.5, 2, 40, dtype=dtype)[torch.randperm(40, generator=generator)]
    sigmas[3], sigmas[4] = LOW.sigma_hi, MIDDLE.sigma_hi  # in float32 rounded, and then wherever that is
    ensemble, nets = three()
    text = ensemble.prepare(prompts(40)) if is_prepared else prompts(40)
    found = ensemble(x, sigmas, text)
    assert sorted(len(net.calls) for net in nets) == [1, 1, 1], "each network once, on its rows"
    assert sorted(value for net in nets for value in net.calls[0]) == sorted(sigmas.tolist())
    alone = torch.cat([ensemble(x[i : i + 1], sigmas[i], text.rows(i, i + 1)) for i in range(40)])
    torch.testing.assert_close(found, alone)
    (own,), (expected,) = (torch.autograd.grad(one.square().sum(), x) for one in (found, alone))
    torch.testing.assert_close(own, expected)


def test_a_batch_of_one_expert_is_passed_on_as_it_is() -> None:
    ensemble, nets = three()
    text = prompts(2)
    ensemble(X, torch.tensor([0.5, 0.6]), text)
    assert nets[1].seen == [text] and not nets[0].calls and not nets[2].calls


def test_each_network_projects_once_a_prompt_and_sees_its_own_as_the_same_object_at_every_step() -> None:
    """By which `GraphedDenoiser` knows that there is nothing to copy."""
    ensemble, nets = three()
    guided = ClassifierFreeGuidance(ensemble, prompts(1, seed=9), 3.0, (0.1, 10.0))
    prepared = guided.prepare(prompts(2))
    found = sample_dpmpp_2m(guided, X * 80, karras_sigmas(30), prepared)
    for net in nets:
        assert net.prepared == len({conditioning.batch for conditioning in net.seen}), "once for both branches, and once for one alone"
        assert len({id(conditioning) for conditioning in net.seen if conditioning.batch == 2}) <= 1
        assert len({id(conditioning) for conditioning in net.seen if conditioning.batch == 4}) <= 1
    assert {conditioning.batch for net in nets for conditioning in net.seen} == {2, 4}
    assert torch.equal(found, sample_dpmpp_2m(guided, X * 80, karras_sigmas(30), prompts(2)))
    assert ensemble.prepare(prepared) is prepared
    with pytest.raises(ValueError, match="projections of a single network"):
        ensemble(X, sigma(1.0), nets[0].prepare(prompts(2)))
    with pytest.raises(ValueError, match="projections of a single network"):
        ensemble.prepare(nets[0].prepare(prompts(2)))


def test_a_conditioning_that_is_not_prepared_keeps_nothing() -> None:
    """Weights may change between two calls, and gradients run through the projections."""
    ensemble, nets = three()
    text = prompts(2)
    for _ in range(2):
        ensemble(X, sigma(1.0), text)
    assert nets[1].prepared == 2 and nets[1].seen == [text, text]


def test_a_network_that_answers_for_several_intervals_is_prepared_once() -> None:
    root, high = Net(1.0), Net(2.0)
    ensemble = ExpertEnsemble([(LOW, root), (MIDDLE, root), (HIGH, high)])
    assert ensemble.networks == (root, high)
    text = ensemble.prepare(prompts(2))
    for value in (0.01, 1.0, 0.02, 2.0):
        ensemble(X, sigma(value), text)
    assert (root.prepared, high.prepared) == (1, 0), "and one that never evaluates never prepares"


def test_ensembles_nest() -> None:
    inner, nets = three()
    outer = ExpertEnsemble([(NoiseInterval.node(1, 0), inner), (NoiseInterval.node(1, 1), other := Net(5.0))])
    text = outer.prepare(prompts(2))
    assert torch.equal(outer(X, sigma(0.01), text), Net(1.0)(X, sigma(0.01), prompts(2)))
    assert torch.equal(outer(X, sigma(0.2), text), Net(2.0)(X, sigma(0.2), prompts(2)))
    assert torch.equal(outer(X, sigma(50.0), text), Net(5.0)(X, sigma(50.0), prompts(2)))
    assert not nets[2].calls and len(other.calls) == 1


def test_an_expert_with_the_tree_around_it() -> None:
    ensemble, nets = three()
    new = Net(7.0)
    for value, expected in ((0.01, nets[0]), (1.0, new), (20.0, nets[2])):
        seen = len(expected.calls)
        ensemble.with_expert(MIDDLE, new)(X, sigma(value), prompts(2))
        assert len(expected.calls) == seen + 1
    half = ensemble.with_expert(NoiseInterval.node(1, 0), new)  # LOW, and a part of MIDDLE
    assert half.networks == (new, nets[1], nets[2]), "whoever has nothing left goes"
    inside = ensemble.with_expert(NoiseInterval(Fraction(1, 4), Fraction(1, 2)), new)
    assert [denoiser for _, denoiser in inside.experts] == [nets[0], nets[1], new, nets[1], nets[2]]
    assert ensemble.networks == tuple(nets), "the ensemble itself is as it was"


def test_map_takes_each_network_once() -> None:
    root, high = Net(1.0), Net(2.0)
    taken: list[object] = []

    def image(denoiser: object) -> Net:
        taken.append(denoiser)
        return Net(0.0)

    ensemble = ExpertEnsemble([(LOW, root), (MIDDLE, root), (HIGH, high)]).map(image)
    assert taken == [root, high] and len(ensemble.networks) == 2 and ensemble.experts[0][1] is ensemble.experts[1][1]


@pytest.mark.parametrize(
    ("intervals", "message"),
    [
        ([], "at least one expert"),
        ([LOW, HIGH], r"no expert answers for sigma in \(0.07574, 9.61\], quantiles 1/8 to 511/512"),
        ([LOW, MIDDLE], r"no expert answers for sigma in \(9.61, inf\), quantiles 511/512 to 1"),
        ([MIDDLE, HIGH], "no expert answers for .* quantiles 0 to 1/8"),
        ([NoiseInterval.node(1, 0), MIDDLE, HIGH], "two experts answer for .* quantiles 1/8 to 1/2"),
        ([LOW, MIDDLE, MIDDLE, HIGH], "two experts answer for .* quantiles 1/8 to 511/512"),
        ([LOW, NoiseInterval(Fraction(1, 8), Fraction(1), LogNormalSigma(0.0, 1.0))], "different noise: .*mean=-1.2.*mean=0.0"),
    ],
)
def test_what_is_no_partition_is_refused(intervals: list[NoiseInterval], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertEnsemble([(interval, Net(1.0)) for interval in intervals])


def partitions(rng: random.Random) -> Iterator[list[NoiseInterval]]:
    for _ in range(20):
        cuts = sorted({Fraction(rng.randrange(1, 4096), 4096) for _ in range(rng.randrange(9))})
        yield [NoiseInterval(a, b) for a, b in pairwise([Fraction(0), *cuts, Fraction(1)])]


def test_routing_agrees_with_the_intervals_whatever_the_partition() -> None:
    rng = random.Random(0)
    for intervals in partitions(rng):
        nets = [Net(float(i)) for i in range(len(intervals))]
        ensemble = ExpertEnsemble(rng.sample([*zip(intervals, nets, strict=True)], len(nets)))
        edges = [interval.sigma_hi for interval in intervals[:-1]]
        tried = [*edges, *(math.nextafter(edge, math.inf) for edge in edges), *(math.exp(rng.gauss(-1.2, 2)) for _ in range(10))]
        for value in tried:
            ensemble(X, sigma(value), prompts(2))
        for interval, net in zip(intervals, nets, strict=True):
            assert levels(net) == [value for value in tried if interval.contains(sigma(value))]


def test_routing_takes_microseconds() -> None:
    """Of an evaluation that takes 1.5 ms at the least; the bound leaves room for a busy machine."""
    x, at, plain = torch.zeros(1), sigma(0.5), prompts(1)
    ensemble = ExpertEnsemble([(interval, lambda x, sigma, conditioning: x) for interval in (LOW, MIDDLE, HIGH)])
    text = ensemble.prepare(plain)
    best = math.inf
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(100):
            ensemble(x, at, text)
        best = min(best, (time.perf_counter() - started) / 100)
    assert best < 15e-6, best
