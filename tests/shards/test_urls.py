"""Pipes: what a command starts ends with whoever reads it, and nothing that its reader ignores is ignored by it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import pytest

from t2i_experts.shards import urls
from t2i_experts.shards.loader import open_loader
from t2i_experts.shards.stream import StreamReader
from t2i_experts.shards.urls import open_url
from tests.shards.test_loader import alive

STUBBORN = "pipe:trap '' TERM; sleep 60 & echo $! $$; wait"  # the pids of a child and of its shell, and then nothing for a minute

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def read_line(stream: Any) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += stream.read(1)
    return line


def end_soon(pids: Sequence[int]) -> bool:
    deadline = time.monotonic() + 2
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(alive(pid) for pid in pids)


@needs_proc
def test_a_command_ends_with_its_context() -> None:
    with pytest.raises(RuntimeError, match="enough"), open_url(STUBBORN) as pipe:
        pids = [int(pid) for pid in read_line(pipe).split()]
        assert len(pids) == 2 and all(alive(pid) for pid in pids)
        raise RuntimeError("enough")
    assert end_soon(pids)


@needs_proc
def test_what_a_command_leaves_behind_ends_with_its_context() -> None:
    """Its shell has ended well by then."""
    with open_url("pipe:sleep 60 & echo $!") as pipe:
        pid = int(read_line(pipe))
    assert end_soon([pid])


@needs_proc
def test_what_is_wrong_with_the_bytes_of_a_command_that_runs_on_is_told() -> None:
    """And not that the command ended, which it did not by itself."""
    with pytest.raises(ValueError, match="no tar"), open_url("pipe:echo nonsense; sleep 60") as pipe:
        raise ValueError(f"{read_line(pipe)!r} is no tar")


def _read_until_killed(connection: Any) -> None:
    os.setpgid(0, 0)  # as a terminal's foreground group, which Ctrl-C reaches
    signal.signal(signal.SIGINT, lambda *_: None)
    with open_url(STUBBORN) as pipe:
        connection.send_bytes(read_line(pipe))
        pipe.read(1)


@needs_proc
def test_a_command_ends_with_a_reader_that_is_killed() -> None:
    """After Ctrl-C, too, which is not for those who watch over the command."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    reader = context.Process(target=_read_until_killed, args=(there,))
    reader.start()
    pids = [int(pid) for pid in here.recv_bytes().split()]
    os.killpg(reader.pid or 0, signal.SIGINT)
    time.sleep(0.1)
    assert all(alive(pid) for pid in pids)
    reader.kill()
    reader.join()
    assert end_soon(pids)


class Command:
    """A reader whose every sample is what a command writes."""

    buckets = None

    def __init__(self, url: str) -> None:
        self.url = url

    def __getitem__(self, position: int) -> Any:
        with open_url(self.url) as pipe:
            return pipe.read(10_000)


@needs_proc
def test_a_workers_command_hears_what_the_worker_does_not() -> None:
    """The worker goes on at Ctrl-C and SIGTERM, which reach all processes at a terminal or under a scheduler."""
    reader = Command("pipe:kill -TERM $PPID; kill -INT $PPID; cat /proc/self/status")
    options: dict[str, Any] = {"start": 0, "stop": 2, "batch_size": 1, "accumulation": 1, "rank": 0, "world_size": 1, "workers": 1}
    first, second = open_loader(reader, lambda samples: samples[0].decode(), **options)
    for status in (first, second):
        (ignored,) = (int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigIgn"))
        assert not ignored & (1 << signal.SIGTERM - 1 | 1 << signal.SIGINT - 1)


def test_how_a_command_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_url("pipe:(sleep 0.1; echo late) & echo early; wait; cat; echo $#") as pipe:  # it has no input, and no arguments
        assert pipe.read(100) == b"early\nlate\n0\n"
    for command, code in (("exit 3", 3), ("kill -KILL $$", -signal.SIGKILL)):
        with pytest.raises(OSError, match=f"exit code {code}$"), open_url(f"pipe:{command}") as pipe:
            assert not pipe.read(1)
    monkeypatch.setattr(urls, "_TIMEOUT", 0.1)
    with pytest.raises(OSError, match=r"has not ended 0\.1 s after its last byte$"), open_url("pipe:exec >&-; sleep 60") as pipe:
        assert not pipe.read(1)


def test_pipes_can_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, when a run is set up, and not by each tar as something that is wrong with it."""
    monkeypatch.setattr("webdataset.utils.enforce_security", True)
    with pytest.raises(ValueError, match=r"^data\.train='pipe:cat \{0\.\.9\}\.tar': WDS_SECURE in the environment forbids pipes$"):
        StreamReader(["http://a/0.tar", "pipe:cat {0..9}.tar"], size=4, seed=0)
    assert len(StreamReader(["http://a/0.tar"], size=4, seed=0).tars) == 1
