"""Batches from worker processes: this package's loader on shards, beside a DataLoader that opens the original files with Pillow."""

from __future__ import annotations

import contextlib
import io
import itertools
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from t2i_experts.bench.drawn import DIFFERENT, draw_jpegs, write_shards
from t2i_experts.bench.error import relative_rms
from t2i_experts.bench.machine import describe
from t2i_experts.bench.result import Result, Row
from t2i_experts.bench.timing import Timing
from t2i_experts.shards.images import prepare
from t2i_experts.shards.loader import open_loader
from t2i_experts.shards.reader import Sample, ShardReader
from t2i_experts.shards.transforms import decode_image

_BASELINE = "files, Pillow"
_CPU = torch.device("cpu")


class PictureFolder(Dataset[Tensor]):
    """Picture files as torchvision's ImageFolder with Resize (bicubic), CenterCrop and ToTensor gives them: (3, size, size) in [0, 1]."""

    def __init__(self, folder: Path, size: int) -> None:
        self._files = sorted(folder.iterdir())
        self._size = size

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self._files[index]) as image:
            return torch.from_numpy(bicubic(image.convert("RGB"), self._size).transpose(2, 0, 1).copy()).float().div_(255)


def bicubic(image: Image.Image, size: int) -> np.ndarray:
    """(size, size, 3) uint8: the shorter side resized to `size`, then the centre."""
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def bench_loader(images: int, *, side: int = 512, size: int = 64, batch_size: int = 64, workers: int = 2, repeats: int = 10) -> Result:
    """Pictures per second of `images` JPEGs of side x side, drawn for the occasion, in batches of size x size.

    The baseline: the files in a folder, `PictureFolder` and a DataLoader that draws from it, with as many workers. Own: shards of the same
    bytes, and shards whose pictures were resized when they were built. A turn begins when each worker has brought a batch, and lasts an
    epoch of pictures, or ten of prepared ones. error: of the pixels, relative to the whole picture resized with Lanczos's filter in
    float32; the baseline's filter is another one.
    """
    for name, value in (("images", images), ("side", side), ("size", size), ("batch-size", batch_size), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"--{name}={value} must be at least 1")
    if workers < 0 or side < size:
        raise ValueError(f"--workers={workers} must not be negative, and --side={side} at least --size={size}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        originals = draw_jpegs(min(images, DIFFERENT), side, quality=88)
        prepared = [prepare(original, size)[0] for original in originals]
        (folder / "files").mkdir()
        for i, original in zip(range(images), itertools.cycle(originals), strict=False):
            (folder / "files" / f"{i:08d}.jpg").write_bytes(original)
        write_shards(folder / "shards", originals, images)
        write_shards(folder / "prepared", prepared, 10 * images)

        candidates: dict[str, tuple[Callable[[], Generator[Tensor, None, None]], int]] = {
            _BASELINE: (lambda: _files(folder / "files", size, batch_size, workers), images),
            "shards": (lambda: _own(folder / "shards", size, batch_size, workers), images),
            "shards, prepared": (lambda: _own(folder / "prepared", size, batch_size, workers), 10 * images),
        }
        seconds: dict[str, list[float]] = {candidate: [] for candidate in candidates}
        for _ in range(repeats):
            for candidate, (begin, count) in candidates.items():
                with contextlib.closing(begin()) as batches:
                    seconds[candidate].append(_seconds_an_image(batches, count, workers))
    errors = _errors(originals, prepared, size)
    timings = {candidate: Timing(tuple(times)) for candidate, times in seconds.items()}
    rows = [
        Row(
            candidate,
            timing,
            ratio=None if candidate == _BASELINE else timings[_BASELINE].median / timing.median,
            error=errors[candidate],
            more={"images/s": 1 / timing.median},
        )
        for candidate, timing in timings.items()
    ]
    settings = {"images": images, "side": side, "size": size, "batch size": batch_size, "workers": workers, "repeats": repeats}
    return Result("loader", describe(_CPU), settings, rows)


def _files(folder: Path, size: int, batch_size: int, workers: int) -> Generator[Tensor, None, None]:
    """Batches without end of (B, 3, size, size) float32."""
    dataset = PictureFolder(folder, size)
    endless = RandomSampler(dataset, replacement=True, num_samples=2**40)  # between two epochs the workers would wait
    yield from DataLoader(dataset, batch_size, sampler=endless, num_workers=workers)


def _own(folder: Path, size: int, batch_size: int, workers: int) -> Generator[Tensor, None, None]:
    """Batches without end of (B, 3, size, size) uint8, which become float32 on the device that trains."""
    reader = ShardReader([folder], size=size, seed=0)
    return open_loader(reader, _stack, start=0, stop=None, batch_size=batch_size, accumulation=1, rank=0, world_size=1, workers=workers)


def _stack(samples: Sequence[Sample]) -> Tensor:
    return torch.stack([sample.image for sample in samples])


def _seconds_an_image(batches: Iterator[Tensor], images: int, workers: int) -> float:
    """Of at least so many images, after a batch of each worker."""
    for _ in range(max(1, workers)):
        next(batches)
    started, seen = time.perf_counter(), 0
    while seen < images:
        seen += len(next(batches))
    return (time.perf_counter() - started) / seen


def _errors(originals: Sequence[bytes], prepared: Sequence[bytes], size: int) -> dict[str, float]:
    """Of each candidate's pixels over all the pictures, relative root mean square."""
    references = [torch.from_numpy(_reference(original, size)) for original in originals]
    pixels = {
        _BASELINE: [torch.tensor(bicubic(Image.open(io.BytesIO(original)).convert("RGB"), size)) for original in originals],
        "shards": [decode_image(original, size).permute(1, 2, 0) for original in originals],
        "shards, prepared": [decode_image(small, size).permute(1, 2, 0) for small in prepared],
    }
    return {name: relative_rms(found, references) for name, found in pixels.items()}


def _reference(data: bytes, size: int) -> np.ndarray:
    """(size, size, 3) float32 in [0, 255], from the whole of a square picture."""
    with Image.open(io.BytesIO(data)) as image:
        bands = [band.convert("F").resize((size, size), Image.Resampling.LANCZOS) for band in image.convert("RGB").split()]
    return np.stack([np.asarray(band) for band in bands], axis=-1)
