"""Resampling by matrices: Pillow's filter, exactly the same however it is computed."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from t2i_experts.shards.resample import _bands, resample


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8: noise on something smooth."""
    rng = np.random.default_rng(seed)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC))
    return (smooth + rng.normal(0, 20, smooth.shape)).clip(0, 255).astype(np.uint8)


def in_float(pixels: np.ndarray, width: int, height: int, box: tuple[float, float, float, float]) -> np.ndarray:
    """Pillow's own in floating point, which is not rounded between the axes."""
    bands = [
        Image.fromarray(band).resize((width, height), Image.Resampling.LANCZOS, box) for band in pixels.T.swapaxes(1, 2).astype(np.float32)
    ]
    return np.stack([np.asarray(band) for band in bands], axis=-1).clip(0, 255)


@pytest.mark.parametrize(("size", "wanted", "box"), [
    ((128, 128), (64, 64), (0, 0, 128, 128)), ((171, 128), (64, 64), (21.5, 0, 149.5, 128)), ((240, 320), (64, 64), (0, 40, 240, 280)),
    ((90, 61), (96, 48), (0, 8, 90, 53)), ((20, 10), (64, 80), (6, 0, 14, 10)), ((50, 50), (50, 20), (0, 10.25, 50, 30.25)),
    ((128, 40), (16, 16), (0, 0, 128, 40)), ((1, 1), (5, 3), (0, 0, 1, 1)), ((2, 3), (9, 1), (0.3, 0.5, 1.9, 2.75)),
])  # fmt: skip
def test_it_is_the_filter_of_pillow(size: tuple[int, int], wanted: tuple[int, int], box: tuple[float, float, float, float]) -> None:
    pixels = picture(*size)
    found = resample(pixels, *wanted, box)
    assert found.shape == (wanted[1], wanted[0], 3) and found.dtype == np.uint8
    assert np.abs(found - in_float(pixels, *wanted, box)).max() <= 0.75  # 0.5 is what rounding costs


def test_even_areas_keep_their_value_and_whole_steps_copy() -> None:
    for value in (0, 1, 77, 254, 255):
        assert (resample(np.full((37, 50, 1), value, np.uint8), 19, 23, (2.5, 0, 45, 37)) == value).all()
    pixels = picture(30, 20)
    assert (resample(pixels, 16, 12, (3, 5, 19, 17)) == pixels[5:17, 3:19]).all()


def test_no_sum_is_ever_rounded() -> None:
    """So neither threads, nor the library, nor where the picture stands in memory can change a pixel; checked with whole numbers."""
    pixels = np.where(np.random.default_rng(0).random((260, 300, 3)) < 0.5, 0, 255).astype(np.uint8)  # the largest sums

    def matrix(inputs: int, start: float, end: float, bits: int) -> np.ndarray:
        found = np.zeros((64, inputs), np.int64)
        for out, of, weights in _bands(inputs, 64, start, end, bits):
            assert (weights == np.rint(weights)).all()
            found[out, of] = weights
        assert (found.sum(axis=1) == 2**bits).all()
        return found

    rows, columns = matrix(260, 0, 260, 14), matrix(300, 20.5, 280.5, 11)
    between = np.rint(np.einsum("oh,hwc->owc", rows, pixels.astype(np.int64)) * 8 / 2**14).astype(np.int64)
    expected = np.rint(np.einsum("ow,hwc->hoc", columns, between) / (8 * 2**11)).clip(0, 255)
    assert (resample(pixels, 64, 64, (20.5, 0, 280.5, 260)) == expected).all()


def test_a_box_of_fractions_at_the_limit_is_resized() -> None:
    """What is an eighth by the box may be a little less once the part that is seen has been cut out."""
    for i in range(300):
        left = i / 7
        assert resample(np.full((8, 300, 1), 9, np.uint8), 31, 1, (left, 0, left + 31 * 8, 8)).max() == 9


def test_the_weights_of_any_size_are_small_enough() -> None:
    """An assertion in `_bands` holds the bound on which exactness rests."""
    rng = np.random.default_rng(0)
    for inputs in [*range(1, 12), 100, 1000]:
        for outputs in (1, 2, 3, 7, 64, 200):
            start = float(rng.uniform(0, inputs / 2))
            for end in (float(inputs), float(rng.uniform(start + 0.01, inputs))):
                if end - start <= 8 * outputs:
                    _bands(inputs, outputs, start, end, 11)
