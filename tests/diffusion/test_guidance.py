from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from t2i_experts.diffusion.guidance import ClassifierFreeGuidance, ScaleBySigma
from t2i_experts.diffusion.samplers import karras_sigmas, sample_dpmpp_2m, sample_heun
from t2i_experts.types import Conditioning, Embedding

ONE = torch.tensor(1.0, dtype=torch.float64)


def conditioning(rows: int, length: int = 3, seed: int = 0) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(rows, length, 2, generator=generator)
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)
    return Conditioning({"text": Embedding(tokens, mask, torch.randn(rows, 4, generator=generator))})


NULL = Conditioning({"text": Embedding(torch.zeros(1, 1, 2), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 4))})
X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def summary(conditioning: Conditioning) -> Tensor:
    """(B, 1, 1, 1): depends on each row's real tokens, on how many there are, and on the pooled vector."""
    text = conditioning.embeddings["text"]
    assert text.pooled is not None
    mean = (text.tokens.sum(-1) * text.mask).sum(1) / text.mask.sum(1)
    return (mean + text.pooled.sum(1))[:, None, None, None]


class Model:
    """A denoiser that depends on all of its arguments, row by row, and counts its evaluations."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        assert x.shape[0] == conditioning.batch and sigma.shape in [(), (x.shape[0],)]
        self.rows.append(x.shape[0])
        scale = sigma.to(x.dtype).reshape(-1, 1, 1, 1)
        return torch.tanh(x / (1 + scale)) + self.read(conditioning) * scale

    def read(self, conditioning: Conditioning) -> Tensor:
        return summary(conditioning)


class PreparingModel(Model):
    """The same answers, but the conditioning is read once, in `prepare`, and never again."""

    def __init__(self) -> None:
        super().__init__()
        self.prepared: list[int] = []

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        self.prepared.append(conditioning.batch)
        return Conditioning(conditioning.embeddings, {"summary": summary(conditioning)})

    def read(self, conditioning: Conditioning) -> Tensor:
        return conditioning.projected["summary"]


def branches(sigma: Tensor) -> tuple[Tensor, Tensor]:
    model = Model()
    return model(X, sigma, conditioning(2)), model(X, sigma, NULL.expand(2))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("model_type", [Model, PreparingModel])
def test_guidance_algebra(scale: float, model_type: type[Model]) -> None:
    guided = ClassifierFreeGuidance(model_type(), NULL, scale)
    conditional, null = branches(ONE)
    torch.testing.assert_close(guided(X, ONE, guided.prepare(conditioning(2))), null + scale * (conditional - null))


@pytest.mark.parametrize("interval", [(0.0, math.inf), (0.5, 2.0), (2.0, 3.0)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_prepared_and_unprepared_agree(scale: float, interval: tuple[float, float]) -> None:
    model = Model()
    guided = ClassifierFreeGuidance(model, NULL, scale, interval)
    assert torch.equal(guided(X, ONE, conditioning(2)), guided(X, ONE, guided.prepare(conditioning(2))))
    assert model.rows[0] == model.rows[1]


@pytest.mark.parametrize(
    "scale, interval, rows",
    [(3.0, (0.0, math.inf), 4), (1.0, (0.0, math.inf), 2), (0.0, (0.0, math.inf), 2), (3.0, (2.0, 5.0), 2), (0.0, (2.0, 5.0), 2)],
)
def test_cost_in_rows(scale: float, interval: tuple[float, float], rows: int) -> None:
    model = Model()
    ClassifierFreeGuidance(model, NULL, scale, interval)(X, ONE, conditioning(2))
    assert model.rows == [rows]


def test_the_conditioning_is_prepared_once_a_prompt() -> None:
    model = PreparingModel()
    guided = ClassifierFreeGuidance(model, NULL, 2.0, (0.1, 10.0))
    sample_heun(guided, X, karras_sigmas(6), guided.prepare(conditioning(2)))
    assert model.prepared == [4]
    assert set(model.rows) == {2, 4}


def test_the_interval_is_half_open() -> None:
    lo, hi = 0.3, 2.0
    guided = ClassifierFreeGuidance(Model(), NULL, 5.0, (lo, hi))
    for sigma, inside in [
        (lo, False),
        (math.nextafter(lo, 1), True),
        (hi, True),
        (math.nextafter(hi, 3), False),
        (0.1, False),
        (9.0, False),
    ]:
        at = torch.tensor(sigma, dtype=torch.float64)
        conditional, null = branches(at)
        expected = null + 5 * (conditional - null) if inside else conditional
        torch.testing.assert_close(guided(X, at, conditioning(2)), expected)


def test_guidance_outside_the_interval_is_conditional_even_at_scale_zero() -> None:
    guided = ClassifierFreeGuidance(Model(), NULL, 0.0, (2.0, 3.0))
    torch.testing.assert_close(guided(X, ONE, conditioning(2)), branches(ONE)[0])


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("interval", [(0.0, math.inf), (0.5, 2.0)])
def test_a_batch_of_sigmas_equals_one_image_at_a_time(scale: float, interval: tuple[float, float]) -> None:
    guided = ClassifierFreeGuidance(Model(), NULL, scale, interval)
    sigma, prompts = torch.tensor([0.5, 1.7]), conditioning(2)
    alone = [guided(X[i : i + 1], sigma[i], prompts.rows(i, i + 1)) for i in range(2)]
    torch.testing.assert_close(guided(X, sigma, prompts), torch.cat(alone))
    torch.testing.assert_close(guided(X, sigma, guided.prepare(prompts)), torch.cat(alone))


BY_SIGMA = ScaleBySigma((0.3, 9.0), (1.0, 4.0, 7.0))


@pytest.mark.parametrize("model_type", [Model, PreparingModel])
def test_a_scale_for_each_range_equals_a_loop_by_hand(model_type: type[Model]) -> None:
    model, sigmas = model_type(), torch.tensor([80.0, 12.0, 9.0, 2.0, 0.3, 0.1, 0.0], dtype=torch.float64)
    guided = ClassifierFreeGuidance(model, NULL, BY_SIGMA)
    found = sample_heun(guided, X * 80, sigmas, guided.prepare(conditioning(2)))
    assert model.rows == [4] * 2 + [4] * 2 + [4] * 2 + [4, 2] + [2] * 2 + [2], "scale 1 costs B rows; an edge belongs to the range below"
    plain, x = Model(), X * 80

    def by_hand(x: Tensor, sigma: Tensor) -> Tensor:
        scale = 7.0 if sigma > 9 else 4.0 if sigma > 0.3 else 1.0
        conditional, null = plain(x, sigma, conditioning(2)), plain(x, sigma, NULL.expand(2))
        return null + scale * (conditional - null)

    for sigma, sigma_next in pairwise(sigmas):
        slope = (x - by_hand(x, sigma)) / float(sigma)
        x_next = x + float(sigma_next - sigma) * slope
        if sigma_next > 0:
            slope = (slope + (x_next - by_hand(x_next, sigma_next)) / float(sigma_next)) / 2
        x = x + float(sigma_next - sigma) * slope
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_a_scale_for_each_range_within_an_interval() -> None:
    guided = ClassifierFreeGuidance(Model(), NULL, BY_SIGMA, (0.1, 20.0))
    for sigma, scale in ((0.05, 1), (0.2, 1), (0.3, 1), (0.31, 4), (9.0, 4), (9.1, 7), (20.0, 7), (21.0, 1)):
        at = torch.tensor(sigma, dtype=torch.float64)
        conditional, null = branches(at)
        torch.testing.assert_close(guided(X, at, conditioning(2)), null + scale * (conditional - null))
    sigma = torch.tensor([0.2, 12.0])
    alone = [guided(X[i : i + 1], sigma[i], conditioning(2).rows(i, i + 1)) for i in range(2)]
    torch.testing.assert_close(guided(X, sigma, conditioning(2)), torch.cat(alone))


def test_scales_of_one_need_no_null_branch() -> None:
    model = PreparingModel()
    guided = ClassifierFreeGuidance(model, NULL, ScaleBySigma((1.0,), (1.0, 1.0)), (0.5, 2.0))
    guided(X, ONE, guided.prepare(conditioning(2)))
    assert model.prepared == model.rows == [2]


@pytest.mark.parametrize(
    ("edges", "scales", "message"),
    [
        ((2.0, 1.0), (1.0, 2.0, 3.0), "ascending"),
        ((0.0,), (1.0, 2.0), "positive"),
        ((1.0,), (1.0,), "one fewer than 1 scales"),
        ((1.0,), (1.0, math.inf), "scale=inf must be finite"),
        ((1.0,), (1.0, -2.0), "scale=-2.0"),
    ],
)
def test_scales_that_mean_nothing(edges: tuple[float, ...], scales: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScaleBySigma(edges, scales)


def test_guided_sampling_does_not_depend_on_neighbours() -> None:
    guided = ClassifierFreeGuidance(Model(), NULL, 3.0, (0.1, 20.0))
    prompts, sigmas = conditioning(2), karras_sigmas(6)
    together = sample_dpmpp_2m(guided, X * 80, sigmas, guided.prepare(prompts))
    alone = [sample_dpmpp_2m(guided, X[i : i + 1] * 80, sigmas, guided.prepare(prompts.rows(i, i + 1))) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "arguments, field",
    [
        ({"scale": -1.0}, "scale"),
        ({"scale": math.nan}, "scale"),
        ({"scale": math.inf}, "scale"),
        ({"scale": 2.0, "interval": (3.0, 2.0)}, "interval"),
        ({"scale": 2.0, "interval": (-1.0, 2.0)}, "interval"),
        ({"scale": 2.0, "interval": (math.nan, 2.0)}, "interval"),
    ],
)
def test_bad_values_are_refused(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        ClassifierFreeGuidance(Model(), NULL, **arguments)


def test_wrong_numbers_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="null has 2 rows"):
        ClassifierFreeGuidance(Model(), NULL.expand(2), 2.0)
    with pytest.raises(ValueError, match="must have 2 or 4"):
        ClassifierFreeGuidance(Model(), NULL, 2.0)(X, ONE, conditioning(3))
