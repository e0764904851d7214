"""Uncertainty weighting: every noise level pulls on the network equally hard (Karras et al. 2024, eqs. 14 and 15)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from t2i_experts.nn.embeddings import fourier_features


class UncertaintyWeighting(nn.Module):
    """u(sigma), one linear layer on Fourier features of c_noise = ln(sigma)/4, for the objective E[ exp(-u) L + u ].

    At its minimum u = ln E[L | sigma], so that exp(-u) L has the expectation 1 at every noise level. It starts at u = 0, the plain loss.
    Used in training alone.
    """

    def __init__(self, features: int = 32) -> None:
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(torch.zeros(features + 1))  # the last one is the constant

    def forward(self, sigma: Tensor) -> Tensor:
        """sigma: (B,) positive. Returns u, (B,) float32."""
        features = fourier_features(sigma.log() / 4, self.features, octaves=(-3, 1))
        return features @ self.weight[:-1] + self.weight[-1]

    def objective(self, losses: Tensor, sigma: Tensor) -> Tensor:
        """losses: EDM's loss L of each image, (B,); sigma: (B,). Returns exp(-u) L + u, (B,)."""
        u = self(sigma)
        return torch.exp(-u) * losses + u
