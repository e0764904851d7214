"""From a stored picture to a tensor."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from t2i_experts.shards.images import centre_box, decode, resize
from t2i_experts.shards.resample import MOST, resample

_MOST_PIXELS = 2**24
"""A larger picture is resized by Pillow where it lies: an array would be a second copy of it."""


def decode_image(data: bytes, width: int, height: int | None = None) -> Tensor:
    """(3, height, width) uint8, RGB: the centre of a JPEG, PNG or WebP, made as `images.centre_crop` says; a square without `height`.

    Resized pixels differ from those of `centre_crop` by what Pillow does between the two axes: it rounds to whole numbers, and cuts off
    what the filter makes of hard edges beyond [0, 255]. Raises ValueError.
    """
    height = height or width
    image = decode(data, width, height)
    box = centre_box(image.size, width, height)
    left, top, right, bottom = box
    if image.width * image.height > _MOST_PIXELS or max((right - left) / width, (bottom - top) / height) > MOST:
        pixels = np.asarray(resize(image, width, height, box))
    elif (right - left, bottom - top) == (width, height):
        pixels = np.asarray(image)[int(top) : int(bottom), int(left) : int(right)]
    else:
        pixels = resample(np.asarray(image), width, height, box)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())  # from (height, width, 3)
