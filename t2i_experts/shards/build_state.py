"""A build under way: which arguments it has, in a file that lies in its folder until the manifest is written, and how far it has come.

A build that was killed goes on after its last complete tar if it is repeated with the same arguments on the same source. What is
written then is what an uninterrupted build would have written, byte for byte.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from t2i_experts.shards.format import BUILD_STATE, MANIFEST, ShardEntry
from t2i_experts.shards.index import open_index, read_index_header
from t2i_experts.shards.sources import Record

_RECORDS = "records"


def refuse_other_build(out: Path, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError unless `out` is new, empty, or holds a build with these arguments that was not finished."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder that is empty or new")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / BUILD_STATE).is_file():
        whose = "holds finished shards" if (out / MANIFEST).is_file() else "is not empty"
        raise ValueError(f"--out {out} {whose}: name another folder, or delete this one first if it may go")
    known = _load(out)
    if known is None:
        return
    differences = [f"{name} was {known.get(name)!r} and is {value!r} now" for name, value in arguments.items() if known.get(name) != value]
    if differences:
        raise ValueError(
            f"--out {out} holds a build that was not finished and had other arguments: {'; '.join(differences)}. Repeat it as it was, "
            "name another folder, or delete this one"
        )


def digest(keyed: Iterable[tuple[str, Record]]) -> str:
    """sha256 of all that the records say (keys, names, captions, metadata); the pictures' bytes do not enter."""
    sha256 = hashlib.sha256()
    for key, record in keyed:
        sha256.update(repr((key, record.name, record.captions, sorted(record.metadata.items()))).encode("utf-8", "surrogateescape"))
    return sha256.hexdigest()


@dataclass(frozen=True)
class Written:
    """The complete tars of a build. keys: of their samples; last_key: the highest of them, or ""."""

    shards: int = 0
    keys: frozenset[str] = frozenset()
    last_key: str = ""


class BuildState:
    """Holds the state file of a build while it runs, locked, so that no second process builds in the same folder.

    Use it in a `with` block: the file goes when the block ends well, and also when it ends ill with no complete tar.
    """

    def __init__(self, out: Path, arguments: Mapping[str, Any], records: str) -> None:
        """Begins or goes on with the build. records: `digest` of what is to be built.

        Raises ValueError as `refuse_other_build` does, if the source has changed since the build began, if it is running, and if the
        folder cannot be written.
        """
        refuse_other_build(out, arguments)
        self._out = out
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._file = open(out / BUILD_STATE, "a+b")
        except OSError as error:
            raise ValueError(f"--out {out} cannot be written: {error}") from error
        try:
            self._lock()
            refuse_other_build(out, arguments)  # what another process may have begun meanwhile
            state = _load(out)
            if state is None:
                self._file.write(json.dumps({**arguments, _RECORDS: records}, indent=1).encode() + b"\n")
                self._file.flush()
                os.fsync(self._file.fileno())
            elif state[_RECORDS] != records:
                raise ValueError(
                    f"--out {out} holds a build that was not finished, and its source has changed since: name another folder, "
                    "or delete this one"
                )
        except BaseException:
            self._file.close()
            raise
        for leftover in out.glob(".*.partial"):
            leftover.unlink(missing_ok=True)
        self.written = _written(out)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out {self._out}: another process is building in this folder") from None
        except OSError:  # a file system without locks
            pass

    def __enter__(self) -> BuildState:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None or not any(self._out.glob("[!.]*.tar")):
            (self._out / BUILD_STATE).unlink(missing_ok=True)
        self._file.close()


def _load(out: Path) -> dict[str, Any] | None:
    """The state file's content; None if it is empty, as a build leaves it that was killed when it had just begun. Raises ValueError."""
    path = out / BUILD_STATE
    data = path.read_bytes()
    if not data:
        return None
    try:
        state = json.loads(data)
        if isinstance(state, dict) and _RECORDS in state:
            return state
    except (ValueError, RecursionError):
        pass
    raise ValueError(f"{path} is damaged, so that this build cannot go on: delete the folder {out}, or name another one")


def _written(out: Path) -> Written:
    """The tars from 00000 on that are whole: a tar gets its name after it and its index are on the disk."""
    keys: list[str] = []
    shards = 0
    while (tar := out / f"{shards:05d}.tar").is_file():
        head = read_index_header(tar)
        if head is None:
            raise ValueError(f"{tar} has lost its index, so that this build cannot go on: delete the folder {out}, or name another one")
        entry = ShardEntry.from_plain(head["entry"])
        index = open_index(out, entry)
        if isinstance(index, tuple):
            keys += [row.key for row in index]
        else:
            keys += [row.key for row in index.rows()]
        shards += 1
    return Written(shards, frozenset(keys), max(keys, default="", key=str.encode))
