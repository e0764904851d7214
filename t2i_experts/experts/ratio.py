"""How two experts share the noise levels: the ratio r(sigma) of a blend, 0 at low noise and 1 at high noise.

Three schedules after "Gemini Diffusion Model Unveils Underlying Division of Denoising Process" (course report, NYCU), which has them over
time; here they are functions of the quantile u of sigma in p(sigma), so that they do not depend on how the noise is parametrised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t2i_experts.config import RatioConfig
from t2i_experts.diffusion.noise import NoiseDistribution
from t2i_experts.experts.interval import EDM_NOISE, NoiseInterval

Ratio = Callable[[Tensor], Tensor]
"""sigma, 0-d or (B,), positive -> r in [0, 1], float64 of sigma's shape and on its device."""


def build_ratio(config: RatioConfig, noise: NoiseDistribution) -> Ratio:
    """The ratio that a config, which `check_ratio` has passed, asks for; a learned one as it begins."""
    if config.kind == "linear":
        return LinearRatio(noise)
    sigmoid = SigmoidRatio(config.steepness, Fraction(config.middle), noise)
    return sigmoid if config.kind == "sigmoid" else LearnedRatio(sigmoid)


class LinearRatio:
    """r = u: every noise level is shared."""

    def __init__(self, noise: NoiseDistribution = EDM_NOISE) -> None:
        self.noise = noise

    def __call__(self, sigma: Tensor) -> Tensor:
        return self.noise.cdf(sigma)


class SigmoidRatio:
    """r = 1 / (1 + exp(-k (u - u0))). k = infinity is the hard split at u0, exactly that of two `NoiseInterval`s.

    steepness: k > 0. middle: u0, the quantile that both experts share evenly.

    Raises ValueError for values outside of these ranges.
    """

    def __init__(self, steepness: float = 20.0, middle: Fraction | float = Fraction(1, 2), noise: NoiseDistribution = EDM_NOISE) -> None:
        if not steepness > 0:
            raise ValueError(f"steepness={steepness} must be > 0; infinity is the hard split")
        if not 0 < middle < 1:
            raise ValueError(f"middle={middle} must lie between 0 and 1, as a quantile of p(sigma)")
        self.steepness = steepness
        self.middle = Fraction(middle)
        self.noise = noise
        self._below = NoiseInterval(Fraction(0), self.middle, noise)

    def __call__(self, sigma: Tensor) -> Tensor:
        if self.steepness == math.inf:
            return 1 - self._below.contains(sigma).double()
        return torch.sigmoid(self.logit(sigma))

    def logit(self, sigma: Tensor) -> Tensor:
        """k (u - u0), float64 of sigma's shape, for a finite k."""
        return self.steepness * (self.noise.cdf(sigma) - float(self.middle))


class LearnedRatio(nn.Module):
    """r = sigmoid(k (u - u0) + MLP(ln(sigma)/4)), where the MLP's last layer starts at zero: training begins at the sigmoid.

    Where gradients are recorded, r carries those of the parameters. Otherwise a sigma on the CPU gives r on the CPU though the parameters
    may be elsewhere: these are copied once after each change, and not at each step of a sampler.
    """

    def __init__(self, start: SigmoidRatio | None = None, width: int = 32) -> None:
        """start: with a finite steepness; `SigmoidRatio()` unless given. Raises ValueError for the hard split, which has no slope."""
        super().__init__()
        self.start = start or SigmoidRatio()
        if self.start.steepness == math.inf:
            raise ValueError("a learned ratio must start at a sigmoid of finite steepness: the hard split passes no gradients on")
        self.hidden = nn.Linear(1, width)
        self.middle = nn.Linear(width, width)
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self._copied: tuple[tuple[tuple[int, int], ...], list[Tensor]] | None = None

    def forward(self, sigma: Tensor) -> Tensor:
        """See `Ratio`."""
        parameters: list[Tensor] = list(self.parameters())
        if sigma.device != parameters[0].device:
            if torch.is_grad_enabled():
                sigma = sigma.to(parameters[0].device)
            else:
                parameters = self._on_cpu(parameters)
        return torch.sigmoid(self.start.logit(sigma) + _mlp(sigma, parameters).to(sigma.device))

    def _on_cpu(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        versions = tuple((parameter.data_ptr(), parameter._version) for parameter in parameters)
        if self._copied is None or self._copied[0] != versions:
            self._copied = versions, [parameter.detach().cpu() for parameter in parameters]
        return self._copied[1]


def _mlp(sigma: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Two hidden layers over ln(sigma)/4; parameters: weight and bias of each of three layers. Returns float64 of sigma's shape."""
    with torch.autocast(sigma.device.type, enabled=False):
        h = (sigma.log() / 4).to(parameters[0].dtype).reshape(-1, 1)
        h = F.silu(F.linear(h, *parameters[0:2]))
        h = F.silu(F.linear(h, *parameters[2:4]))
        return F.linear(h, *parameters[4:6]).double().reshape(sigma.shape)
