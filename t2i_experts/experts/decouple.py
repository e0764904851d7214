"""How DeMe trains experts that are to be merged (Xie et al. 2410.06664): near their parent, and not on their own noise alone.

Its third part, projections of channels, is in `projections.py`; the merge itself in `merge.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from t2i_experts.diffusion.loss import EDMLoss
from t2i_experts.experts.interval import NoiseInterval
from t2i_experts.types import Conditioning, Denoiser


@dataclass(frozen=True)
class ProbabilisticInterval:
    """Noise of an expert's own interval, or, with probability p, of all noise; it draws like a `NoiseInterval`.

    Each draw has its own coin, out of the same uniform number; the paper's code tosses one for a batch, with p = 0.3. p = 0 gives exactly
    the draws of the interval.

    Raises ValueError unless 0 <= p <= 1.
    """

    interval: NoiseInterval
    p: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"p={self.p} must lie in [0, 1]")

    def from_uniform(self, v: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """The sigmas, of v's shape, that uniform numbers stand for: the lower 1 - p of them for own ones. See `NoiseInterval`."""
        own = 1 - self.p
        last = 1 - 2.0**-53
        inside = self.interval.from_uniform((v / own).clamp(max=last), dtype) if own else v.to(dtype)
        whole = NoiseInterval(Fraction(0), Fraction(1), self.interval.distribution)
        anywhere = whole.from_uniform(((v - own) / self.p).clamp(0, last), dtype) if self.p else v.to(dtype)
        return torch.where(v < own, inside, anywhere)

    def sample(self, shape: int | Sequence[int], *, generator: torch.Generator | None = None) -> Tensor:
        """Draws, float64 of `shape` on the generator's device, the CPU without one."""
        size = (shape,) if isinstance(shape, int) else tuple(shape)
        device = generator.device if generator is not None else torch.device("cpu")
        return self.from_uniform(torch.rand(size, generator=generator, dtype=torch.float64, device=device))


@dataclass(frozen=True)
class DecoupleLoss:
    """EDM's loss, and the weighted squared distance from what the parent denoises: lambda (|D - y|^2 + weight |D - D_parent|^2).

    Called as an `EDMLoss`. In the paper both terms are errors of the predicted noise, (D - y) / sigma and (D - D_parent) / sigma; lambda
    weighs both alike too, so that their ratio is the paper's. Its minimum is (E[y | x] + weight D_parent) / (1 + weight): with weight 1,
    as in the paper, an expert goes half of the way, and weights of a merge above 1 are to be expected.

    parent: the denoiser that the expert was grown from, frozen and in evaluation mode; it gets no gradients.

    Raises ValueError for a negative weight.
    """

    parent: Denoiser
    weight: float = 1.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"weight={self.weight} must be >= 0")

    def __call__(self, denoiser: Denoiser, images: Tensor, sigma: Tensor, eps: Tensor, conditioning: Conditioning) -> Tensor:
        """images: (B, C, H, W) in [-1, 1]; sigma: (B,); eps: unit Gaussian, as images. Returns the loss of each image, (B,) float32."""
        noisy = images + sigma[:, None, None, None] * eps
        with torch.no_grad():
            before = self.parent(noisy, sigma, conditioning).float()
        denoised = denoiser(noisy, sigma, conditioning).float()
        squares = (denoised - images).square() + self.weight * (denoised - before).square()
        return EDMLoss(self.sigma_data).weight(sigma) * squares.mean(dim=(1, 2, 3))
