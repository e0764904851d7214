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

_LISTED = 10


@dataclass(frozen=True)
class Picture:
    """pixels: (3, H, W) uint8, RGB. digest: sha256 of its name and its bytes."""

    pixels: Tensor
    digest: bytes


@dataclass(frozen=True)
class Unreadable:
    """A picture that cannot be read. why: in one line, its name first."""

    why: str


@dataclass(frozen=True)
class PictureSet:
    """path: of the folder. kind: `folder` or `shards`. count: of its pictures.

    load: name and bytes of the picture with some index, for several threads at once; raises ValueError, which names the picture.
    """

    path: Path
    kind: str
    count: int
    load: Callable[[int], tuple[str, bytes]]

    def read(self, workers: int) -> Iterator[Picture | Unreadable]:
        """Every picture in order, decoded by some threads: at its own size, upright, transparency on white."""
        with ThreadPoolExecutor(workers) as pool:
            yield from in_order(pool, workers, self._decoded, range(self.count))

    def _decoded(self, index: int) -> Picture | Unreadable:
        try:
            name, data = self.load(index)
        except ValueError as error:
            return Unreadable(str(error))
        try:
            pixels = torch.from_numpy(np.array(whole(data))).permute(2, 0, 1)
        except ValueError as error:
            return Unreadable(f"{name}: {error}")
        return Picture(pixels, hashlib.sha256(hashlib.sha256(name.encode(errors="surrogateescape")).digest() + data).digest())


def open_pictures(path: Path, what: str) -> PictureSet:
    """Those under a folder, or those of its shards if it holds tars. Raises ValueError, beginning with `what`, for fewer than two."""
    if not path.is_dir():
        raise ValueError(f"{what}={str(path)!r} is {'neither a folder nor an .npz file' if path.exists() else 'not there'}")
    pictures = _of_shards(path) if any(path.glob("[!.]*.tar")) else _of_folder(path)
    if pictures.count < 2:
        kinds = f"; looked for tars, and for {', '.join(SOURCE_EXTENSIONS)}" if not pictures.count else ""
        raise ValueError(f"{what}={str(path)!r} holds {pictures.count} pictures, and a distance needs at least 2{kinds}")
    return pictures


def _of_folder(path: Path) -> PictureSet:
    files = list(_walk(path))

    def load(index: int) -> tuple[str, bytes]:
        name = files[index].relative_to(path).as_posix()
        try:
            return name, files[index].read_bytes()
        except OSError as error:
            raise ValueError(f"{name}: {error.strerror or error}") from error

    return PictureSet(path, "folder", len(files), load)


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

    def load(index: int) -> tuple[str, bytes]:
        with lock:
            sample = reader.raw(index)
        return sample.key, sample.image

    return PictureSet(path, "shards", reader.samples, load)


def _walk(folder: Path) -> Iterator[Path]:
    """Picture files under a folder, sorted within each folder; hidden ones are passed over. Raises ValueError for one that is closed."""

    def fail(error: OSError) -> NoReturn:
        raise ValueError(f"cannot read {error.filename}: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and name.lower().rpartition(".")[2] in SOURCE_EXTENSIONS:
                yield Path(parent, name)
