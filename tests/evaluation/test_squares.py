"""The square that networks see is Pillow's: centre crop, then Lanczos."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_experts.evaluation.squares import centre_square


@pytest.mark.parametrize(("width", "height"), [(64, 47), (47, 64), (50, 50), (33, 32), (20, 90)])
@pytest.mark.parametrize("size", [16, 32, 80])
def test_a_square_is_cut_out_and_resized_by_pillow(width: int, height: int, size: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    side = min(width, height)
    left, top = round((width - side) / 2), round((height - side) / 2)
    expected = Image.fromarray(pixels).crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    found = centre_square(torch.from_numpy(pixels).permute(2, 0, 1), size)
    assert found.dtype == torch.uint8 and found.shape == (3, size, size)
    assert (found.permute(1, 2, 0).numpy() == np.array(expected)).all()


def test_a_picture_of_the_size_keeps_its_pixels() -> None:
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    assert centre_square(image, 32).equal(image)
    assert centre_square(image.repeat(1, 1, 2), 32).equal(image.roll(16, 2))
