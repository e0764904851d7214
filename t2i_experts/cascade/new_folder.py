"""A folder that appears on the disk whole, in the place of the one before it, or not at all."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` to write into, which takes its place at the end, once all of it is on the disk.

    One writer at a time: what an earlier one that was killed left beside `folder` is removed. After an error all is as it was.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    _remove(_leftovers(folder, "tmp"))
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        _remove([temporary])
        raise
    for path in (*temporary.rglob("*"), temporary):
        flush(path)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    temporary.rename(folder)
    flush(folder.parent)
    _remove(_leftovers(folder, "old"))


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _leftovers(folder: Path, ending: str) -> list[Path]:
    return list(folder.parent.glob(f".{glob.escape(folder.name)}.*.{ending}"))


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
