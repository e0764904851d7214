"""What the networks of a metric see of a picture of any shape: the square in its centre, at one size. Generated and reference pictures
come to it in the same way, as in the evaluations that GigaGAN (arXiv 2303.05511) and DMD (arXiv 2311.18828) have published."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from t2i_experts.cascade.picture import to_pil
from t2i_experts.shards.images import resize

HOW = "centre square, cut out in whole pixels, to the resolution by Pillow's Lanczos filter in 8 bits; of that size unchanged"


def centre_square(image: Tensor, size: int) -> Tensor:
    """(3, H, W) uint8 on the CPU to (3, size, size) uint8: the largest square in the centre, cut out first and then resized by Lanczos's
    filter with antialiasing. Of an odd margin, half a pixel is rounded to even, as torchvision's centre crop does."""
    height, width = image.shape[1:]
    side = min(height, width)
    left, top = round((width - side) / 2), round((height - side) / 2)
    square = image[:, top : top + side, left : left + side]
    if side == size:
        return square
    return torch.from_numpy(np.array(resize(to_pil(square), size, size, (0, 0, side, side)))).permute(2, 0, 1)
