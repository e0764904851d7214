"""Who trains what, for processes on several hosts that share a disk: a claim is a file, which only one of them can create.

It says which process holds it, and that process touches it every now and then. A claim is stale if its process is gone, where that can be
seen, or else if it was not touched for `STALE_AFTER` seconds; it may then be taken over. How long ago that is, is told by the clock of the
disk, as those of hosts differ.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

STALE_AFTER = 180.0
"""Seconds without a sign of life from a process that cannot be looked at from here."""

TOUCH_EVERY = 15.0


@dataclass(frozen=True)
class Claim:
    """A process that holds something. place: where its pid means something. started: when the process did, in the system's own units, so
    that another one that was given the same pid later is not taken for it. since: unix seconds."""

    host: str
    pid: int
    place: str
    started: str
    since: float
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def here(self) -> bool:
        """Whether its process can be looked at from here. Of any other one, only a touch tells that it lives."""
        return self.place == _place()


_UNKNOWN = Claim("an unknown host", 0, "", "", 0.0, "")
_ATTEMPTS = 10


class HeldClaim:
    """A claim of this process. inherited: it was taken over from one that did not give it back."""

    def __init__(self, path: Path, claim: Claim, *, inherited: bool) -> None:
        self.path = path
        self.claim = claim
        self.inherited = inherited
        self._touched = time.monotonic()

    def touch(self) -> bool:
        """Gives a sign of life if it is time. Returns whether the claim is still this process's: after a long sleep it may not be."""
        if time.monotonic() - self._touched < TOUCH_EVERY:
            return True
        self._touched = time.monotonic()
        try:
            if not self._ours():
                return False
            os.utime(self.path)
        except FileNotFoundError:
            return False
        except OSError:  # a disk that is far away may not answer now and then; whose the claim is shows when it does
            pass
        return True

    def release(self) -> None:
        """Gives the claim back; one that cannot be read goes stale by itself."""
        with contextlib.suppress(OSError):
            if self._ours():
                self.path.unlink(missing_ok=True)

    def _ours(self) -> bool:
        """Raises OSError if that cannot be told, FileNotFoundError if the claim is gone."""
        found = _parse(self.path.read_bytes())
        return found is not None and found.token == self.claim.token


def take_claim(path: Path) -> HeldClaim | Claim:
    """The claim in a file, taken for this process; or whose it is. Makes the file's folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = Claim(socket.gethostname(), os.getpid(), _place(), _started(os.getpid()) or "", time.time())
    for _ in range(_ATTEMPTS):
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps(asdict(own)))
            return HeldClaim(path, own, inherited=False)
        except FileExistsError:
            if _alive(path):
                return _read(path) or _UNKNOWN
        with _alone(path.with_name(f"{path.name}.takeover")) as alone:
            if alone and path.exists() and not _alive(path):
                _replace(path, json.dumps(asdict(own)))  # never missing: who would create it meanwhile cannot
                return HeldClaim(path, own, inherited=True)
        time.sleep(0.01)  # it was given back, or another process is taking it over
    return _UNKNOWN


def living_claim(path: Path) -> Claim | None:
    """Who holds the claim in a file; None if there is none, or a stale one."""
    return (_read(path) or _UNKNOWN) if path.exists() and _alive(path) else None


def last_touched(path: Path) -> float | None:
    """When the holder of a claim last gave a sign of life, by the disk's clock; None if the claim is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _alive(path: Path) -> bool:
    claim = _read(path)
    if claim is not None and claim.here:
        return _started(claim.pid) == claim.started
    touched = last_touched(path)
    return touched is not None and _now(path.parent) - touched < STALE_AFTER


def _read(path: Path) -> Claim | None:
    """None for a file that is gone, cannot be read, or is just being written."""
    try:
        return _parse(path.read_bytes())
    except OSError:
        return None


def _parse(text: bytes) -> Claim | None:
    try:
        return Claim(**json.loads(text))
    except (ValueError, TypeError):
        return None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Whether this process is the only one inside. A file that one which was killed inside left behind counts for `STALE_AFTER` seconds."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            if _now(path.parent) - path.stat().st_mtime > STALE_AFTER:
                path.unlink()
        yield False
        return
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)


def _replace(path: Path, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


def _now(folder: Path) -> float:
    """Unix seconds by the clock that gives the files in a folder their times; by this host's if nothing can be written there."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"?")
            file.flush()
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


@functools.cache
def _place() -> str:
    """This host since it was last started, and the part of it (a container may have pids of its own) in which this process's pid counts."""
    boot, pids = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    try:
        return f"{socket.gethostname()} {boot.read_text(encoding='utf-8').strip()} {os.readlink(pids)}"
    except OSError:  # not Linux
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """When a process of this place started; "" where the system does not tell; None if there is no such process, or it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""
