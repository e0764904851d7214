"""Samples out of local tars: found by an index and read by offset, beside webdataset, which reads the tars from front to back."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from t2i_experts.bench.drawn import DIFFERENT, draw_jpegs, write_shards
from t2i_experts.bench.error import relative_rms
from t2i_experts.bench.machine import describe
from t2i_experts.bench.result import Result, Row
from t2i_experts.bench.timing import interleave
from t2i_experts.shards.index import scan
from t2i_experts.shards.reader import ShardReader

_CPU = torch.device("cpu")


def bench_shards(samples: int, *, size: int = 64, repeats: int = 10) -> Result:
    """All samples of some shards in one process that begins with nothing open, once as bytes and once decoded.

    The baseline: `webdataset.WebDataset(tars)` alone, and with `.decode("pil")`, in the order of the tars; its pixels are put into an
    array, as a batch would need them. Own: in that order, and in the global one, in which training reads. error: of the pixels.

    The shards, pictures of size x size, are drawn for the occasion. Raises RuntimeError unless both give the same keys, captions and bytes.
    """
    if min(samples, size) < 1:
        raise ValueError(f"--samples={samples} and --size={size} must be positive")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, draw_jpegs(min(samples, DIFFERENT), size, quality=88), samples)
        tars = sorted(map(str, folder.glob("*.tar")))
        _refuse_difference(folder, tars, size)
        everything = range(samples)
        candidates = {
            "webdataset": lambda: _exhaust(_stream(tars)),
            "own": lambda: _exhaust(map(_reader(folder, size).raw, everything)),
            "own, global order": lambda: _shuffled(folder, size, decoded=False),
            "webdataset, decoded": lambda: _exhaust(_pixels(tars)),
            "own, decoded": lambda: _exhaust(map(_reader(folder, size).item, everything)),
            "own, decoded, global order": lambda: _shuffled(folder, size, decoded=True),
            "own, index lost": lambda: [scan(Path(tar)) for tar in tars],
        }
        timings = interleave(candidates, _CPU, repeats=repeats, warmup=1)
        error = _error(folder, tars, size)
        jpeg_bytes = sum(len(_reader(folder, size).raw(i).image) for i in everything) / samples
    rows = []
    for candidate, timing in timings.items():
        baseline = "webdataset, decoded" if "decoded" in candidate else "webdataset"
        own = candidate != baseline
        ratio = timings[baseline].median / timing.median if own else None
        differs = error if own and "decoded" in candidate else None
        rows.append(Row(candidate, timing, ratio=ratio, error=differs, more={"samples/s": samples / timing.median}))
    settings = {"samples": samples, "size": size, "tars": len(tars), "bytes a picture": round(jpeg_bytes), "repeats": repeats}
    return Result("shards", describe(_CPU), settings, rows)


def _reader(folder: Path, size: int) -> ShardReader:
    return ShardReader([folder], size=size, seed=0)


def _stream(tars: Sequence[str]) -> Any:
    import webdataset

    return webdataset.WebDataset(list(tars), shardshuffle=False)


def _pixels(tars: Sequence[str]) -> Iterator[np.ndarray]:
    return (np.asarray(sample["jpg"]) for sample in _stream(tars).decode("pil"))


def _exhaust(samples: Any) -> None:
    for _ in samples:
        pass


def _shuffled(folder: Path, size: int, *, decoded: bool) -> None:
    """One epoch of the global order."""
    reader = _reader(folder, size)
    for position in range(reader.samples):
        if decoded:
            reader[position]
        else:
            reader.raw(reader.order[position])


def _refuse_difference(folder: Path, tars: Sequence[str], size: int) -> None:
    """Raises RuntimeError unless webdataset and the reader give the same samples in the same order."""
    reader = _reader(folder, size)
    count = 0
    for i, other in enumerate(_stream(tars)):
        own = reader.raw(i)
        if (own.key, own.image, own.captions[0].encode()) != (other["__key__"], other["jpg"], other["txt"]):
            raise RuntimeError(f"sample {i}: own key {own.key!r} is not webdataset's {other['__key__']!r}, or has other bytes")
        count += 1
    if count != reader.samples:
        raise RuntimeError(f"webdataset gives {count} samples, the reader {reader.samples}")


def _error(folder: Path, tars: Sequence[str], size: int) -> float:
    """Of the pixels of the first samples, relative root mean square."""
    reader = _reader(folder, size)
    theirs = [torch.tensor(pixels) for pixels in itertools.islice(_pixels(tars), min(reader.samples, DIFFERENT))]
    return relative_rms([reader.item(i).image.permute(1, 2, 0) for i in range(len(theirs))], theirs)
