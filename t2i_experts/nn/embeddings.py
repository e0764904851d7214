"""What enters the U-Net beside the image: the noise level, and the projected words of the encoders."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t2i_experts.nn.layers import rms_norm
from t2i_experts.types import Embedding


def fourier_features(c_noise: Tensor, features: int, *, octaves: tuple[float, float]) -> Tensor:
    """Cosines and sines of c_noise, (B,) -> (B, features) float32, at frequencies from 2^octaves[0] to 2^octaves[1] per unit."""
    frequencies = 2 * math.pi * 2 ** torch.linspace(*octaves, features // 2, device=c_noise.device)
    angles = c_noise.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class NoiseEmbedding(nn.Module):
    """c_noise = ln(sigma)/4 as Fourier features (frequencies from 1/4 to 16 per unit), then two linear layers: (B,) -> (B, E)."""

    def __init__(self, channels: int, features: int = 128) -> None:
        super().__init__()
        self.features = features
        self.hidden = nn.Linear(features, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, c_noise: Tensor) -> Tensor:
        """c_noise: (B,) float32. Returns (B, E) in the dtype of the weights."""
        features = fourier_features(c_noise, self.features, octaves=(-2, 4))
        return self.out(F.silu(self.hidden(features.to(self.hidden.weight.dtype))))


class ContextEmbedding(nn.Module):
    """Joins the encoders into one context (eDiff-I section 4.2): each has its own projection, the sequences are concatenated, and the
    projections of the pooled vectors are summed, to be added to the noise embedding.

    widths: encoder name -> (token width, pooled width or 0). The embeddings are scaled to unit root mean square first, since the
    encoders' scales differ by orders of magnitude; a dropped encoder (zeros) thus contributes one constant token and a zero vector.
    """

    def __init__(self, widths: Mapping[str, tuple[int, int]], *, context_channels: int, embedding_channels: int) -> None:
        super().__init__()
        self.embedding_channels = embedding_channels
        self.tokens = nn.ModuleDict({name: nn.Linear(width, context_channels) for name, (width, _) in widths.items()})
        self.pooled = nn.ModuleDict(
            {name: nn.Linear(pooled, embedding_channels, bias=False) for name, (_, pooled) in widths.items() if pooled}
        )

    def forward(self, embeddings: Mapping[str, Embedding]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns context (B, L, D), context_mask (B, L) bool (True = real token) and pooled (B, E).

        Raises ValueError if the encoders are not those that this network was built for.
        """
        if set(embeddings) != set(self.tokens):
            raise ValueError(f"conditioning has encoders {sorted(embeddings)}; this network was trained with {sorted(self.tokens)}")
        dtype = next(self.parameters()).dtype
        context = torch.cat([projection(rms_norm(embeddings[name].tokens.to(dtype))) for name, projection in self.tokens.items()], dim=1)
        mask = torch.cat([embeddings[name].mask for name in self.tokens], dim=1)
        vector = context.new_zeros(context.shape[0], self.embedding_channels)
        for name, projection in self.pooled.items():
            pooled = embeddings[name].pooled
            assert pooled is not None, f"encoder {name} gave no pooled vector"
            vector = vector + projection(rms_norm(pooled.to(dtype)))
        return context, mask, vector
