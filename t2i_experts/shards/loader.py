"""Batches for one process of many: which positions it reads, and worker processes that read them ahead."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from t2i_experts.shards.buckets import Buckets
from t2i_experts.shards.reader import Sample
from t2i_experts.shards.transfer import Packed, pack, unpack

Batch = TypeVar("Batch")

_PR_SET_PDEATHSIG = 1
_PATIENCE = 1.0  # seconds of waiting for a batch after which `give_up` is asked
_LEAVE = 0.5  # seconds in which the workers can end by themselves


def position_batches(
    start: int, *, batch_size: int, accumulation: int, rank: int, world_size: int, stop: int | None = None
) -> Iterator[list[int]]:
    """This process's micro-batches of positions, `accumulation` of them for each global batch.

    Global batch i is the positions [start + i batch_size, start + (i + 1) batch_size), and process `rank` reads the rank-th of its
    `world_size` equal parts, in order. No global batch begins at or after `stop`; the last one is whole, so that all processes
    get the same number of equal batches and none waits for another.

    Raises ValueError unless batch_size is a multiple of world_size * accumulation.
    """
    if start < 0 or (stop is not None and stop < 0):
        raise ValueError(f"start={start} and stop={stop} must not be negative")
    if min(batch_size, accumulation, world_size) < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"batch_size={batch_size}, accumulation={accumulation} and world_size={world_size} must be positive and "
            f"rank={rank} in [0, {world_size})"
        )
    if batch_size % (world_size * accumulation):
        raise ValueError(
            f"batch_size={batch_size} must be a multiple of {world_size * accumulation}: {world_size} processes * {accumulation}"
        )
    return _position_batches(start, stop, batch_size, batch_size // (world_size * accumulation), rank * accumulation, accumulation)


def _position_batches(start: int, stop: int | None, batch_size: int, micro: int, first: int, count: int) -> Iterator[list[int]]:
    while stop is None or start < stop:
        for i in range(first, first + count):
            yield list(range(start + i * micro, start + (i + 1) * micro))
        start += batch_size


class SampleReader(Protocol):
    """Gives a sample for each position, and is asked for a process's positions in order. buckets: that its order is made of, if it is."""

    buckets: Buckets | None

    def __getitem__(self, position: int, /) -> Sample: ...


def open_loader(
    reader: SampleReader,
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
    """collate(samples) for each of `position_batches`, in order, read ahead by `workers` processes (0: in this one).

    give_up: asked every second while a worker's batch does not come, and says whether the batches end before it. Without workers nobody
    is asked: who reads a batch can do nothing else until it is there.

    Where there is CUDA, a batch that has a method `pin_memory`, as a tensor has, is in pinned memory.
    The workers start at once and stop with the iterator. No global random state is touched. ValueError as from `position_batches`
    and, when its batch is due, for a position at which the reader finds nothing to read.
    """
    if workers < 0:
        raise ValueError(f"workers={workers} must not be negative")
    if reader.buckets is not None and (batch_size != reader.buckets.batch_size or start % batch_size):
        raise ValueError(
            f"start={start}, batch_size={batch_size}: the reader's buckets allow whole batches of {reader.buckets.batch_size} alone"
        )
    positions = position_batches(start, batch_size=batch_size, accumulation=accumulation, rank=rank, world_size=world_size, stop=stop)
    loader: DataLoader[Any] = DataLoader(
        _Batches(reader, collate),
        batch_size=None,
        sampler=positions,
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        timeout=_PATIENCE if workers and give_up is not None else 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        worker_init_fn=_Orphan(os.getpid()),
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,  # Python 3.14 has another default
    )
    batches = _unpacked(iter(loader), give_up)
    next(batches)
    return batches


class _Batches(Dataset[Any], Generic[Batch]):
    """A dataset whose index is a list of positions and whose item is their batch, or the message of what went wrong."""

    def __init__(self, reader: SampleReader, collate: Callable[[Sequence[Sample]], Batch]) -> None:
        self._reader = reader
        self._collate = collate

    def __getitem__(self, positions: Sequence[int]) -> Batch | Packed | _Unreadable:
        try:
            samples = [self._reader[position] for position in positions]
        except ValueError as error:
            return _Unreadable(str(error))
        batch = self._collate(samples)
        return batch if get_worker_info() is None else pack(batch)


@dataclass(frozen=True)
class _Orphan:
    """Lets a worker die with the process that started it, even by SIGKILL: torch's own watchdog sleeps while a full queue blocks.

    Until then it works: a terminal's Ctrl-C and a scheduler's SIGTERM reach the workers too, and are the starting process's to answer.
    """

    parent: int

    def __call__(self, worker: int) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _not_mine)
            signal.siginterrupt(number, False)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.parent:  # it died before the line above
            os._exit(1)


class _Unreadable(str):
    """Travels from a worker in place of a batch: an exception would arrive with the worker's traceback as its message."""


def _unchanged(batch: Batch) -> Batch:
    return batch


def _not_mine(number: int, frame: FrameType | None) -> None:
    """Hears a signal and does nothing. A worker that ignored it instead would have the commands that it starts ignore it too."""


def _unpacked(batches: Iterator[Any], give_up: Callable[[], bool] | None) -> Generator[Any, None, None]:
    """Nothing, and then the batches: only a generator that has begun does something, such as ending the workers, when it is closed."""
    try:
        yield None
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if give_up is None or not _only_late(batches, error):
                    raise
                if give_up():
                    return
                continue
            if isinstance(batch, _Unreadable):
                raise ValueError(str(batch))
            yield unpack(batch) if isinstance(batch, Packed) else batch
    finally:
        _end_workers(batches)


def _only_late(batches: Any, error: RuntimeError) -> bool:
    """Whether torch's error says nothing but that its `timeout` has passed, after which one can wait on."""
    if "DataLoader timed out" not in str(error):
        return False
    pinning = getattr(batches, "_pin_memory_thread", None)  # which torch does not watch while it has a timeout
    if pinning is not None and not pinning.is_alive():
        raise RuntimeError("the thread that pins the batches' memory has ended unexpectedly") from error
    return True


def _end_workers(batches: Any) -> None:
    """Ends the workers, and by force those that wait for data: they do not hear SIGTERM, and this process could not exit before them."""
    workers = getattr(batches, "_workers", [])  # none without worker processes
    if workers:
        _hasten(batches, workers)
        batches._shutdown_workers()
    for worker in workers:
        worker.kill()
        worker.join()


def _hasten(batches: Any, workers: Sequence[BaseProcess]) -> None:
    """Makes torch's shutdown kill workers where it joins them, instead of waiting 5 s for each, and 5 s more after SIGTERM.

    At that point the thread that pins memory has ended, so it cannot wait for the rest of what a killed worker was sending, and the
    workers' event is set, whose lock a killed worker might hold. torch is first told to forget them: else it raises when one is killed.
    These are its private names (2.11 to 2.15): where one is missing, its shutdown takes its time.
    """
    with contextlib.suppress(AttributeError):
        if batches._worker_pids_set:
            torch._C._remove_worker_pids(id(batches))
            batches._worker_pids_set = False
        deadline = time.monotonic() + _LEAVE
        for worker in workers:
            worker.join = functools.partial(_join_or_kill, worker, worker.join, deadline)  # type: ignore[method-assign]


def _join_or_kill(worker: BaseProcess, join: Callable[[float | None], None], deadline: float, timeout: float | None = None) -> None:
    join(max(0.0, deadline - time.monotonic()))
    if worker.is_alive():
        worker.kill()
    join(timeout)
