"""Processes that a benchmark starts and that must not outlive it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType


def start_child(command: Sequence[str], environment: Mapping[str, str], output: Path) -> subprocess.Popen[bytes]:
    """A process, the head of a group of its own, whose stdout and stderr are a file. Its stdin is the pipe that `end_with_parent` reads."""
    with output.open("wb") as said:
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=said, stderr=said, start_new_session=True)


def end_child(child: subprocess.Popen[bytes]) -> None:
    """Ends a process that `start_child` gave, and all that it has started."""
    with suppress(ProcessLookupError):  # if all have ended by themselves
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert child.stdin is not None
    child.stdin.close()


def end_with_parent() -> None:
    """In a process of `start_child`: from now on it ends when the process that started it has ended, even if that was killed."""

    def wait() -> None:
        os.read(0, 1)  # stdin; nothing is ever written, so this is the pipe's end
        os.killpg(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt in here, as Ctrl-C does, so that what is left is cleaned up. In the main thread alone."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
