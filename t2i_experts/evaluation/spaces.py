"""In what sense a picture is near another: pixels, pixels tile by tile, or the features of a network.

`pixels` is the plain distance of the literature on small pictures. `tiles` is that of Carlini et al. (arXiv 2301.13188, 5.1), who found
that pictures with large equal backgrounds are near each other without being copies, and take the greatest of 16 tiles' distances. Neither
sees through a shift or a mirror; networks do, with the cosine, as copies are sought since Somepalli et al. (arXiv 2212.03860).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from t2i_experts.evaluation.features import FeatureOptions, checked, load_features

PIXELS, TILES = "pixels", "tiles"


@dataclass(frozen=True)
class Space:
    """A space of pictures.

    record: what makes its distances what they are. see: (B, 3, H, W) uint8, all of one size, to (B, T, D) float32; the Euclidean distance
    of two, of T parts the greatest, is `distance`'s argument. distance: to the distance as it is told, in the same order.
    """

    record: Mapping[str, Any]
    see: Callable[[Tensor], Tensor]
    distance: Callable[[Tensor], Tensor]


def load_space(name: str, options: FeatureOptions, device: torch.device | str) -> Space:
    """`pixels`, `tiles`, or the space of an extractor's features. Raises ValueError for what the user got wrong."""
    if name in (PIXELS, TILES):
        options.only(name)
        return _pixels(32, 1) if name == PIXELS else _pixels(64, 4)
    extractor = load_features(name, options, device)

    def see(images: Tensor) -> Tensor:
        return normalize(extractor.encode(extractor.prepare(images.to(device))).float(), dim=-1)[:, None]

    return Space({**extractor.record, "distance": "1 - cosine"}, see, lambda euclidean: euclidean.square() / 2)


def _pixels(side: int, tiles: int) -> Space:
    """Pixels at a side in `tiles` x `tiles` parts, scaled so that a Euclidean distance is a root mean square of differences in [0, 1]."""
    part = side // tiles
    what = "root mean square of pixels' differences, of 0..1"
    record = {
        "name": "pixels" if tiles == 1 else "tiles",
        "features": PIXELS if tiles == 1 else TILES,
        "dimension": 3 * part * part,
        "size": side,
        "resize": "area",
        "distance": what if tiles == 1 else f"{what}, greatest of {tiles * tiles} tiles",
    }

    def see(images: Tensor) -> Tensor:
        small = interpolate(checked(images).float(), (side, side), mode="area") / (255 * (3 * part * part) ** 0.5)
        cut = small.unflatten(3, (tiles, part)).unflatten(2, (tiles, part))  # (B, 3, tiles, part, tiles, part)
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(len(images), tiles * tiles, -1)

    return Space(record, see, lambda euclidean: euclidean)
