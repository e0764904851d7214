"""Shards behind URLs, read as streams, for training: what `ShardReader` and `open_loader` are for folders, with a weaker guarantee.

Tars come in the order of `GlobalOrder`, over tars instead of samples: all of them once in each epoch, in another order each. Share i of n
reads every n-th tar of it, from the i-th on, and each process has as many shares as worker processes. Within a share samples are
shuffled through a buffer. The order begins anew, as another one, wherever a run starts or goes on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch.utils.data import get_worker_info

from t2i_experts.config import is_url
from t2i_experts.shards.buckets import Buckets
from t2i_experts.shards.format import EncoderRecord, parse_captions
from t2i_experts.shards.loader import SampleReader, open_loader
from t2i_experts.shards.order import GlobalOrder, PositionDraws, position_rng
from t2i_experts.shards.reader import Sample, ShardReader, Unreadable
from t2i_experts.shards.tar_stream import StreamedSample, read_tar
from t2i_experts.shards.transforms import decode_image
from t2i_experts.shards.urls import expand_urls

Batch = TypeVar("Batch")

BUFFER_SAMPLES = 4096
BUFFER_BYTES = 2**27
"""Of encoded samples that a share holds for shuffling, whichever is reached first."""

_TARS_IN_A_ROW = 16
_SAMPLES_IN_A_ROW = 100_000


class StreamReader:
    """The samples of tars behind URLs as one dataset. It holds no state: `open_batches` begins reading, anywhere and as often as wanted.

    dataset_hash: of the URLs; what lies behind them is not looked at.
    """

    def __init__(self, urls: Sequence[str], *, size: int, seed: int) -> None:
        """size: pixels of the square images. Raises ValueError as `expand_urls` does; nothing is opened."""
        self.size = size
        self.seed = seed
        self._caption_draws = PositionDraws(seed, "caption")
        self.embeddings: tuple[EncoderRecord, ...] = ()
        self.tars = expand_urls(urls)
        self.dataset_hash = hashlib.sha256(json.dumps(["urls", *self.tars]).encode()).hexdigest()

    @property
    def guarantee(self) -> str:
        """What a run should tell its user at the start."""
        return (
            f"note: data.train is read as streams from {len(self.tars):,} tars behind URLs: the order depends on the number of processes "
            "and workers and begins anew at a restart, so that some samples of that epoch are seen twice or not at all; folders of shards "
            "have an exact order"
        )

    def workers(self, wanted: int, processes: int) -> int:
        """How many workers a process can have, each of which reads tars of its own."""
        return min(wanted, len(self.tars) // processes)

    def decode(self, stored: StreamedSample, position: int) -> Sample:
        """A sample at a position, which chooses its caption. Raises ValueError for a picture or captions that are broken."""
        captions, metadata = parse_captions(stored.text, stored.fields)
        image = decode_image(stored.image, self.size)
        choice = int(self._caption_draws.at(position).integers(len(captions)))
        return Sample(position, stored.key, image, captions[choice], metadata)


def open_reader(
    paths: Sequence[str | Path],
    *,
    size: int,
    seed: int,
    processes: int,
    embeddings: Sequence[str] = (),
    buckets: Buckets | None = None,
    progress: bool = False,
) -> ShardReader | StreamReader:
    """The reader for what a config names for training, all folders or all URLs.

    embeddings, buckets, progress: of folders alone, see `ShardReader`.

    Raises ValueError as the readers do, and for fewer tars behind URLs than processes.
    """
    urls = [str(path) for path in paths if is_url(str(path))]
    if not urls:
        return ShardReader(paths, size=size, seed=seed, embeddings=embeddings, buckets=buckets, progress=progress)
    reader = StreamReader(urls, size=size, seed=seed)
    if len(reader.tars) < processes:
        raise ValueError(
            f"data.train={urls} has {len(reader.tars)} tars for {processes} processes, each of which reads tars of its own: "
            "start at most as many processes, cut the shards smaller, or copy them to a folder"
        )
    return reader


def open_batches(
    reader: ShardReader | StreamReader,
    collate: Callable[[Sequence[Sample]], Batch],
    *,
    start: int,
    stop: int | None,
    batch_size: int,
    accumulation: int,
    rank: int,
    world_size: int,
    workers: int,
    give_up: Callable[[], bool] | None = None,
) -> Generator[Batch, None, None]:
    """`open_loader`, of a stream too.

    The samples of a stream get the positions that `open_loader` gives this process, in the order in which they come: no two share one, and
    what is drawn by position is drawn anew for each. Its tars are shared out over min(workers, tars / world_size) workers.
    ValueError as from `open_loader`, and when nothing can be read any more.
    """
    if isinstance(reader, StreamReader):
        workers = reader.workers(workers, world_size)
        source: SampleReader = _Stream(reader, start, rank, world_size, workers)
    else:
        source = reader
    return open_loader(
        source,
        collate,
        start=start,
        stop=stop,
        batch_size=batch_size,
        accumulation=accumulation,
        rank=rank,
        world_size=world_size,
        workers=workers,
        give_up=give_up,
    )


class _Stream:
    """One process's part of a stream; each of its workers opens a share of its own with the first sample that it reads."""

    def __init__(self, reader: StreamReader, start: int, rank: int, world_size: int, workers: int) -> None:
        self._reader = reader
        self._start = start
        self._rank, self._world_size, self._workers = rank, world_size, max(1, workers)
        self._share: _Share | None = None
        self.buckets: Buckets | None = None

    def __getitem__(self, position: int) -> Sample:
        """The next sample of the share, put at this position."""
        if self._share is None:
            info = get_worker_info()
            share = self._rank + self._world_size * (info.id if info else 0)
            self._share = _Share(self._reader, self._start, share, self._world_size * self._workers)
        return self._share.take(position)


class _Share:
    """Share i of n: every n-th tar of the order, from the i-th on, through a shuffle buffer that runs empty at the end of each epoch."""

    def __init__(self, reader: StreamReader, start: int, share: int, shares: int) -> None:
        self._reader = reader
        self._order = GlobalOrder(len(reader.tars), f"{reader.dataset_hash}/{start}", reader.seed)
        self._buffer_name = f"buffer {share} of {shares} from {start}"
        self._share, self._shares = share, shares
        self._barren: set[str] = set()  # tars in a row that gave nothing
        self._gave = False  # whether this epoch gave anything
        self._tars = self._samples = 0  # read to the end, and what they held
        self._found = self._shuffled()

    def take(self, position: int) -> Sample:
        """The next sample that can be read, put at a position; it names those before it that cannot.

        Raises ValueError when sixteen tars in a row, or all of them, give nothing.
        """
        unreadable: list[Unreadable] = []
        for found in self._found:
            if isinstance(found, StreamedSample):
                try:
                    sample = self._reader.decode(found, position)
                except ValueError as error:
                    found = Unreadable(found.tar, found.key, str(error))
                else:
                    self._barren.clear()
                    self._gave = True
                    return replace(sample, unreadable=tuple(unreadable))
            if isinstance(found, set):
                self._barren |= set() if self._gave else found
                self._gave = False
            else:
                unreadable.append(found)
                self._barren |= {found.shard} if found.key is None else set()
            if len(self._barren) >= min(_TARS_IN_A_ROW, len(self._reader.tars)) or len(unreadable) >= _SAMPLES_IN_A_ROW:
                break
        first = unreadable[0]
        where = first.shard if first.key is None else f"{first.shard}: sample {first.key!r}"
        raise ValueError(
            f"{where}: {first.why}. Nor can anything else be read of {max(1, len(self._barren)):,} tars in a row "
            f"(data.train has {len(self._reader.tars):,}); when they can be read, the same command goes on from the last checkpoint"
        )

    def _shuffled(self) -> Iterator[StreamedSample | Unreadable | set[str]]:
        """Samples without end, and as they occur what is unreadable; after each epoch the tars that were read for it."""
        buffer: list[StreamedSample] = []
        places = itertools.count(self._share, self._shares)
        for epoch, tars in itertools.groupby(places, lambda place: place // len(self._reader.tars)):
            rng = position_rng(self._reader.seed, epoch, self._buffer_name)
            seen, held = set(), 0
            for place in tars:
                seen.add(tar := self._reader.tars[self._order[place]])
                for found in self._tar(tar):
                    if isinstance(found, Unreadable):
                        yield found
                        continue
                    buffer.append(found)
                    held += found.bytes
                    while len(buffer) > BUFFER_SAMPLES or held > BUFFER_BYTES:
                        drawn = _draw(buffer, int(rng.integers(len(buffer))))
                        held -= drawn.bytes
                        yield drawn
            while buffer:
                yield _draw(buffer, int(rng.integers(len(buffer))))
            yield seen

    def _tar(self, tar: str) -> Iterator[StreamedSample | Unreadable]:
        """What a tar gives. If it breaks off, it counts as so many unreadable draws as it probably has samples left."""
        given = 0
        for found in read_tar(tar, patient=tar not in self._barren):
            if isinstance(found, Unreadable) and found.key is None:
                mean = self._samples // self._tars if self._tars else 1
                yield replace(found, draws=max(1, mean - given))
                return
            given += 1
            yield found
        self._tars += 1
        self._samples += given


def _draw(buffer: list[StreamedSample], i: int) -> StreamedSample:
    buffer[i], buffer[-1] = buffer[-1], buffer[i]
    return buffer.pop()
