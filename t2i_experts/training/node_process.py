"""The process that trains a node of a tree: how it is started, that it ends with the one that started it, and what its end means."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import datetime

from t2i_experts.experts.runs import NodeRun

STOPPED = (0, -signal.SIGTERM)
"""Exit codes of a process that was told to stop: it wrote a checkpoint, or it had not begun to train."""


def train_command(run: NodeRun) -> list[str]:
    """What anyone may type to train a node by hand."""
    return [sys.executable, "-m", "t2i_experts", "train", str(run.config_file), "--quiet"]


def start_process(run: NodeRun, environment: Mapping[str, str], *, by: str) -> subprocess.Popen[bytes]:
    """Starts the process of a node, whose output is appended to its log. environment: beyond this process's. by: who starts it."""
    command = train_command(run)
    with run.log.open("ab") as log:
        log.write(f"== {datetime.now():%Y-%m-%d %H:%M:%S}, {by}: {' '.join(command[1:])}\n".encode())
        log.flush()
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
            start_new_session=True,  # Ctrl-C is for this process, which tells the others once
            preexec_fn=_end_with_parent(os.getpid()),
        )


def how_it_ended(run: NodeRun, code: int) -> str:
    """In words: the exit code of a node's newest process, or the signal that killed it, and the last error that it told."""
    said = run.log.read_text(encoding="utf-8", errors="replace").rpartition("\n== ")[2].splitlines()
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    end = f"exit code {code}"
    if code < 0:
        end = "killed by " + (signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}")
    return f"{end}: {errors[-1]}" if errors else end


def _end_with_parent(parent: int) -> Callable[[], None] | None:
    """For a child before it becomes its program: it gets SIGTERM when this process ends, even by SIGKILL, and stops with a checkpoint.

    Linux alone can do so. Elsewhere children go on, and a repeated command waits for them, as their runs' folders are locked.
    """
    if sys.platform != "linux":
        return None
    prctl, set_parent_death_signal = ctypes.CDLL(None).prctl, 1

    def prepare() -> None:
        prctl(set_parent_death_signal, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before
            os._exit(1)

    return prepare
