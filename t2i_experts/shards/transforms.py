"""From a stored picture to a tensor."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from t2i_experts.shards.images import centre_box, decode, resize
from t2i_experts.shards.resample import MOST, resample


def decode_image(data: bytes, width: int, height: int | None = None) -> Tensor:
    """(3, height, width) uint8, RGB: the centre of a JPEG, PNG or WebP, made as `images.centre_crop` says; a square without `height`.

    Resized pixels differ from those of `centre_crop` by about the rounding to whole numbers between the two axes, which is Pillow's alone.
    Raises ValueError.
    """
    height = height or width
    image = decode(data, width, height)
    box = centre_box(image.size, width, height)
    if max((box[2] - box[0]) / width, (box[3] - box[1]) / height) > MOST:
        image = resize(image, width, height, box)
        box = (0, 0, width, height)
    left, top, right, bottom = box
    pixels = np.frombuffer(image.tobytes("raw", "RGB;L"), np.uint8).reshape(image.height, 3, image.width)  # row after row of each channel
    if (right - left, bottom - top) == (width, height):
        pixels = pixels[int(top) : int(bottom), :, int(left) : int(right)]
    else:
        pixels = resample(pixels, width, height, box)
    return torch.from_numpy(pixels.transpose(1, 0, 2).copy())
