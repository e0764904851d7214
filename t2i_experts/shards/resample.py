"""Lanczos resampling with antialiasing, as Pillow does it (three lobes, stretched when shrinking), as products of matrices.

Each axis is a product with a matrix of weights in which only a band is not zero. Pixels and weights are whole numbers so small that
floating point holds every sum of their products exactly: whatever adds them up, in whatever order, with however many threads, the pixels
are the same. (Not if torch is told to multiply float32 in fewer bits, `set_float32_matmul_precision`, on a CPU that does: leave that.)
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from numpy.typing import NDArray

MOST = 8
"""By how much a picture can be shrunk at most: more spreads the weights so thin that they need more bits."""

_LOBES = 3
_ROWS_BITS, _COLUMNS_BITS = 14, 11
"""Weights are multiples of 2^-bits. Their absolute values add up to less than 2, so that float32, whose whole numbers end at 2^24, holds
255 * 2 * 2^14, and of columns, which meet the sums of rows, 255 * 2 * 8 * 2 * 2^11."""
_FRACTION = 8  # between the two axes pixels are multiples of its inverse
_BAND = 16  # rows or columns that are computed at once: more would multiply more zeros

_Bands = tuple[tuple[slice, slice, NDArray[np.float32]], ...]


def resample(pixels: NDArray[np.uint8], width: int, height: int, box: tuple[float, float, float, float]) -> NDArray[np.uint8]:
    """(height, width, C) uint8: what lies in a box (left, top, right, bottom) of a picture, resized to at least an eighth.

    pixels: (H, W, C). The filter sees beyond the box, but not beyond the picture.
    """
    left, top, right, bottom = box
    y, x = _seen(pixels.shape[0], height, top, bottom), _seen(pixels.shape[1], width, left, right)
    pixels = pixels[y, x]
    tall, wide, channels = pixels.shape

    rows = np.empty((height, wide * channels), np.float32)
    for out, of, weights in _bands(tall, height, top - y.start, bottom - y.start, _ROWS_BITS):
        _multiply(weights, pixels[of].astype(np.float32).reshape(-1, wide * channels), rows[out])
    rows *= _FRACTION / 2**_ROWS_BITS
    np.rint(rows, out=rows)

    rows = rows.reshape(height, wide, channels).transpose(0, 2, 1).reshape(height * channels, wide)
    columns = np.empty((height * channels, width), np.float32)
    for out, of, weights in _bands(wide, width, left - x.start, right - x.start, _COLUMNS_BITS):
        _multiply(rows[:, of], weights.T, columns[:, out])
    columns *= 1 / (_FRACTION * 2**_COLUMNS_BITS)
    np.rint(columns, out=columns)
    return columns.clip(0, 255, out=columns).astype(np.uint8).reshape(height, channels, width).transpose(0, 2, 1)


def _multiply(a: NDArray[np.float32], b: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """By torch, which a loader's worker has been told to use one thread; numpy would start as many as there are cores."""
    torch.mm(torch.from_numpy(a), torch.from_numpy(b), out=torch.from_numpy(out))


def _seen(inputs: int, outputs: int, start: float, end: float) -> slice:
    """Those of `inputs` pixels that the filter sees when those in [start, end) become `outputs`."""
    reach = _LOBES * max((end - start) / outputs, 1.0)
    return slice(max(0, math.floor(start - reach)), min(inputs, math.ceil(end + reach)))


@functools.lru_cache(maxsize=512)  # pictures of many sizes share it; an entry takes some 300 bytes for each output
def _bands(inputs: int, outputs: int, start: float, end: float, bits: int) -> _Bands:
    """How `outputs` pixels are made of those in [start, end) of `inputs`, band after band.

    Each is (the outputs, the inputs that they are made of, weights (outputs, inputs) in units of 2^-bits).
    """
    scale = (end - start) / outputs
    stretch = max(scale, 1.0)
    centres = start + (np.arange(outputs) + 0.5) * scale
    firsts = np.floor(centres - _LOBES * stretch + 0.5).astype(np.int64)
    places = firsts[:, None] + np.arange(int(2 * _LOBES * stretch) + 2)  # (outputs, taps)
    x = (places + 0.5 - centres[:, None]) / stretch
    weights = np.sinc(x) * np.sinc(x / _LOBES) * ((abs(x) < _LOBES) & (places >= 0) & (places < inputs))
    whole = np.rint(weights * (2**bits / weights.sum(axis=1, keepdims=True)))
    rows = np.arange(outputs)
    whole[rows, whole.argmax(axis=1)] += 2**bits - whole.sum(axis=1)  # so that an even area keeps its value
    assert abs(whole).sum(axis=1).max() <= 2 * 2**bits, "sums could be inexact"

    bands = []
    for begin in range(0, outputs, _BAND):
        out = slice(begin, min(begin + _BAND, outputs))
        lowest, highest = int(places[out][0, 0]), int(places[out][-1, -1])
        matrix = np.zeros((out.stop - begin, highest + 1 - lowest), np.float32)
        matrix[rows[: len(matrix), None], places[out] - lowest] = whole[out]
        of = slice(max(0, lowest), min(inputs, highest + 1))
        bands.append((out, of, matrix[:, of.start - lowest : of.stop - lowest]))
    return tuple(bands)
