"""The three ways in which pictures come to an Inception network's 299 pixels. They are not alike: 1 FID and more lies between them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def resize_bilinear(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) float to (B, 3, size, size) as pytorch-fid does: bilinear between pixel centres, without antialiasing."""
    return interpolate(images, (size, size), mode="bilinear", align_corners=False)


def resize_tf1(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) float to (B, 3, size, size) as TensorFlow 1 does: bilinear between the pixels' upper left corners, not antialiased."""
    return _between_corners(_between_corners(images, size, 3), size, 2)


def resize_clean(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) in 0..255 to (B, 3, size, size) as clean-fid does (Parmar et al., arXiv 2104.11222): Pillow's bicubic filter, which is
    as wide as the reduction demands (antialiasing), without rounding to whole numbers, clipped to 0..255. Computed in float64, as Pillow
    does, where the device knows it: in float32 the weights alone cost 2e-5."""
    exact = images if images.device.type == "mps" else images.double()
    return interpolate(exact, (size, size), mode="bicubic", antialias=True).clamp(0, 255).to(images.dtype)


def _between_corners(images: Tensor, size: int, dim: int) -> Tensor:
    length = images.shape[dim]
    at = torch.arange(size, dtype=images.dtype, device=images.device) * torch.tensor(length / size, dtype=images.dtype)
    before = at.long()
    after = (before + 1).clamp_max(length - 1)
    shape = [-1 if axis == dim else 1 for axis in range(4)]
    low, high = images.index_select(dim, before), images.index_select(dim, after)
    return low + (high - low) * (at - before).view(shape)
