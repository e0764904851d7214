"""Pictures that a benchmark draws for itself, as large on the disk and as hard to decode as photographs."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
from PIL import Image

from t2i_experts.shards.writer import ShardWriter

DIFFERENT = 64
"""So many pictures are drawn; more are copies of them, with other keys and captions."""

_WORDS = ["a", "photograph", "of", "an", "old", "red", "house", "by", "the", "lake", "under", "tall", "green", "trees", "at", "dusk"]


def draw_jpegs(count: int, side: int, quality: int, seed: int = 0) -> list[bytes]:
    """Noise with the spectrum of natural images, amplitude 1/f (Field, "Relations between the statistics of natural images", 1987), most
    of it common to the three colours. Raises ValueError unless there is something to draw."""
    if min(count, side) < 1:
        raise ValueError(f"count={count} and side={side} must be positive")
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    amplitude = 1 / np.maximum(frequency, 1 / side)
    jpegs = []
    for _ in range(count):
        phases = np.exp(2j * np.pi * rng.random((4, *frequency.shape)))
        grey, *colours = np.fft.irfft2(amplitude * phases, s=(side, side))  # (side, side) each
        pixels = np.stack([grey + 0.3 * colour for colour in colours], axis=-1)
        pixels = 128 + 50 * (pixels - pixels.mean()) / max(pixels.std(), 1e-9)
        out = io.BytesIO()
        Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=quality)
        jpegs.append(out.getvalue())
    return jpegs


def write_shards(folder: Path, jpegs: list[bytes], samples: int, samples_per_shard: int = 4096) -> None:
    """Shards of so many samples, the pictures in turn, each with a key and a caption of its own."""
    with ShardWriter(folder, samples_per_shard=samples_per_shard) as writer:
        for i, jpeg in zip(range(samples), itertools.cycle(jpegs), strict=False):
            writer.write(f"{i:08d}", jpeg, "jpg", [" ".join([*_WORDS[: 5 + i % 12], str(i)])])
