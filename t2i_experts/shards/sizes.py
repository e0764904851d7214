"""Width and height of each picture of a shard: read from the pictures' headers once, and kept in a file beside the tar."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from t2i_experts.shards.format import ShardEntry, header_line, write_atomically
from t2i_experts.shards.images import upright_size
from t2i_experts.shards.index import Row, open_index
from t2i_experts.shards.parallel import in_order

_SUFFIX = ".sizes"
_HEADER = "t2i-experts picture sizes 1"
_BEGINNING = 2**16
"""So many bytes of a picture file are read first: the size stands before the pixels."""
_THREADS = 8


def picture_sizes(shards: Sequence[tuple[Path, ShardEntry]], *, progress: bool = False) -> Iterator[NDArray[np.int32]]:
    """`shard_sizes` of each (folder, entry). progress: a bar on stderr if that takes seconds."""
    total = sum(entry.samples for _, entry in shards)
    with tqdm(total=total, desc="sizes of pictures", unit="img", unit_scale=True, file=sys.stderr, delay=3, disable=not progress) as bar:
        for folder, entry in shards:
            yield shard_sizes(folder, entry)
            bar.update(entry.samples)


def shard_sizes(folder: Path, entry: ShardEntry) -> NDArray[np.int32]:
    """(samples, 2) width and height in pixels, upright according to EXIF, in the order of the shard's index.

    (0, 0) for a picture whose header cannot be read. Found in the file beside the tar, or else read from the tar and kept there if
    the folder can be written to. Raises ValueError for a tar that must be read and cannot be, or is not the manifest's.
    """
    path = (folder / entry.file).with_suffix(_SUFFIX)
    head = _head(entry)
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    if data.startswith(head) and len(data) == len(head) + 8 * entry.samples:
        return np.frombuffer(data, "<i4", offset=len(head)).reshape(-1, 2)
    try:
        index = open_index(folder, entry)
        sizes = _read_sizes(folder / entry.file, index if isinstance(index, tuple) else index.rows())
    except OSError as error:
        raise ValueError(f"{folder / entry.file}: the sizes of its pictures cannot be read: {error}") from error
    with contextlib.suppress(OSError):  # a folder that cannot be written to, or a full disk: they are read again the next time
        write_atomically(path, [head, sizes.tobytes()])
    return sizes


def _head(entry: ShardEntry) -> bytes:
    """The line that names the shard; after it come the sizes."""
    return header_line({"kind": _HEADER, "entry": dataclasses.asdict(entry)})


def _read_sizes(tar: Path, rows: tuple[Row, ...]) -> NDArray[np.int32]:
    descriptor = os.open(tar, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(_THREADS) as pool:  # they wait for the file system
            sizes = list(in_order(pool, _THREADS, lambda row: _size(descriptor, row), rows))
    finally:
        os.close(descriptor)
    return np.array(sizes, dtype="<i4").reshape(-1, 2)


def _size(descriptor: int, row: Row) -> tuple[int, int]:
    offset, length = row.image
    try:
        row.check_sizes()
        try:
            return upright_size(os.pread(descriptor, min(length, _BEGINNING), offset))
        except ValueError:  # more stands before its pixels, or its format is read as a whole
            return upright_size(os.pread(descriptor, length, offset)) if length > _BEGINNING else (0, 0)
    except ValueError:
        return 0, 0
