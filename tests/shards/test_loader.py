"""Batches over ranks and workers: together always the same global order, from any position."""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_experts.shards import loader
from t2i_experts.shards.loader import open_loader, position_batches
from t2i_experts.shards.reader import Sample, ShardReader
from t2i_experts.shards.writer import ShardWriter

MakeShards = Callable[..., Path]
Seen = list[tuple[int, str, str]]


def collate(samples: Sequence[Sample]) -> tuple[Seen, torch.Tensor]:
    return [(s.position, s.key, s.caption) for s in samples], torch.stack([s.image for s in samples])


def gather(reader: ShardReader, start: int, stop: int, batch_size: int, accumulation: int, world_size: int, workers: int) -> Seen:
    """All ranks' samples, joined batch by batch as the ranks' parts follow each other."""
    ranks = [
        list(
            open_loader(
                reader,
                collate,
                start=start,
                stop=stop,
                batch_size=batch_size,
                accumulation=accumulation,
                rank=rank,
                world_size=world_size,
                workers=workers,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    seen: Seen = []
    for first in range(0, len(ranks[0]), accumulation):
        for batches in ranks:
            for samples, images in batches[first : first + accumulation]:
                assert images.shape == (batch_size // world_size // accumulation, 3, 4, 4) and images.dtype == torch.uint8
                seen += samples
    return seen


@pytest.fixture
def reader(tmp_path: Path, make_shards: MakeShards) -> ShardReader:
    return ShardReader([make_shards(tmp_path, 13)], size=4, seed=5)


@pytest.mark.parametrize(("world_size", "accumulation", "workers"), [(1, 1, 0), (2, 1, 0), (4, 2, 0), (1, 2, 2), (2, 1, 2), (4, 1, 2)])
@pytest.mark.parametrize("start", [0, 5])
def test_ranks_and_workers_read_one_global_order(reader: ShardReader, start: int, world_size: int, accumulation: int, workers: int) -> None:
    expected = [(s.position, s.key, s.caption) for s in (reader[position] for position in range(start, start + 40))]
    assert gather(reader, start, start + 40, 8, accumulation, world_size, workers) == expected


def test_pixels_are_the_same_in_workers_and_in_a_process_with_many_threads(tmp_path: Path, encode: Callable[..., bytes]) -> None:
    """Resizing is a product of matrices, which threads share out and processes inherit."""
    with ShardWriter(tmp_path) as writer:
        for i in range(8):
            writer.write(str(i), encode(i, (150 + i, 130), "JPEG", quality=95), "jpg", ["a"])
    options: dict[str, Any] = {"start": 0, "stop": 16, "batch_size": 4, "accumulation": 1, "rank": 0, "world_size": 1}
    threads = torch.get_num_threads()
    found = []
    try:
        for count, workers in ((1, 0), (4, 0), (4, 2)):
            torch.set_num_threads(count)
            torch.mm(torch.ones(600, 600), torch.ones(600, 600))  # large enough for all threads, which a fork does not take along
            batches = open_loader(ShardReader([tmp_path], size=48, seed=0), collate, workers=workers, **options)
            found.append(torch.cat([images for _, images in batches]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_restarting_anywhere_on_other_ranks_goes_on_as_if_nothing_had_happened(reader: ShardReader) -> None:
    unbroken = gather(reader, 0, 48, 8, 1, 1, 0)
    for stop in (8, 24, 40):
        assert gather(reader, 0, stop, 8, 1, 2, 0) + gather(reader, stop, 48, 8, 2, 4, 0) == unbroken


def test_restarting_far_away_costs_nothing(reader: ShardReader) -> None:
    far = 10**12
    assert [position for position, _, _ in gather(reader, far, far + 8, 8, 1, 1, 0)] == list(range(far, far + 8))


def test_the_last_batch_is_whole_and_equal_for_all(reader: ShardReader) -> None:
    for rank in range(4):
        batches = list(position_batches(3, stop=20, batch_size=8, accumulation=1, rank=rank, world_size=4))
        assert batches == [[start + 2 * rank, start + 2 * rank + 1] for start in (3, 11, 19)]
    assert list(position_batches(8, stop=8, batch_size=8, accumulation=1, rank=0, world_size=1)) == []


def test_without_a_stop_it_never_ends() -> None:
    batches = position_batches(0, batch_size=6, accumulation=3, rank=0, world_size=1)
    assert list(itertools.islice(batches, 5)) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


@pytest.mark.parametrize(
    "change", [{"batch_size": 6}, {"batch_size": 0}, {"accumulation": 3}, {"rank": 2}, {"rank": -1}, {"world_size": 0}, {"start": -1}]
)
def test_bad_arguments_are_refused_at_once(change: dict[str, int]) -> None:
    arguments = {"start": 0, "batch_size": 8, "accumulation": 2, "rank": 0, "world_size": 2} | change
    with pytest.raises(ValueError):
        position_batches(arguments.pop("start"), **arguments)


def test_workers_end_with_the_iterator_and_random_state_is_left_alone(reader: ShardReader) -> None:
    state = torch.get_rng_state()
    batches = open_loader(reader, collate, start=0, stop=None, batch_size=4, accumulation=1, rank=0, world_size=1, workers=2)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    del batches
    assert not multiprocessing.active_children()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_sample_is_one_plain_message(tmp_path: Path, reader: ShardReader, workers: int) -> None:
    for tar in tmp_path.glob("*.tar"):
        tar.write_bytes(tar.read_bytes().replace(b"IDAT", b"IDAX"))
    with pytest.raises(ValueError, match=r"^\S+\.tar: sample '\d+': [^\n]*$"):
        list(open_loader(reader, collate, start=0, stop=4, batch_size=4, accumulation=1, rank=0, world_size=1, workers=workers))


class Slow:
    """A reader whose fifth sample lets one wait."""

    buckets = None

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __getitem__(self, position: int) -> Any:
        time.sleep(self.seconds if position == 4 else 0)
        return position


@pytest.mark.parametrize("last_time", [None, 3])
def test_who_waits_is_asked_whether_to_go_on(monkeypatch: pytest.MonkeyPatch, last_time: int | None) -> None:
    """Again and again. Waiting on loses nothing; who gives up gets no more batches, and no workers are left."""
    monkeypatch.setattr(loader, "_PATIENCE", 0.1)
    times = itertools.count(1)
    options: dict[str, Any] = {"start": 0, "stop": 8, "batch_size": 2, "accumulation": 1, "rank": 0, "world_size": 1, "workers": 2}
    batches = open_loader(Slow(30 if last_time else 0.5), list, give_up=lambda: next(times) == last_time, **options)
    assert list(batches) == [[0, 1], [2, 3], [4, 5], [6, 7]][: 2 if last_time else 4]
    asked = next(times) - 1
    assert asked == last_time if last_time else 1 <= asked <= 5
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_is_not_taken_for_a_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_PATIENCE", 0.1)
    options: dict[str, Any] = {"start": 0, "stop": 8, "batch_size": 2, "accumulation": 1, "rank": 0, "world_size": 1, "workers": 1}
    batches = open_loader(Slow(30), list, give_up=lambda: [worker.kill() for worker in multiprocessing.active_children()] == [], **options)
    with pytest.raises(RuntimeError, match="worker"):
        list(batches)
    assert not multiprocessing.active_children()


def test_batches_that_nobody_pins_any_more_do_not_only_come_late() -> None:
    """torch watches its thread for that only when it waits without a limit."""
    late = RuntimeError("DataLoader timed out after 1.0 seconds")
    thread = threading.Thread(target=time.sleep, args=(0.2,))
    thread.start()
    batches = types.SimpleNamespace(_pin_memory_thread=thread)
    assert loader._only_late(batches, late) and loader._only_late(iter(()), late)
    assert not loader._only_late(batches, RuntimeError("DataLoader worker exited"))
    thread.join()
    with pytest.raises(RuntimeError, match=r"thread that pins .* has ended"):
        loader._only_late(batches, late)


class Told:
    """A reader that reads in C, and to whose process SIGINT comes meanwhile."""

    buckets = None

    def __getitem__(self, position: int) -> Any:
        end, start = os.pipe()
        subprocess.Popen(["sh", "-c", "sleep 0.2; kill -INT $PPID; sleep 0.2; echo"], stdout=start)
        return ctypes.CDLL(None).read(end, ctypes.create_string_buffer(1), 1)


def test_a_signal_breaks_nothing_off_in_a_worker() -> None:
    """Python would go on by itself, but not a library that reads for it."""
    options: dict[str, Any] = {"start": 0, "stop": 1, "batch_size": 1, "accumulation": 1, "rank": 0, "world_size": 1, "workers": 1}
    assert list(open_loader(Told(), list, **options)) == [[1]]


PARENT = """
import os, signal, sys
import torch
from t2i_experts.shards.loader import open_loader
from t2i_experts.shards.reader import ShardReader

def collate(samples):
    return torch.zeros(4, 1024, 1024), os.getpid()  # larger than any pipe's buffer: workers block on a full queue

if __name__ == "__main__":
    reader = ShardReader([sys.argv[1]], size=4, seed=0)
    batches = open_loader(reader, collate, start=0, stop=None, batch_size=4, accumulation=1, rank=0, world_size=1, workers=2)
    print(*sorted({next(batches)[1] for _ in range(6)}), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
def test_workers_die_with_a_process_that_is_killed(tmp_path: Path, make_shards: MakeShards) -> None:
    """Else they would keep its memory, and whatever they inherited, for ever."""
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.run(
        [sys.executable, tmp_path / "parent.py", make_shards(tmp_path / "shards", 8)], stdout=subprocess.PIPE, timeout=60
    )
    assert parent.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in parent.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 1.5
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
