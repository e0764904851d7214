"""Solvers of the probability-flow ODE dx/dsigma = (x - D(x; sigma)) / sigma, from noise to an image (Karras et al. 2206.00364, equation 3).

A sampler is a pure function of (denoiser, x, sigmas, conditioning). It knows its denoiser by one call and hands it the noise level itself,
never a step's number, so an ensemble of experts can choose by sigma and is right in a corrector's second evaluation too. What a multistep
sampler remembers is the denoised images: they mean the same whichever expert made them.

Noise levels and everything computed from them stay on the CPU in float64; x stays on its device in its dtype, float32 in use. No sampler
copies anything from the device. Gradients are the caller's choice: sample under `torch.inference_mode()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from t2i_experts.types import Conditioning, Denoiser

StepCallback = Callable[[int, Tensor, Tensor], None]
"""Called once a step with (step counted from 0, sigma, denoised): the image (B, C, H, W) as estimated at that step's first sigma."""


def karras_sigmas(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """The schedule of EDM (2206.00364, equation 5): n levels, evenly spaced in sigma^(1/rho), and a final 0.

    Returns: (n + 1,) float64 on the CPU, from exactly sigma_max through exactly sigma_min to 0; n = 1 gives (sigma_max, 0).

    Raises ValueError unless n >= 1, 0 < sigma_min < sigma_max < inf and 0 < rho < inf.
    """
    if n < 1:
        raise ValueError(f"steps={n} must be >= 1")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min={sigma_min}, sigma_max={sigma_max} must satisfy 0 < sigma_min < sigma_max < inf")
    if not 0 < rho < math.inf:
        raise ValueError(f"rho={rho} must be finite and > 0")
    roots = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), n, dtype=torch.float64)
    sigmas = torch.cat([roots**rho, roots.new_zeros(1)])
    sigmas[n - 1] = sigma_min  # the ends as given, not as rounded by the two powers
    sigmas[0] = sigma_max
    return sigmas


def sample_euler(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, conditioning: Conditioning, *, callback: StepCallback | None = None
) -> Tensor:
    """Euler's method, order 1, one evaluation a step; the same steps as DDIM (2010.02502).

    Args:
        x: (B, C, H, W) = y + sigmas[0] * eps; for a large sigmas[0] this is sigmas[0] * eps.
        sigmas: (n + 1,) strictly descending, ending at 0 or at a positive level.
        conditioning: of B rows, or what `denoiser` made of it with its `prepare`.

    Returns: x at sigmas[-1], (B, C, H, W) in the dtype of x; for sigmas[-1] = 0 the last denoised image.

    Raises ValueError for sigmas that are not such a schedule.
    """
    for step, (sigma, sigma_next) in enumerate(pairwise(_levels(sigmas))):
        denoised = denoiser(x, sigma, conditioning)
        if callback is not None:
            callback(step, sigma, denoised)
        x = denoised + float(sigma_next / sigma) * (x - denoised)
    return x


def sample_heun(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, conditioning: Conditioning, *, callback: StepCallback | None = None
) -> Tensor:
    """Heun's method, order 2 (2206.00364, algorithm 1): an Euler step whose slope is then averaged with the slope where it arrived.

    Two evaluations a step, one in a last step to 0, where there is no slope: 2n - 1 for `karras_sigmas(n)`. Arguments, result and errors as
    in `sample_euler`.
    """
    for step, (sigma, sigma_next) in enumerate(pairwise(_levels(sigmas))):
        denoised = denoiser(x, sigma, conditioning)
        if callback is not None:
            callback(step, sigma, denoised)
        if sigma_next == 0:
            return denoised
        dt = float(sigma_next - sigma)
        d = (x - denoised) / float(sigma)
        x_next = x + dt * d
        d_next = (x_next - denoiser(x_next, sigma_next, conditioning)) / float(sigma_next)
        x = x + dt / 2 * (d + d_next)
    return x


def sample_dpmpp_2m(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, conditioning: Conditioning, *, callback: StepCallback | None = None
) -> Tensor:
    """DPM-Solver++(2M), order 2, one evaluation a step (Lu et al. 2211.01095, algorithm 2, with alpha = 1, lambda = -ln sigma).

    A step is exact for a constant denoised image: it takes the one in the middle of the step in lambda, extrapolated from this level and
    the one before, however long their steps are. The first step has no history, and a last step to 0, infinite in lambda, has no middle:
    both are Euler steps. Arguments, result and errors as in `sample_euler`.
    """
    previous: tuple[Tensor, float] | None = None  # the denoised image of the step before, and that step's length in lambda
    for step, (sigma, sigma_next) in enumerate(pairwise(_levels(sigmas))):
        denoised = denoiser(x, sigma, conditioning)
        if callback is not None:
            callback(step, sigma, denoised)
        if sigma_next == 0:
            return denoised
        h = math.log(sigma / sigma_next)
        estimate = denoised
        if previous is not None:
            denoised_before, h_before = previous
            estimate = denoised + h / (2 * h_before) * (denoised - denoised_before)  # at lambda + h / 2
        x = estimate + float(sigma_next / sigma) * (x - estimate)
        previous = denoised, h
    return x


def _levels(sigmas: Tensor) -> tuple[Tensor, ...]:
    """The levels of a schedule as 0-d float64 tensors on the CPU. Raises ValueError for a schedule that cannot be walked down."""
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas of shape {tuple(sigmas.shape)} must be one-dimensional with at least 2 levels")
    sigmas = sigmas.detach().to("cpu", torch.float64)
    if not (sigmas.isfinite().all() and sigmas[-1] >= 0 and (sigmas.diff() < 0).all()):
        raise ValueError(f"sigmas={sigmas.tolist()} must be finite and strictly descending, the last one 0 or positive")
    return sigmas.unbind()
