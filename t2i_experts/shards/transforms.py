"""From a stored picture to a tensor."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from t2i_experts.shards.images import square


def decode_image(data: bytes, size: int) -> Tensor:
    """(3, size, size) uint8, RGB: the centre square of a JPEG, PNG or WebP, made as `images.square` says. Raises ValueError."""
    pixels = np.asarray(square(data, size))  # (size, size, 3)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
