"""Statistics of a folder: the numbers themselves, against plain arithmetic over all that is in it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2i_experts.shards.reader import ShardReader
from t2i_experts.shards.stats import Quantiles, shard_statistics
from t2i_experts.shards.writer import ShardWriter

Encode = Callable[..., bytes]

SIZES = [(40, 30), (30, 40), (64, 16), (16, 16), (12, 20)]
CAPTIONS = [["a red apple"], ["one", "two words"], ["猫 🐈"], ["x" * 50], ["a b c d e f"]]


@dataclass(frozen=True)
class Letters:
    """A tokeniser of letters."""

    max_tokens: int

    def count(self, prompt: str) -> int:
        return len(prompt) + 2


@pytest.fixture
def folder(tmp_path: Path, encode: Encode) -> Path:
    with ShardWriter(tmp_path / "data", samples_per_shard=2) as writer:
        for i, (size, captions) in enumerate(zip(SIZES, CAPTIONS, strict=True)):
            writer.write(f"{i}", encode(i, size), "png", captions)
    return tmp_path / "data"


def test_the_numbers(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    found = shard_statistics(
        folder, size=16, tokenizers={"letters": Letters(13)}, workers=2, progress=lambda done, total: told.append((done, total))
    )
    assert told == [(i, 5) for i in range(6)] and (found.samples, found.drawn, found.size) == (5, 5, 16)
    assert found.width == Quantiles.of([40, 30, 64, 16, 12]) and found.height.max == 40 and found.height.p50 == 20
    assert (found.shorter_side.min, found.shorter_side.max, found.enlarged) == (12, 30, 1)
    assert (found.aspect.min, found.aspect.max) == (0.6, 4.0)
    assert (found.captions.count, found.captions.max, found.captions.mean) == (5, 2, 1.2)
    assert found.characters == Quantiles.of([11, 3, 9, 3, 50, 11]) and found.words == Quantiles.of([3, 1, 2, 2, 1, 6])
    assert found.tokens["letters"].tokens == Quantiles.of([13, 5, 11, 5, 52, 13])
    assert (found.tokens["letters"].truncated, found.tokens["letters"].max_tokens) == (1, 13)
    reader = ShardReader([folder], size=16, seed=0)
    pixels = np.stack([reader.item(i).image.numpy() for i in range(5)]) / 127.5 - 1
    assert found.sigma_data == pytest.approx(pixels.std(), rel=1e-12) and found.pixel_mean == pytest.approx(pixels.mean(), rel=1e-12)


def test_pixels_of_one_colour_and_of_two(tmp_path: Path) -> None:
    """Pixels of -1 and 1 in equal parts have sigma_data 1; one colour has 0, which no configured value fits."""
    for name, colours, expected in (("two", (0, 255), 1.0), ("one", (90, 90), 0.0)):
        with ShardWriter(tmp_path / name) as writer:
            for i, colour in enumerate(colours):
                data = io.BytesIO()
                Image.new("RGB", (8, 8), (colour,) * 3).save(data, "PNG")
                writer.write(f"{i}", data.getvalue(), "png", ["x"])
        found = shard_statistics(tmp_path / name, size=8)
        assert found.sigma_data == expected
        assert found.misfit(0.5) == (0.5 if expected else float("inf"))


def test_a_sample_is_drawn_anew_in_no_run(folder: Path) -> None:
    several = [shard_statistics(folder, size=8, sample=3, workers=workers) for workers in (1, 2)]
    assert several[0] == several[1] and (several[0].drawn, several[0].samples, several[0].captions.count) == (3, 5, 3)
    assert shard_statistics(folder, size=8, sample=50) == shard_statistics(folder, size=8)


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    for arguments, message in (({"sample": 0}, "--sample=0"), ({"workers": 0}, "--workers=0"), ({"size": 0}, "size=0")):
        with pytest.raises(ValueError, match=message):
            shard_statistics(folder, **arguments)
    with pytest.raises(ValueError, match="not found"):
        shard_statistics(tmp_path / "none")
    with ShardWriter(tmp_path / "broken") as writer:
        data = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(data, "PNG")
        writer.write("bad", data.getvalue()[:3000], "png", ["x"])
    with pytest.raises(ValueError, match=r"00000\.tar: sample 'bad': .*--write-manifest"):
        shard_statistics(tmp_path / "broken")
