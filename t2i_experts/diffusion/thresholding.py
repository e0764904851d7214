"""Dynamic thresholding (Imagen, Saharia et al. 2205.11487, section 2.3): strong guidance without saturated pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from t2i_experts.diffusion.guidance import prepare
from t2i_experts.types import Conditioning, Denoiser


def dynamic_thresholding(denoised: Tensor, percentile: float) -> Tensor:
    """Clips each image to [-s, s] and divides it by s, where s = max(1, the percentile of its absolute values).

    The percentile interpolates linearly between neighbours, as `torch.quantile` does, but without sorting all values and without the limit
    of 2^24 of them that older versions of torch have.

    Args:
        denoised: (B, ...) float, images nominally in [-1, 1].
        percentile: as a fraction, 0 < percentile < 1; Imagen's choice is 0.995.

    Returns: the same shape and dtype, in [-1, 1]; an image whose percentile is below 1 is merely clipped.

    Raises ValueError for a percentile out of range.
    """
    _check(percentile)
    magnitude = denoised.flatten(1).abs()  # (B, N)
    position = percentile * (magnitude.shape[1] - 1)  # between the order statistics floor(position) and the next, counted from 0
    largest = magnitude.topk(magnitude.shape[1] - math.floor(position)).values  # descending: the last is the lower neighbour
    s = torch.lerp(largest[:, -1], largest[:, -2:][:, 0], position % 1.0)  # (B,)
    s = s.clamp(min=1.0).reshape(-1, *[1] * (denoised.ndim - 1))
    return denoised.clamp(-s, s) / s


class DynamicThresholding:
    """A denoiser whose estimates are thresholded, so that every sampler, whatever it makes of them, uses the thresholded ones.

    Put it around guidance: it is the guided estimate that saturates. Raises ValueError for a percentile outside (0, 1).
    """

    def __init__(self, denoiser: Denoiser, percentile: float) -> None:
        _check(percentile)
        self.denoiser = denoiser
        self.percentile = percentile

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """What the denoiser inside makes of the conditioning."""
        return prepare(self.denoiser, conditioning)

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The estimate of the denoiser inside, thresholded: (B, C, H, W) in [-1, 1]."""
        return dynamic_thresholding(self.denoiser(x, sigma, conditioning), self.percentile)


def _check(percentile: float) -> None:
    if not 0 < percentile < 1:
        raise ValueError(f"threshold percentile={percentile} must be a fraction between 0 and 1, such as 0.995")
