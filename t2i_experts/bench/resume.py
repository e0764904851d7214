"""The first batch of a training run that goes on at a sample far from its beginning."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2i_experts.bench.drawn import DIFFERENT, draw_jpegs, write_shards
from t2i_experts.bench.machine import describe
from t2i_experts.bench.result import Result, Row
from t2i_experts.bench.timing import Timing, interleave
from t2i_experts.shards.loader import open_loader
from t2i_experts.shards.reader import Sample, ShardReader

_CPU = torch.device("cpu")


def bench_resume(
    position: int = 1_000_000, *, replayed: int = 20_000, samples: int = 4096, size: int = 64, batch_size: int = 64, repeats: int = 10
) -> Result:
    """From shards on the disk to the batch that begins at `position`, in one process and without workers.

    The baseline: webdataset, decoded, shuffled and repeated, behind Accelerate's `skip_first_batches`, which of a stream reads and drops
    all that comes before. Its time is measured for `replayed` samples and scaled to `position`, as if all of it were proportional to that
    (the shuffle buffer is filled only once); so is that without decoding, the least that a replay can do. The shards have `samples`
    pictures of size x size, drawn for the occasion, so that `position` lies in a later epoch.

    Raises RuntimeError unless the batch is the one that a run which began earlier reaches there.
    """
    for name, value in (("replayed", replayed), ("samples", samples), ("size", size), ("batch-size", batch_size)):
        if value < 1:
            raise ValueError(f"--{name}={value} must be at least 1")
    if position < replayed or replayed < batch_size:
        raise ValueError(f"--position={position} must be at least --replayed={replayed}, and that at least --batch-size={batch_size}")
    position, replayed = position // batch_size * batch_size, replayed // batch_size * batch_size
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, draw_jpegs(min(samples, DIFFERENT), size, quality=88), samples)
        tars = sorted(map(str, folder.glob("*.tar")))
        _refuse_another_batch(folder, position, size, batch_size)
        candidates = {
            "replay": lambda: _replayed(tars, replayed, batch_size, decoded=True),
            "replay, not decoded": lambda: _replayed(tars, replayed, batch_size, decoded=False),
        }
        replays = interleave(candidates, _CPU, repeats=max(1, repeats // 3), warmup=1)
        own = interleave({"own": lambda: _keys(folder, position, size, batch_size, 1)}, _CPU, repeats=repeats, warmup=1)["own"]
    rows = [
        Row(name, Timing(tuple(seconds * position / replayed for seconds in timing.seconds)), more={"measured s": timing.median})
        for name, timing in replays.items()
    ]
    rows.append(Row("own", own, ratio=replays["replay"].median * position / replayed / own.median, more={"measured s": own.median}))
    settings = {"position": position, "replayed": replayed, "samples": samples, "size": size, "batch size": batch_size, "repeats": repeats}
    return Result("resume", describe(_CPU), settings, rows)


def _keys(folder: Path, start: int, size: int, batch_size: int, batches: int) -> list[list[str]]:
    """The keys of the first batches of a run that starts there, from a reader that is new."""
    reader = ShardReader([folder], size=size, seed=0)
    loader = open_loader(reader, _stack, start=start, stop=None, batch_size=batch_size, accumulation=1, rank=0, world_size=1, workers=0)
    with contextlib.closing(loader):
        return [next(loader)[0] for _ in range(batches)]


def _stack(samples: Sequence[Sample]) -> tuple[list[str], Tensor]:
    return [sample.key for sample in samples], torch.stack([sample.image for sample in samples])


def _refuse_another_batch(folder: Path, position: int, size: int, batch_size: int) -> None:
    """Raises RuntimeError unless a run that started two batches before has the same third batch."""
    (resumed,) = _keys(folder, position, size, batch_size, 1)
    earlier = _keys(folder, position - 2 * batch_size, size, batch_size, 3)[-1] if position >= 2 * batch_size else resumed
    if resumed != earlier:
        raise RuntimeError(f"the batch at {position} differs from that of a run that began earlier: {resumed[0]!r}, {earlier[0]!r}")


def _replayed(tars: Sequence[str], count: int, batch_size: int, *, decoded: bool) -> Any:
    """The batch after `count` samples."""
    import webdataset
    from accelerate import skip_first_batches
    from torch.utils.data import DataLoader

    stream = webdataset.WebDataset(list(tars), shardshuffle=False).repeat().shuffle(1000)
    if decoded:
        stream = stream.decode("pil").map(_as_tensor)
    loader: Any = DataLoader(stream, batch_size=batch_size, collate_fn=list)
    return next(iter(skip_first_batches(loader, count // batch_size)))


def _as_tensor(sample: Any) -> Tensor:
    return torch.from_numpy(np.asarray(sample["jpg"]).transpose(2, 0, 1).copy())
