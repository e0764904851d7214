"""The spaces in which pictures are near each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from t2i_experts.evaluation.features import FeatureOptions, load_features
from t2i_experts.evaluation.spaces import Space, load_space


def distance(space: Space, a: Tensor, b: Tensor) -> float:
    seen = [space.see(image[None]) for image in (a, b)]
    return float(space.distance((seen[0] - seen[1]).norm(dim=-1).amax()))


def picture(value: int = 0, size: int = 64) -> Tensor:
    return torch.full((3, size, size), value, dtype=torch.uint8)


def test_pixels_are_a_root_mean_square_and_tiles_the_greatest_of_sixteen() -> None:
    pixels, tiles = (load_space(name, FeatureOptions(), "cpu") for name in ("pixels", "tiles"))
    for space in (pixels, tiles):
        for size in (16, 64, 130):
            assert distance(space, picture(0, size), picture(255, size)) == pytest.approx(1, abs=1e-5)
            assert distance(space, picture(100, size), picture(151, size)) == pytest.approx(0.2, abs=1e-5)
    one = picture()
    one[:, 16:32, 48:64] = 255  # one tile
    assert distance(tiles, picture(), one) == pytest.approx(1, abs=1e-5)
    assert distance(pixels, picture(), one) == pytest.approx(1 / 4, abs=1e-5)
    one = picture()
    one[0, :16, :16] = 255  # one channel of one tile
    assert distance(tiles, picture(), one) == pytest.approx(3**-0.5, abs=1e-5)
    assert (pixels.see(picture()[None]).shape, tiles.see(picture()[None]).shape) == ((1, 1, 3072), (1, 16, 768))


def test_of_a_network_it_is_one_minus_the_cosine(clip_folder: Path) -> None:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=random)
    options = FeatureOptions(model=str(clip_folder))
    extractor, space = load_features("open_clip", options, "cpu"), load_space("open_clip", options, "cpu")
    features = extractor.encode(extractor.prepare(images))
    assert distance(space, images[0], images[1]) == pytest.approx(1 - float(cosine_similarity(features[0], features[1], dim=0)), abs=1e-5)
    assert distance(space, images[0], images[0]) == 0
    assert space.record["sha256"] == extractor.record["sha256"] and space.record["distance"] == "1 - cosine"


def test_pixels_have_no_options() -> None:
    with pytest.raises(ValueError, match="--weights='x' does not apply to --features tiles; it has no options"):
        load_space("tiles", FeatureOptions(weights="x"), "cpu")
