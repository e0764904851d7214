"""The lock on a run's folder: one process at a time."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from t2i_experts.training.checkpoints import lock_owner, lock_run

HOLDER = """
import fcntl, sys
lock = open(sys.argv[1], "a")
fcntl.lockf(lock, fcntl.LOCK_EX)
print(flush=True)
input()
"""


def test_who_only_looks_whether_a_run_is_locked_keeps_nobody_out(tmp_path: Path) -> None:
    """To look it takes the lock, for a moment."""
    command = [sys.executable, "-S", "-c", HOLDER, str(tmp_path / ".lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline()
    assert lock_owner(tmp_path) == "an unknown process"
    threading.Timer(0.1, holder.communicate, [b"\n"]).start()
    lock_run(tmp_path).close()


def test_a_disk_without_locks_is_not_taken_for_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / ".lock").touch()
    monkeypatch.setattr(fcntl, "lockf", fail)
    with pytest.raises(ValueError, match=r"cannot be locked .*No locks available.* file system with POSIX locks"):
        lock_run(tmp_path)
    assert lock_owner(tmp_path) is None
