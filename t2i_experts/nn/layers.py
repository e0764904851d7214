"""Layers of the U-Net: a norm over channels only, and the residual block that it makes fast.

Images in here are (B, H, W, C): channels last in shape as well as in memory, so that a compiler, which lays out what it makes by its
shape, never turns a tensor round between two convolutions. A norm over channels (and not over pixels, as GroupNorm's) reads and writes
each pixel once, and fuses with SiLU and scale-shift into the neighbouring copy of a 3x3 convolution's input. Norms have no gains and
convolutions no biases, as in EDM2 (Karras et al. 2024): the gradient of each would be a sum over all pixels, another pass over the
activations.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Resample = Literal["keep", "down", "up"]
Layer = TypeVar("Layer", bound=nn.Module)


def rms_norm(x: Tensor, eps: float = 1e-6, *, channels: int | None = None) -> Tensor:
    """x divided by its root mean square over the last dimension, which is taken in float32. A vector of zeros stays zero.

    channels: over how many the mean is taken, all unless given; the others must be zero.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # reads x once, where squares would be written out
    return x * torch.rsqrt(norm.square() / (channels or x.shape[-1]) + eps).to(x.dtype)


def zeroed(module: Layer) -> Layer:
    """The module with its parameters set to zero, so that its residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Convolution(nn.Conv2d):
    """A convolution with an odd `kernel`, whose output has the input's sides: (B, H, W, C_in) -> (B, H, W, C_out)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, bias: bool = False) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def resample(x: Tensor, mode: Resample) -> Tensor:
    """(B, H, W, C) with its sides halved (mean of 2x2), doubled (nearest) or kept."""
    match mode:
        case "down":
            return F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        case "up":
            return x[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1).flatten(3, 4).flatten(1, 2)
        case "keep":
            return x


def concatenate(x: Tensor, skip: Tensor) -> Tensor:
    """(B, H, W, C) and (B, H, W, C') to (B, H, W, C + C'), as long a vector in each pixel as one of them if they are alike.

    The product is not only for the scale (EDM2 has it, too): without it, the gradient that comes back to x is a part of another tensor,
    which a convolution would copy each time it reads it, for its input's gradient, its weight's, and again in the shortcut.
    """
    return torch.cat([x * 2**-0.5, skip * 2**-0.5], dim=-1)


class ResidualBlock(nn.Module):
    """norm, SiLU, [resample], conv 3x3, norm with scale and shift, SiLU, conv 3x3; plus the (resampled) input.

    The block of ADM (Dhariwal & Nichol 2021, resblock_updown) with a norm over channels. The last convolution starts at zero.
    """

    def __init__(self, in_channels: int, out_channels: int, *, mode: Resample = "keep", dropout: float = 0.0) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.mode: Resample = mode
        self.dropout = dropout
        self.conv_in = Convolution(in_channels, out_channels, 3)
        self.conv_out = zeroed(Convolution(out_channels, out_channels, 3))
        self.shortcut = Convolution(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, scale_shift: Tensor) -> Tensor:
        """x: (B, H, W, C_in); scale_shift: (B, 2 C_out), the scales (less one) of the second norm's channels, and then their shifts.

        Returns (B, H', W', C_out).
        """
        h = self.conv_in(resample(F.silu(rms_norm(x)), self.mode))
        scale, shift = scale_shift[:, None, None].chunk(2, dim=-1)
        h = F.silu(torch.addcmul(shift, rms_norm(h), 1 + scale))
        if self.dropout:
            h = F.dropout(h, self.dropout, self.training)
        return self._shortcut(x) + self.conv_out(h)

    def _shortcut(self, x: Tensor) -> Tensor:
        """The resampled input in the output's channels. A 1x1 convolution and a resampling may change places: the one on fewer pixels
        goes first."""
        if self.mode == "up":
            return resample(self.shortcut(x), self.mode)
        shortcut: Tensor = self.shortcut(resample(x, self.mode))
        return shortcut
