from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from t2i_experts.diffusion.samplers import karras_sigmas, sample_dpmpp_2m, sample_euler, sample_heun
from t2i_experts.types import Conditioning, Embedding

SAMPLERS = [sample_euler, sample_heun, sample_dpmpp_2m]
SHAPE = (3, 2, 4, 4)
NOTHING = Conditioning({"text": Embedding(torch.zeros(3, 1, 1), torch.ones(3, 1, dtype=torch.bool))})


class Gaussian:
    """The exact denoiser of y ~ N(mu, sd^2) in each pixel, and the exact solution of its ODE."""

    def __init__(self, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.mu = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
        self.sd = torch.rand(shape, generator=generator, dtype=torch.float64) * 0.9 + 0.1
        self.noise = torch.randn(shape, generator=generator, dtype=torch.float64)

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return (self.sd**2 * x + sigma**2 * self.mu) / (self.sd**2 + sigma**2)

    def start(self, sigma: Tensor) -> Tensor:
        return self.mu + self.noise * (self.sd**2 + sigma**2).sqrt()

    def solution(self, sigma: Tensor) -> Tensor:
        return self.start(sigma)


def mixture(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
    """The exact denoiser of 0.3 N(-0.7, 0.1^2) + 0.7 N(0.6, 0.2^2) in each pixel."""
    weight, mean, sd = (torch.tensor(v, dtype=x.dtype) for v in ([0.3, 0.7], [-0.7, 0.6], [0.1, 0.2]))
    variance = sd**2 + sigma**2
    log_posterior = weight.log() - variance.log() / 2 - (x[..., None] - mean) ** 2 / (2 * variance)
    each = (sd**2 * x[..., None] + sigma**2 * mean) / variance
    return (log_posterior.softmax(-1) * each).sum(-1)


class Recorder:
    """Calls a denoiser and notes the sigmas it is asked for."""

    def __init__(self, denoiser: Callable[[Tensor, Tensor, Conditioning], Tensor]) -> None:
        self.denoiser = denoiser
        self.sigmas: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        self.sigmas.append(sigma)
        return self.denoiser(x, sigma, conditioning)


def alternating_sigmas(n: int, sigma_min: float, sigma_max: float) -> Tensor:
    """n steps evenly spaced in ln sigma but for every second one, which is three times as long as the one before."""
    lengths = torch.tensor([1.0, 3.0], dtype=torch.float64).repeat(n // 2)
    ends = torch.cat([torch.zeros(1, dtype=torch.float64), lengths.cumsum(0) / lengths.sum()])
    return sigma_max * (sigma_min / sigma_max) ** ends


def karras_above(n: int, sigma_min: float, sigma_max: float) -> Tensor:
    return karras_sigmas(n + 1, sigma_min, sigma_max)[:-1]


@pytest.mark.parametrize("schedule", [karras_above, alternating_sigmas])
@pytest.mark.parametrize("sampler, order", [(sample_euler, 1), (sample_heun, 2), (sample_dpmpp_2m, 2)])
def test_order_of_convergence(sampler: Any, order: int, schedule: Any) -> None:
    gaussian = Gaussian()
    steps, errors = [32, 64, 128, 256, 512], []
    for n in steps:
        sigmas = schedule(n, 0.02, 20.0)
        x = sampler(gaussian, gaussian.start(sigmas[0]), sigmas, NOTHING)
        errors.append((x - gaussian.solution(sigmas[-1])).square().mean().sqrt().item())
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert all(order - 0.35 < slope < order + 0.5 for slope in slopes), slopes
    assert abs(slopes[-1] - order) < 0.1, slopes


@pytest.mark.parametrize("sampler, tolerance", [(sample_euler, 0.05), (sample_heun, 0.004), (sample_dpmpp_2m, 0.008)])
def test_non_gaussian_data_converge_to_a_fine_reference(sampler: Any, tolerance: float) -> None:
    x = 80 * torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = sample_heun(mixture, x, karras_sigmas(2000), NOTHING)
    errors = [(sampler(mixture, x, karras_sigmas(n), NOTHING) - reference).abs().mean().item() for n in (16, 32, 64)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < tolerance, errors


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_constant_denoised_image_is_reached_in_one_step(sampler: Any) -> None:
    """D does not depend on x: the ODE is linear, every method is exact, from any level to any level."""
    target = torch.randn(SHAPE, dtype=torch.float64)
    x = torch.randn(SHAPE, dtype=torch.float64) * 80
    for sigmas in ([80.0, 0.0], [80.0, 3.0], [80.0, 3.0, 2.9, 0.1]):
        levels = torch.tensor(sigmas, dtype=torch.float64)
        result = sampler(lambda x, sigma, conditioning: target, x, levels, NOTHING)
        torch.testing.assert_close(result, target + (x - target) * levels[-1] / levels[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_result_at_zero_is_the_last_denoised_image(sampler: Any) -> None:
    gaussian, seen = Gaussian(), []
    sigmas = karras_sigmas(7)
    result = sampler(gaussian, gaussian.start(sigmas[0]), sigmas, NOTHING, callback=lambda *step: seen.append(step))
    assert torch.equal(result, seen[-1][2])
    assert [step for step, _, _ in seen] == list(range(7))
    assert [sigma.item() for _, sigma, _ in seen] == sigmas[:-1].tolist()


class TestAgainstDiffusers:
    """Step by step from the same x, to 1e-6 of its scale; D enters as the network's output F = (D - c_skip x) / c_out."""

    def steps(self, sampler: Any, x: Tensor, sigmas: Tensor) -> list[Tensor]:
        """The iterates of our sampler: the results on all leading parts of the schedule."""
        return [sampler(self.gaussian, x, sigmas[: stop + 1], NOTHING) for stop in range(1, len(sigmas))]

    gaussian = Gaussian()

    def check(self, scheduler: Any, sampler: Any, n: int) -> None:
        scheduler.set_timesteps(n)
        sigmas = karras_sigmas(n)
        torch.testing.assert_close(scheduler.sigmas.double(), sigmas, rtol=1e-5, atol=0)  # diffusers computes its own in float32
        scheduler.sigmas = sigmas
        x = reference = self.gaussian.start(sigmas[0])
        for i, ours in enumerate(self.steps(sampler, x, sigmas)):
            sigma, sd = sigmas[i], scheduler.config.sigma_data
            c_skip, c_out = sd**2 / (sigma**2 + sd**2), sigma * sd / (sigma**2 + sd**2).sqrt()
            scheduler.scale_model_input(reference, scheduler.timesteps[i])
            network_output = (self.gaussian(reference, sigma, NOTHING) - c_skip * reference) / c_out
            reference = scheduler.step(network_output, scheduler.timesteps[i], reference).prev_sample.double()
            torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-6 * reference.abs().max().item())

    @pytest.mark.parametrize("n", [2, 5, 18])
    def test_euler(self, n: int) -> None:
        from diffusers import EDMEulerScheduler

        self.check(EDMEulerScheduler(), sample_euler, n)

    @pytest.mark.parametrize("n", [2, 5, 18])
    def test_dpmpp_2m(self, n: int) -> None:
        from diffusers import EDMDPMSolverMultistepScheduler

        self.check(EDMDPMSolverMultistepScheduler(solver_order=2, algorithm_type="dpmsolver++"), sample_dpmpp_2m, n)

    @pytest.mark.parametrize("n", [2, 5, 18])
    def test_heun(self, n: int) -> None:
        from diffusers import HeunDiscreteScheduler

        sigmas = karras_sigmas(n)
        scheduler = HeunDiscreteScheduler(prediction_type="sample")
        scheduler.set_timesteps(n)
        scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        scheduler.timesteps = torch.arange(2 * n - 1, dtype=torch.float64)
        scheduler._begin_index = 0
        x = reference = self.gaussian.start(sigmas[0])
        ours = self.steps(sample_heun, x, sigmas)
        asked_for = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2)])
        for i, sigma in enumerate(asked_for):
            denoised = self.gaussian(reference, sigma, NOTHING)
            reference = scheduler.step(denoised, scheduler.timesteps[i], reference).prev_sample
            if i % 2 == 1:
                torch.testing.assert_close(ours[i // 2], reference, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours[-1], reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 18])
def test_evaluations_and_the_sigmas_they_are_made_at(n: int) -> None:
    """A denoiser that chooses by sigma is given the levels of the schedule themselves, on the CPU, and in the second evaluation too."""
    sigmas = karras_sigmas(n)
    positive = sigmas[:-1].tolist()
    interleaved = [positive[0]] + [sigma for sigma in positive[1:] for _ in range(2)]
    for sampler, expected in [(sample_euler, positive), (sample_heun, interleaved), (sample_dpmpp_2m, positive)]:
        gaussian = Recorder(Gaussian())
        sampler(gaussian, torch.randn(SHAPE), sigmas, NOTHING)
        assert [sigma.item() for sigma in gaussian.sigmas] == expected
        assert all(sigma.ndim == 0 and sigma.dtype == torch.float64 and sigma.device.type == "cpu" for sigma in gaussian.sigmas)
    assert len(interleaved) == 2 * n - 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_hand_off_between_experts_that_agree_changes_nothing(sampler: Any) -> None:
    """Two experts that agree are one denoiser; each answers nan outside its own range, which would show."""
    gaussian = Gaussian()
    sigmas = karras_sigmas(18)
    boundary = sigmas[7]  # a level of the schedule itself: it belongs to the lower expert, (lo, hi]

    def low(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return gaussian(x, sigma, conditioning) if sigma <= boundary else torch.full_like(x, math.nan)

    def high(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return gaussian(x, sigma, conditioning) if sigma > boundary else torch.full_like(x, math.nan)

    def ensemble(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return (low if sigma <= boundary else high)(x, sigma, conditioning)

    x = gaussian.start(sigmas[0])
    assert torch.equal(sampler(ensemble, x, sigmas, NOTHING), sampler(gaussian, x, sigmas, NOTHING))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_does_not_depend_on_its_neighbours(sampler: Any) -> None:
    x = 80 * torch.randn(5, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = sampler(mixture, x, karras_sigmas(9), NOTHING)
    alone = torch.cat([sampler(mixture, row[None], karras_sigmas(9), NOTHING) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_x_keeps_its_dtype_and_its_values_and_is_never_copied_to_the_cpu(sampler: Any) -> None:
    def halve(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return x / 2

    for dtype in (torch.float32, torch.float64):
        x = torch.randn(SHAPE, dtype=dtype)
        before = x.clone()
        assert sampler(halve, x, karras_sigmas(4), NOTHING).dtype == dtype
        assert torch.equal(x, before)
    meta = torch.empty(SHAPE, device="meta")  # holds no values: any copy from the device raises
    assert sampler(halve, meta, karras_sigmas(4), NOTHING).shape == SHAPE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_cuda_is_never_waited_for_and_agrees_with_the_cpu(sampler: Any) -> None:
    x = 80 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    on_device = x.cuda()

    def shrink(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return torch.tanh(x / (1 + float(sigma)))

    torch.cuda.set_sync_debug_mode("error")
    try:
        result = sampler(shrink, on_device, karras_sigmas(9), NOTHING)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu(), sampler(shrink, x, karras_sigmas(9), NOTHING), rtol=1e-4, atol=1e-4)


def test_karras_schedule() -> None:
    sigmas = karras_sigmas(18)
    assert sigmas.shape == (19,) and sigmas.dtype == torch.float64
    assert sigmas[[0, -2, -1]].tolist() == [80.0, 0.002, 0.0]
    assert (sigmas.diff() < 0).all()
    torch.testing.assert_close((sigmas[:-1] ** (1 / 7)).diff(), torch.full((17,), (0.002 ** (1 / 7) - 80 ** (1 / 7)) / 17).double())
    assert karras_sigmas(1).tolist() == [80.0, 0.0]
    # how many of 25 steps fall to the three experts of eDiff-I's final ensemble
    edges = karras_sigmas(25)[:-1]
    assert [(edges > 9.610).sum().item(), ((edges > 0.07574) & (edges <= 9.610)).sum().item()] == [9, 11]


@pytest.mark.parametrize(
    "arguments, field",
    [
        ({"n": 0}, "steps=0"),
        ({"n": 5, "sigma_min": 0.0}, "sigma_min"),
        ({"n": 5, "sigma_min": 3.0, "sigma_max": 2.0}, "sigma_max"),
        ({"n": 5, "sigma_max": math.inf}, "sigma_max"),
        ({"n": 5, "sigma_min": math.nan}, "sigma_min"),
        ({"n": 5, "rho": 0.0}, "rho"),
    ],
)
def test_bad_schedules_are_refused(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        karras_sigmas(**arguments)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "sigmas", [[1.0], [1.0, 2.0], [2.0, 2.0, 0.0], [2.0, -1.0], [math.inf, 1.0], [2.0, math.nan, 0.0], [0.0, 0.0], [[2.0, 1.0]], 3.0]
)
def test_sigmas_that_are_no_schedule_are_refused(sampler: Any, sigmas: Any) -> None:
    with pytest.raises(ValueError, match="sigmas"):
        sampler(Gaussian(), torch.zeros(SHAPE), torch.tensor(sigmas), NOTHING)
