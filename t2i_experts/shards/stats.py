"""What a shard folder holds: sizes of its pictures, lengths of its captions, and `sigma_data`, the scale of its pixels.

`sigma_data` is the standard deviation of the pixels as training sees them (EDM, arXiv 2206.00364, table 1): preconditioning and loss
weighting suppose it, and 0.5 is right for most photos, but not for drawings on white.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from t2i_experts.shards.images import image_size
from t2i_experts.shards.parallel import in_order
from t2i_experts.shards.reader import RawSample, ShardReader, Unreadable, UnreadableSample
from t2i_experts.shards.transforms import decode_image

TOLERANCE = 0.2
"""How far a configured sigma_data may be off the measured one, as a share of that, before it deserves a warning."""


class TokenCounter(Protocol):
    """The part of a tokeniser that statistics need. max_tokens: where it cuts a prompt; count: the tokens of a prompt that is not cut."""

    max_tokens: int

    def count(self, prompt: str) -> int: ...


@dataclass(frozen=True)
class Quantiles:
    """Some numbers: how many, their mean, and below which value 0, 5, 25, 50, 75, 95 and 100 % of them lie (interpolated linearly)."""

    count: int
    mean: float
    min: float
    p05: float
    p25: float
    p50: float
    p75: float
    p95: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles:
        """Of at least one number."""
        array = np.asarray(values, dtype=np.float64)
        return cls(len(array), float(array.mean()), *np.quantile(array, (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)).tolist())


@dataclass(frozen=True)
class TokenStatistics:
    """Tokens of the captions for one text encoder, special ones included. truncated: captions that have more than max_tokens."""

    tokens: Quantiles
    max_tokens: int
    truncated: int


@dataclass(frozen=True)
class ShardStatistics:
    """Of `drawn` of the `samples` of a folder.

    width, height: pixels as stored, before an EXIF rotation. aspect: width / height. enlarged: pictures whose shorter side is less than
    `size`. captions: per picture. characters, words: per caption; words are what white space divides.
    sigma_data, pixel_mean: standard deviation and mean of all values of the size x size centre squares, in [-1, 1].
    tokens: by the name of the text encoder.
    """

    samples: int
    drawn: int
    size: int
    width: Quantiles
    height: Quantiles
    shorter_side: Quantiles
    aspect: Quantiles
    enlarged: int
    captions: Quantiles
    characters: Quantiles
    words: Quantiles
    sigma_data: float
    pixel_mean: float
    tokens: Mapping[str, TokenStatistics]

    def misfit(self, sigma_data: float) -> float:
        """How far a configured sigma_data is off the measured one, as a share of that; infinite for pictures of one colour."""
        return abs(sigma_data / self.sigma_data - 1) if self.sigma_data else math.inf


def shard_statistics(
    folder: Path,
    *,
    size: int = 64,
    sample: int | None = None,
    workers: int = 1,
    tokenizers: Mapping[str, TokenCounter] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ShardStatistics:
    """Reads `sample` samples of a folder, drawn at random but always the same ones, or all of them.

    size: of the squares that training sees, in pixels. workers: threads that decode. progress is told (samples done, in all).
    Raises ValueError if the folder has no manifest, and names a sample that cannot be read.
    """
    for name, value in (("sample", sample), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"--{name}={value} must be at least 1")
    reader = ShardReader([folder], size=size, seed=0)
    drawn = reader.samples if sample is None else min(sample, reader.samples)
    # The first positions of the global order are different samples; reading them in the order of the tars is faster.
    indices = sorted(reader.order[position] for position in range(drawn))
    sizes: list[tuple[int, int]] = []
    captions: list[int] = []
    characters: list[int] = []
    words: list[int] = []
    counts: dict[str, list[int]] = {name: [] for name in tokenizers or {}}
    total = squares = 0
    progress(0, drawn)
    with ThreadPoolExecutor(workers) as pool:
        measured = in_order(pool, workers, functools.partial(_measure, size), (reader.raw(index) for index in indices))
        for done, (texts, shape, pixel_sum, pixel_squares) in enumerate(measured, start=1):
            sizes.append(shape)
            total += pixel_sum
            squares += pixel_squares
            captions.append(len(texts))
            characters += [len(text) for text in texts]
            words += [len(text.split()) for text in texts]
            for name, tokenizer in (tokenizers or {}).items():
                counts[name] += [tokenizer.count(text) for text in texts]
            progress(done, drawn)
    values = 3 * size * size * drawn
    return ShardStatistics(
        samples=reader.samples,
        drawn=drawn,
        size=size,
        width=Quantiles.of([width for width, _ in sizes]),
        height=Quantiles.of([height for _, height in sizes]),
        shorter_side=Quantiles.of([min(shape) for shape in sizes]),
        aspect=Quantiles.of([width / height for width, height in sizes]),
        enlarged=sum(min(shape) < size for shape in sizes),
        captions=Quantiles.of(captions),
        characters=Quantiles.of(characters),
        words=Quantiles.of(words),
        sigma_data=math.sqrt(values * squares - total * total) / values / 127.5,  # whole numbers under the root: nothing is rounded away
        pixel_mean=total / values / 127.5 - 1,
        tokens={
            name: TokenStatistics(
                Quantiles.of(counts[name]), tokenizer.max_tokens, sum(count > tokenizer.max_tokens for count in counts[name])
            )
            for name, tokenizer in (tokenizers or {}).items()
        },
    )


def _measure(size: int, raw: RawSample) -> tuple[tuple[str, ...], tuple[int, int], int, int]:
    """(captions, (width, height), sum of the pixels, sum of their squares) of a sample, pixels in 0..255."""
    try:
        pixels = decode_image(raw.image, size).numpy()  # as training sees it, (3, size, size)
        shape = image_size(raw.image)
    except ValueError as error:
        raise UnreadableSample(Unreadable(str(raw.shard), raw.key, str(error))) from error
    return raw.captions, shape, int(pixels.sum(dtype=np.int64)), int(np.square(pixels, dtype=np.uint32).sum(dtype=np.int64))
