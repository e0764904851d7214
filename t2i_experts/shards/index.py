"""Where each sample of a tar lies, so that any one is read by offset: found by a scan, and kept in a file beside the tar."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
import struct
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from t2i_experts.shards.format import (
    IMAGE_EXTENSIONS,
    MAX_EMBEDDING_BYTES,
    MAX_IMAGE_BYTES,
    MAX_KEY_BYTES,
    MAX_TEXT_BYTES,
    EncoderRecord,
    ShardEntry,
    Statistics,
    header_line,
    split_member,
    write_atomically,
)

_SUFFIX = ".index"
_BLOCK = 512
_HEADER = "t2i-experts shard index 1"
_MAX_READ = 2**20
_MAX_HEADER = 2**26
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\x00": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
_READ = (*IMAGE_EXTENSIONS, "txt", "json")
_EMBEDDING = ".npz"
BAD_KEY = f"its key holds a zero byte or is longer than {MAX_KEY_BYTES:,} bytes"


@dataclass(frozen=True, slots=True)
class Row:
    """The members of one sample as (offset, bytes) in the tar; (0, 0) where there is none.

    embeddings: those that end in .npz, by extension (`EncoderRecord.member`).
    """

    key: str
    image: tuple[int, int]
    text: tuple[int, int]
    fields: tuple[int, int]
    embeddings: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def check_sizes(self) -> None:
        """Raises ValueError for a member that is too large to be what it says, before anybody reads it."""
        for kind, (offset, size), most in (
            ("image", self.image, MAX_IMAGE_BYTES),
            ("txt", self.text, MAX_TEXT_BYTES),
            ("json", self.fields, MAX_TEXT_BYTES),
            *((extension, place, MAX_EMBEDDING_BYTES) for extension, place in self.embeddings.items()),
        ):
            if offset < 0 or not 0 <= size <= most:
                raise ValueError(f"its {kind} has {size:,} bytes at {offset:,}; at most {most:,} are read")


@dataclass(frozen=True)
class IndexFile:
    """Where the rows of a shard lie in its index file: one after another, each in `row_bytes` bytes.

    embeddings: extensions of the members with embeddings, in the order in which a row has them.
    """

    path: Path
    offset: int
    key_bytes: int
    embeddings: tuple[str, ...] = ()

    @functools.cached_property
    def _row(self) -> struct.Struct:
        return struct.Struct(_row_format(self.key_bytes, len(self.embeddings)))

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self._row.size

    def place(self, i: int) -> tuple[int, int]:
        """(offset, bytes) of row i in the file."""
        size = self._row.size
        return self.offset + i * size, size

    def unpack(self, data: bytes) -> Row:
        """The row in the bytes from its place."""
        key, *numbers = self._row.unpack(data)
        image, text, fields, *embeddings = zip(numbers[::2], numbers[1::2], strict=True)
        return Row(key.rstrip(b"\0").decode(), image, text, fields, dict(zip(self.embeddings, embeddings, strict=True)))

    def rows(self) -> tuple[Row, ...]:
        """All rows. Raises OSError, or ValueError if the file has been cut."""
        data = self.path.read_bytes()[self.offset :]
        if len(data) % self.row_bytes:
            raise ValueError(f"{self.path} is damaged: delete it, and it is found anew")
        return tuple(self.unpack(data[at : at + self.row_bytes]) for at in range(0, len(data), self.row_bytes))


def _row_format(key_bytes: int, embeddings: int) -> str:
    return f"<{key_bytes}s{6 + 2 * embeddings}q"


@dataclass(frozen=True)
class Scan:
    """What a walk over a tar's headers finds.

    rows: the complete samples, in ascending order of the bytes of their keys, whatever their order in the tar.
    incomplete: (key, what is wrong) for the others. unsorted: a key whose members do not stand together, so that sequential readers
    would see it as two halves; None if there is no such key.
    """

    rows: tuple[Row, ...]
    incomplete: tuple[tuple[str, str], ...] = ()
    unsorted: str | None = None


def scan(tar: Path) -> Scan:
    """Walks over the headers of a tar: ustar, GNU or pax. Of each member only name, offset and size stay in memory.

    Raises ValueError if it is damaged or compressed, or holds links, devices, absolute paths or `..`.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    wrong: dict[str, str] = {}
    unsorted: str | None = None
    last, end = "", 0
    try:
        with open(tar, "rb") as file:
            for member in walk(file):
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                name = sample_member(member)
                if name is None:
                    continue
                key, extension = name
                if bad_key(key):
                    wrong[f"{key[:64]}..."] = BAD_KEY
                    continue
                if key != last and key in samples:
                    unsorted = unsorted or key
                last = key
                members = samples.setdefault(key, {})
                if extension not in _READ and not extension.endswith(_EMBEDDING):
                    continue
                if extension in members:
                    wrong[key] = f"it has two members .{extension}"
                members[extension] = (member.offset_data, member.size)
        _check_end(tar, end)
    except (tarfile.TarError, ValueError, OSError, EOFError, RecursionError) as error:
        raise ValueError(f"{tar}: {_compression(tar) or f'cannot be read as an uncompressed tar: {error}'}") from error
    rows = []
    while samples:  # taken apart, so that a sample is not in memory twice
        key, members = samples.popitem()
        if (lacks := what_lacks(members)) is not None:
            wrong.setdefault(key, lacks)
        if key not in wrong:
            rows.append(sample_row(key, members))
    rows.sort(key=lambda row: row.key.encode())
    return Scan(tuple(rows), tuple(sorted(wrong.items())), unsorted)


def _compression(tar: Path) -> str:
    """Of a file that is no plain tar: what it is compressed with, and how to undo that; empty if it does not look compressed."""
    try:
        with open(tar, "rb") as file:
            found = compression(file.read(8))
    except OSError:
        return ""
    if found is None:
        return ""
    name, command = found
    return f"is {name}-compressed; shards are read by offset, uncompressed: {command} < {shlex.quote(str(tar))} > NEW.tar"


def compression(start: bytes) -> tuple[str, str] | None:
    """By the first bytes of a file: what it is compressed with, and the command that undoes it; None if it does not look compressed."""
    return next((found for magic, found in _COMPRESSED.items() if start.startswith(magic)), None)


def walk(file: Source) -> Iterator[tarfile.TarInfo]:
    """The members of an uncompressed tar, one by one; tarfile itself would keep them all. It reads headers alone.

    Raises ValueError for a size that would lead it back, without end, and tarfile's errors for what is damaged.
    """
    with tarfile.open(fileobj=_Headers(file), mode="r:") as archive:  # type: ignore[call-overload]
        while (member := archive.next()) is not None:
            archive.members.clear()
            if member.size < 0 or archive.offset < member.offset_data:
                raise ValueError(f"member {member.name[:64]!r} has the size {member.size}")
            yield member


def sample_member(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """(key, extension) of a member, None for one that belongs to no sample. ValueError for links, devices, absolute paths and `..`."""
    name = split_member(member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        raise ValueError(f"member {member.name!r} is no plain file")
    return name


def bad_key(key: str) -> bool:
    """Whether no sample may have this key, as `BAD_KEY` says."""
    return len(key.encode()) > MAX_KEY_BYTES or "\0" in key


def what_lacks(extensions: Collection[str]) -> str | None:
    """What keeps members with these extensions from being a sample; None if nothing does."""
    images = sum(extension in extensions for extension in IMAGE_EXTENSIONS)
    if extensions and all(extension.endswith(_EMBEDDING) for extension in extensions):
        return "its embeddings belong to no sample"
    if images != 1:
        return "it has several images" if images else "it has no image (jpg, png or webp)"
    return None if "txt" in extensions or "json" in extensions else "it has no caption (txt or json)"


def sample_row(key: str, members: Mapping[str, tuple[int, int]]) -> Row:
    """The row of a sample to which nothing lacks, from the (offset, bytes) of its members by extension."""
    (image,) = (members[extension] for extension in IMAGE_EXTENSIONS if extension in members)
    embeddings = {extension: place for extension, place in members.items() if extension.endswith(_EMBEDDING)}
    return Row(key, image, members.get("txt", (0, 0)), members.get("json", (0, 0)), embeddings)


class Source(Protocol):
    """What a tar is read from. `seek` only ever goes forwards."""

    def read(self, size: int, /) -> bytes: ...
    def seek(self, offset: int, /) -> object: ...
    def tell(self) -> int: ...


class _Headers:
    """A file from which tarfile reads headers. An extended header (a long name) may claim any size, and would be read into memory."""

    def __init__(self, file: Source) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Raises ValueError for more than a header can need."""
        if not 0 <= size <= _MAX_READ:
            raise ValueError(f"a header claims {size:,} bytes; at most {_MAX_READ:,} are read")
        return self._file.read(size)


def _check_end(tar: Path, end: int) -> None:
    """Raises ValueError unless only zeros follow the last member, and at least one block of them.

    Python's tarfile takes a damaged header for the end of the archive, and reads only the first of several concatenated archives.
    """
    with open(tar, "rb") as file:
        file.seek(end)
        if len(file.read(_BLOCK)) < _BLOCK:
            raise ValueError("it ends without an end mark: writing it was not finished")
        file.seek(end)
        while chunk := file.read(2**20):
            if chunk.count(0) < len(chunk):
                raise ValueError(f"after byte {end} it is damaged, or a second archive has been appended")


def save_index(
    folder: Path,
    entry: ShardEntry,
    statistics: Statistics,
    rows: Sequence[Row],
    embeddings: Sequence[EncoderRecord] = (),
    source: str | None = None,
) -> None:
    """Writes the index file of a shard: a line of JSON, padded to a multiple of 64 bytes, then the rows.

    embeddings: the encoders whose features the tar holds. source: sha256 of the tar that these were added to.
    """
    key_bytes = max((len(row.key.encode()) for row in rows), default=1)
    head = {
        "kind": _HEADER,
        "key_bytes": key_bytes,
        "entry": dataclasses.asdict(entry),
        "statistics": dataclasses.asdict(statistics),
        **({"embeddings": [dataclasses.asdict(record) for record in embeddings], "source": source} if embeddings else {}),
    }
    packed = (_pack(row, key_bytes, [record.member for record in embeddings]) for row in rows)
    write_atomically((folder / entry.file).with_suffix(_SUFFIX), [header_line(head), *packed])


def _pack(row: Row, key_bytes: int, embeddings: Sequence[str]) -> bytes:
    places = (row.image, row.text, row.fields, *(row.embeddings.get(extension, (0, 0)) for extension in embeddings))
    return struct.pack(_row_format(key_bytes, len(embeddings)), row.key.encode(), *(number for place in places for number in place))


def read_index_header(tar: Path) -> dict[str, Any] | None:
    """The first line of a tar's index file, with `offset` (bytes) of its rows; None if there is no such file or it is not ours.

    Its `embeddings` are `EncoderRecord`s.
    """
    try:
        with open(tar.with_suffix(_SUFFIX), "rb") as file:
            line = file.readline(_MAX_HEADER)
        head = json.loads(line)
        ours = head["kind"] == _HEADER and type(head["key_bytes"]) is int and 0 < head["key_bytes"] <= MAX_KEY_BYTES
        embeddings = tuple(EncoderRecord.from_plain(record) for record in head.get("embeddings", ()))
        return {**head, "offset": len(line), "embeddings": embeddings} if ours else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def check_tar(folder: Path, entry: ShardEntry) -> None:
    """Raises ValueError if the tar is missing or has another size than the manifest says."""
    tar = folder / entry.file
    size = tar.stat().st_size if tar.is_file() else None
    if size != entry.bytes:
        found = "is missing" if size is None else f"has {size} bytes where the manifest says {entry.bytes}"
        raise ValueError(f"{tar} {found}: run `t2i-experts shards check {folder}`")


def open_index(folder: Path, entry: ShardEntry, embeddings: Sequence[EncoderRecord] = ()) -> IndexFile | tuple[Row, ...]:
    """The index file of a shard if it belongs to the entry; otherwise the rows themselves, from a scan of the tar.

    embeddings: those whose members the rows must give the places of.

    Raises ValueError if the tar is missing or is not the one that the manifest describes.
    """
    check_tar(folder, entry)
    tar = folder / entry.file
    head = read_index_header(tar)
    if head is not None and head.get("entry") == {**dataclasses.asdict(entry), "skipped": list(entry.skipped)}:
        index = IndexFile(tar.with_suffix(_SUFFIX), head["offset"], head["key_bytes"], tuple(e.member for e in head["embeddings"]))
        whole = index.path.stat().st_size == index.offset + entry.samples * index.row_bytes
        if whole and {record.member for record in embeddings} <= set(index.embeddings):
            return index
    skipped = set(entry.skipped)
    rows = tuple(row for row in scan(tar).rows if row.key not in skipped)
    if len(rows) != entry.samples:
        raise ValueError(f"{tar} has {len(rows)} samples where the manifest says {entry.samples}: run `t2i-experts shards check {folder}`")
    return rows
