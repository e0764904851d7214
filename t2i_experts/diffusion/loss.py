"""EDM's training loss (Karras et al. 2022, eq. 2 and table 1): E[ lambda(sigma) || D(y + sigma eps; sigma) - y ||^2 ]."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from t2i_experts.types import Conditioning, Denoiser


@dataclass(frozen=True)
class EDMLoss:
    """lambda(sigma) = (sigma^2 + sd^2) / (sigma sd)^2 cancels c_out^2, so that every noise level starts with the same weight."""

    sigma_data: float = 0.5

    def weight(self, sigma: Tensor) -> Tensor:
        """lambda(sigma), of sigma's shape."""
        return (sigma.square() + self.sigma_data**2) / (sigma * self.sigma_data).square()

    def __call__(self, denoiser: Denoiser, images: Tensor, sigma: Tensor, eps: Tensor, conditioning: Conditioning) -> Tensor:
        """images: (B, C, H, W) in [-1, 1]; sigma: (B,); eps: unit Gaussian, as images.

        Returns the loss of each image, (B,) float32: the mean over its values of the weighted squared error.
        """
        noisy = images + sigma[:, None, None, None] * eps
        error = denoiser(noisy, sigma, conditioning).float() - images
        return self.weight(sigma) * error.square().mean(dim=(1, 2, 3))
