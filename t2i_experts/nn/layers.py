"""Layers of the U-Net: a norm over channels only, and the residual block that it makes fast.

A norm over channels (and not over pixels, as GroupNorm's) reads and writes each pixel once, so that in channels-last memory it fuses
with SiLU and scale-shift into the neighbouring copy of a 3x3 convolution's input. Norms have no gains and convolutions no biases, as in
EDM2 (Karras et al. 2024): the gradient of each would be a sum over all pixels, another pass over the activations.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Resample = Literal["keep", "down", "up"]
Layer = TypeVar("Layer", bound=nn.Module)


def rms_norm(x: Tensor, dim: int, eps: float = 1e-6) -> Tensor:
    """x divided by its root mean square over `dim`, which is taken in float32. A vector of zeros stays zero."""
    return x * torch.rsqrt(x.float().square().mean(dim, keepdim=True) + eps).to(x.dtype)


def zeroed(module: Layer) -> Layer:
    """The module with its parameters set to zero, so that its residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def resample(x: Tensor, mode: Resample) -> Tensor:
    """(B, C, H, W) with its sides halved (mean of 2x2), doubled (nearest) or kept."""
    match mode:
        case "down":
            return F.avg_pool2d(x, 2)
        case "up":  # as F.interpolate's, whose gradient the compiler scatters where this one's is a sum
            pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None]
            return pixels.expand(-1, -1, 2, -1, 2, -1).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
        case "keep":
            return x


class _DenseGradient(torch.autograd.Function):
    """The identity, whose gradient is written out once where it is a part of another: a convolution copies such a one each time it reads
    it, for its input's gradient, its weight's, and again in the shortcut."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous(memory_format=torch.channels_last)


def concatenate(x: Tensor, skip: Tensor) -> Tensor:
    """(B, C, H, W) and (B, C', H, W) to (B, C + C', H, W)."""
    return torch.cat([_DenseGradient.apply(x), skip], dim=1)


class ResidualBlock(nn.Module):
    """norm, SiLU, [resample], conv 3x3, norm with scale and shift from the embedding, SiLU, conv 3x3; plus the (resampled) input.

    The block of ADM (Dhariwal & Nichol 2021, resblock_updown) with a norm over channels. The last convolution starts at zero.
    """

    def __init__(
        self, in_channels: int, out_channels: int, embedding_channels: int, *, mode: Resample = "keep", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.mode: Resample = mode
        self.dropout = dropout
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.scale_shift = zeroed(nn.Linear(embedding_channels, 2 * out_channels))
        self.conv_out = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False))
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x: (B, C_in, H, W); embedding: (B, E), already through its SiLU. Returns (B, C_out, H', W')."""
        h = self.conv_in(resample(F.silu(rms_norm(x, 1)), self.mode))
        scale, shift = self.scale_shift(embedding)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, rms_norm(h, 1), 1 + scale))
        if self.dropout:
            h = F.dropout(h, self.dropout, self.training)
        return self.shortcut(resample(x, self.mode)) + self.conv_out(h)
