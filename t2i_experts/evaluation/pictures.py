"""The sets of pictures that are compared: a folder of picture files, or a folder of shards. Each picture is read exactly once."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from t2i_experts.shards.images import SOURCE_EXTENSIONS, whole
from t2i_experts.shards.parallel import in_order
from t2i_experts.shards.reader import ShardReader

LOOKED_FOR = f"looked for tars, and for {', '.join(SOURCE_EXTENSIONS)}"
_LISTED = 10


@dataclass(frozen=True)
class Stored:
    """A picture as it is stored. data: the bytes of its file. captions: those that its set knows."""

    name: str
    data: bytes
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """pixels: (3, H, W) uint8, RGB. digest: sha256 of its name and its bytes."""

    pixels: Tensor
    digest: bytes
    name: str
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unreadable:
    """A picture that cannot be read. why: in one line, its name first."""

    why: str


@dataclass(frozen=True)
class PictureSet:
    """path: of the folder. kind: `folder` or `shards`. count: of its pictures.

    load: the picture with some index, for several threads at once; raises ValueError, which names the picture. names: of the files of a
    folder, relative to it, in order.
    """

    path: Path
    kind: str
    count: int
    load: Callable[[int], Stored]
    names: Sequence[str] = ()

    def read(self, workers: int) -> Iterator[Picture | Unreadable]:
        """Every picture in order, decoded by some threads: at its own size, upright, transparency on white."""
        with ThreadPoolExecutor(workers) as pool:
            yield from in_order(pool, workers, self._decoded, range(self.count))

    def _decoded(self, index: int) -> Picture | Unreadable:
        try:
            stored = self.load(index)
        except ValueError as error:
            return Unreadable(str(error))
        try:
            pixels = torch.from_numpy(np.array(whole(stored.data))).permute(2, 0, 1)
        except ValueError as error:
            return Unreadable(f"{stored.name}: {error}")
        return Picture(pixels, named_digest(stored.name, stored.data), stored.name, stored.captions)


def open_pictures(path: Path, what: str) -> PictureSet:
    """Those under a folder, or those of its shards if it holds tars. Raises ValueError, beginning with `what`, for fewer than two."""
    if not path.is_dir():
        raise ValueError(f"{what}={str(path)!r} is {'neither a folder nor an .npz file' if path.exists() else 'not there'}")
    pictures = find_pictures(path)
    if pictures.count < 2:
        kinds = f"; {LOOKED_FOR}" if not pictures.count else ""
        raise ValueError(f"{what}={str(path)!r} holds {pictures.count} pictures, and a distance needs at least 2{kinds}")
    return pictures


def find_pictures(path: Path) -> PictureSet:
    """Those of a folder's shards if it holds tars, else those under it, of which there may be none."""
    return _of_shards(path) if any(path.glob("[!.]*.tar")) else _of_folder(path)


def _of_folder(path: Path) -> PictureSet:
    names = [file.relative_to(path).as_posix() for file in walk(path, SOURCE_EXTENSIONS)]

    def load(index: int) -> Stored:
        try:
            return Stored(names[index], (path / names[index]).read_bytes())
        except OSError as error:
            raise ValueError(f"{names[index]}: {error.strerror or error}") from error

    return PictureSet(path, "folder", len(names), load, names)


def named_digest(name: str, data: bytes) -> bytes:
    """sha256 of something that belongs to a name."""
    return hashlib.sha256(hashlib.sha256(name.encode(errors="surrogateescape")).digest() + data).digest()


def set_hash(digests: Sequence[bytes]) -> str:
    """sha256 (hex) of a set of pictures by name and bytes, in whatever order they came."""
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def refuse_unreadable(found: Sequence[Unreadable], pictures: PictureSet) -> None:
    """Raises ValueError if there are any, with a line for each: a number without them would be that of another set."""
    if not found:
        return
    lines = [f"  {picture.why}" for picture in found[:_LISTED]]
    more = [f"  and {len(found) - _LISTED:,} more"] if len(found) > _LISTED else []
    head = f"{len(found):,} of the {pictures.count:,} pictures of {pictures.path} cannot be read; mend them or take them away:"
    raise ValueError("\n".join([head, *lines, *more]))


def _of_shards(path: Path) -> PictureSet:
    """Bytes are read by one thread at a time, since the reader's open files are shared; decoding takes far longer."""
    reader, lock = ShardReader([path], size=1, seed=0), threading.Lock()

    def load(index: int) -> Stored:
        with lock:
            sample = reader.raw(index)
        return Stored(sample.key, sample.image, sample.captions)

    return PictureSet(path, "shards", reader.samples, load)


def walk(folder: Path, extensions: Sequence[str]) -> Iterator[Path]:
    """Files under a folder, sorted within each folder, before those of its subfolders; hidden ones are passed over.

    Raises ValueError for a folder that is closed.
    """

    def fail(error: OSError) -> NoReturn:
        raise ValueError(f"cannot read {error.filename}: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and name.lower().rpartition(".")[2] in extensions:
                yield Path(parent, name)
