"""From a stored picture to a tensor."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from t2i_experts.shards.images import centre_crop


def decode_image(data: bytes, width: int, height: int | None = None) -> Tensor:
    """(3, height, width) uint8, RGB: the centre of a JPEG, PNG or WebP, made as `images.centre_crop` says; a square without `height`.

    Raises ValueError.
    """
    pixels = np.asarray(centre_crop(data, width, height or width))  # (height, width, 3)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
