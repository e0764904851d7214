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
_OTHER_FORMATS = ("avif", "heic", "heif", "jfif", "jp2", "jxl", "pbm", "pgm", "ppm", "psd", "svg", "tga")


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

    load: the picture with some index, for several threads at once; raises ValueError, which names the picture. listing: sha256 of what is
    listed there, before any picture is read. names: of the files of a folder, relative to it, in order.
    """

    path: Path
    kind: str
    count: int
    load: Callable[[int], Stored]
    listing: str
    names: Sequence[str] = ()

    def read(self, workers: int, indices: range | None = None) -> Iterator[Picture | Unreadable]:
        """Every picture in order, or those of some indices, decoded by some threads: at its own size, upright, transparency on white."""
        with ThreadPoolExecutor(workers) as pool:
            yield from in_order(pool, workers, self.decoded, range(self.count) if indices is None else indices)

    def batches(
        self, indices: range, batch: int, workers: int, unreadable: list[Unreadable], progress: Callable[[int, int], None]
    ) -> Iterator[list[Picture]]:
        """The pictures of some indices in their order, `batch` together. From the first that cannot be read on there is none, and the rest
        is read only to add to `unreadable` what else is broken. progress: is told (pictures done, in all)."""
        waiting: list[Picture] = []
        progress(0, len(indices))
        for done, picture in enumerate(self.read(workers, indices), start=1):
            match picture:
                case Picture():
                    waiting.append(picture)
                case Unreadable():
                    unreadable.append(picture)
            if len(waiting) == batch and not unreadable:
                yield waiting
                waiting = []
            elif unreadable:
                waiting.clear()
            progress(done, len(indices))
        if waiting:
            yield waiting

    def decoded(self, index: int) -> Picture | Unreadable:
        """The picture with some index."""
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
    """`find_pictures` of which a distance can be taken. Raises ValueError as that, and for captions without their pictures."""
    if path.is_file():
        raise ValueError(f"{what}={str(path)!r} is neither a folder nor an .npz file")
    pictures = find_pictures(path, what, fewest=2)
    _refuse_captions_alone(path, pictures.names)
    return pictures


def find_pictures(path: Path, what: str, *, fewest: int = 1) -> PictureSet:
    """Those of a folder's shards if it holds tars, else those under it. Raises ValueError, beginning with `what`, if there are fewer, and
    for tars beside pictures."""
    if not path.is_dir():
        raise ValueError(f"{what}={str(path)!r} is {'no folder' if path.exists() else 'not there'}")
    tars = any(path.glob("[!.]*.tar"))
    if tars and (beside := next(walk(path, SOURCE_EXTENSIONS), None)) is not None:
        raise ValueError(f"{what}={str(path)!r} holds tars and, beside them, pictures such as {beside.name}: which are meant?")
    pictures = _of_shards(path) if tars else _of_folder(path)
    if pictures.count < fewest:
        found = "no pictures" if fewest == 1 else f"{pictures.count} pictures, and a distance needs at least {fewest}"
        kinds = "" if pictures.count else f"; looked for tars, and for {', '.join(SOURCE_EXTENSIONS)}"
        raise ValueError(f"{what}={str(path)!r} holds {found}{kinds}")
    return pictures


def _of_folder(path: Path) -> PictureSet:
    names = [file.relative_to(path).as_posix() for file in walk(path, SOURCE_EXTENSIONS)]
    others = [file.relative_to(path).as_posix() for file in walk(path, _OTHER_FORMATS)] if names else []
    if others:
        raise ValueError(
            f"{len(others):,} pictures under {path} are in formats that are not read: {_named(others)}; convert them, or take them away"
        )

    def load(index: int) -> Stored:
        try:
            return Stored(names[index], (path / names[index]).read_bytes())
        except OSError as error:
            raise ValueError(f"{names[index]}: {error.strerror or error}") from error

    listing = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()
    return PictureSet(path, "folder", len(names), load, listing, names)


def named_digest(name: str, data: bytes) -> bytes:
    """sha256 of something that belongs to a name."""
    return hashlib.sha256(hashlib.sha256(name.encode(errors="surrogateescape")).digest() + data).digest()


def printable(name: str) -> str:
    """A file's name as text that can be written, whatever bytes the file system has."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


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

    return PictureSet(path, "shards", reader.samples, load, reader.dataset_hash)


def _refuse_captions_alone(path: Path, names: Sequence[str]) -> None:
    """Raises ValueError for a .txt without a picture of its name, in a folder where such files are captions: where another one has one."""
    pictures = {(path / name).with_suffix("") for name in names}
    captions = list(walk(path, ("txt",))) if names else []
    lone = [file.relative_to(path).as_posix() for file in captions if file.with_suffix("") not in pictures]
    if lone and len(lone) < len(captions):
        raise ValueError(
            f"{len(lone):,} of the {len(captions):,} captions under {path} have no picture: {_named(lone)}; "
            "bring the pictures, or take these away"
        )


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else "")


def walk(folder: Path, extensions: Sequence[str]) -> Iterator[Path]:
    """Files under a folder, sorted within each folder, before those of its subfolders; hidden ones are passed over.

    Raises ValueError for a folder that is closed, and for a link to one, whose pictures might be left out or come twice.
    """

    def fail(error: OSError) -> NoReturn:
        raise ValueError(f"cannot read {error.filename}: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=fail):
        for link in (Path(parent, name) for name in folders):
            if link.is_symlink() and not link.name.startswith("."):
                raise ValueError(f"{link} is a link to a folder, which is not followed: bring its pictures, or take it away")
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and name.lower().rpartition(".")[2] in extensions:
                yield Path(parent, name)
