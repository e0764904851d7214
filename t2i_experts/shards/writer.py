"""Writes shards: the same samples give the same bytes, and a folder with a manifest is complete."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from t2i_experts.shards.format import (
    IMAGE_EXTENSIONS,
    MAX_CAPTION_CHARACTERS,
    MAX_KEY_BYTES,
    EncoderRecord,
    Manifest,
    ShardEntry,
    Statistics,
    dump_fields,
    split_member,
)
from t2i_experts.shards.images import image_size
from t2i_experts.shards.index import Row, read_index_header, save_index

_BLOCK = 512


class ShardWriter:
    """Writes samples in ascending order of their keys to 00000.tar, 00001.tar, ... and then the manifest.

    Use it in a `with` block: the manifest is written when the block ends well, and the shard under way is removed when it does
    not. Several processes may write into one folder if each has its own range of shard numbers (`first_shard`); call
    `write_manifest` when all have finished.
    """

    def __init__(self, folder: str | Path, *, samples_per_shard: int = 8192, first_shard: int = 0) -> None:
        """Raises ValueError if samples_per_shard is not positive or first_shard is negative."""
        if samples_per_shard < 1 or first_shard < 0:
            raise ValueError(f"samples_per_shard={samples_per_shard} must be positive and first_shard={first_shard} not negative")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._samples_per_shard = samples_per_shard
        self._number = first_shard
        self._last_key = b""
        self._shard: TarWriter | None = None

    def write(self, key: str, image: bytes, extension: str, captions: Sequence[str], metadata: Mapping[str, Any] | None = None) -> None:
        """Adds a sample: `image` in its file format, as bytes, at least one caption, and fields that JSON can hold.

        Raises ValueError for a key that does not follow the last one in the order of UTF-8 bytes or that holds a dot, for an
        extension that shards do not hold, for an image whose header cannot be read, for a missing or blank caption, and for what is so
        large that no reader would take it.
        """
        if extension not in IMAGE_EXTENSIONS:
            raise ValueError(f"sample {key!r}: extension {extension!r}; allowed: {', '.join(IMAGE_EXTENSIONS)}")
        if split_member(f"{key}.{extension}") != (key, extension) or "\0" in key:
            raise ValueError(f"key {key!r} cannot name a sample: it must be a relative path without dots in its last part")
        if len(key.encode()) > MAX_KEY_BYTES:
            raise ValueError(f"key {key[:64]!r}... has {len(key.encode()):,} bytes; at most {MAX_KEY_BYTES:,} are allowed")
        if key.encode() <= self._last_key:
            raise ValueError(f"key {key!r} comes after {self._last_key.decode()!r}: write samples in ascending order of their keys")
        if not captions or not all(caption.strip() for caption in captions):
            raise ValueError(f"sample {key!r}: at least one caption is needed, and none may be blank: {list(captions)!r}")
        longest = max(len(caption) for caption in captions)
        if longest > MAX_CAPTION_CHARACTERS:
            raise ValueError(f"sample {key!r}: a caption has {longest:,} characters; at most {MAX_CAPTION_CHARACTERS:,} are allowed")
        try:
            size = image_size(image)
            text, fields = captions[0].encode(), dump_fields(captions, metadata or {})
            Row(key, (0, len(image)), (0, len(text)), (0, len(fields or b""))).check_sizes()
        except (ValueError, TypeError) as error:
            raise ValueError(f"sample {key!r}: {error}") from error
        if self._shard is None:
            self._shard = TarWriter(self.folder / f"{self._number:05d}.tar")
        members = {extension: image, "txt": text} if fields is None else {extension: image, "json": fields, "txt": text}
        self._shard.add(key, members, [len(caption) for caption in captions], size)
        self._last_key = key.encode()
        if self._shard.samples == self._samples_per_shard:
            self._finish_shard()

    def close(self) -> Manifest:
        """Finishes the last shard and writes the manifest of the folder, which it returns."""
        self._finish_shard()
        return write_manifest(self.folder)

    def _finish_shard(self) -> None:
        if self._shard is not None:
            self._shard.finish()
            self._shard = None
            self._number += 1

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self._shard is not None:
            self._shard.abandon()


def write_manifest(folder: str | Path) -> Manifest:
    """Writes and returns the manifest over all finished shards of a folder, from what their writers noted in the index files.

    Raises ValueError for a tar that no ShardWriter wrote; `t2i-experts shards check --write-manifest` reads such tars.
    """
    folder = Path(folder)
    entries: list[ShardEntry] = []
    statistics = Statistics()
    embeddings: tuple[EncoderRecord, ...] = ()
    for tar in sorted(folder.glob("[!.]*.tar")):
        head = read_index_header(tar)
        if head is None or head["entry"]["file"] != tar.name or head["entry"]["bytes"] != tar.stat().st_size:
            raise ValueError(f"{tar} has no index of its own: run `t2i-experts shards check {folder} --write-manifest`")
        if entries and head["embeddings"] != embeddings:
            raise ValueError(f"{tar} holds embeddings of other encoders than the tars before it; the folder must have one kind")
        embeddings = head["embeddings"]
        entries.append(ShardEntry.from_plain(head["entry"]))
        statistics += Statistics.from_plain(head["statistics"])
    manifest = Manifest(tuple(entries), statistics, embeddings)
    manifest.save(folder)
    return manifest


class TarWriter:
    """One tar under way, under a temporary name.

    embeddings, source: what `save_index` notes of them.
    """

    def __init__(self, path: Path, embeddings: Sequence[EncoderRecord] = (), source: str | None = None) -> None:
        self._path = path
        if self._path.exists():
            raise ValueError(f"{self._path} exists already; write into an empty folder")
        self._embeddings, self._source = embeddings, source
        self._partial = path.with_name(f".{path.name}.partial")
        self._file: BinaryIO = open(self._partial, "wb")
        self._sha256 = hashlib.sha256()
        self._bytes = 0
        self._rows: list[Row] = []
        self._caption_characters: list[int] = []
        self._image_sizes: list[tuple[int, int]] = []

    @property
    def samples(self) -> int:
        return len(self._rows)

    def add(self, key: str, members: Mapping[str, bytes], caption_characters: Sequence[int], image_size: tuple[int, int]) -> None:
        """Appends the members of a sample, by extension, the image first."""
        places = {extension: self._member(f"{key}.{extension}", data) for extension, data in members.items()}
        embeddings = {record.member: places[record.member] for record in self._embeddings}
        self._rows.append(Row(key, next(iter(places.values())), places.get("txt", (0, 0)), places.get("json", (0, 0)), embeddings))
        self._caption_characters += caption_characters
        self._image_sizes.append(image_size)

    def _member(self, name: str, data: bytes) -> tuple[int, int]:
        """Appends a file that belongs to nobody and to no time, and returns its (offset, bytes)."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o644
        self._write(info.tobuf(tarfile.PAX_FORMAT))
        at = self._bytes
        self._write(data + bytes(-len(data) % _BLOCK))
        return at, len(data)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._bytes += len(data)

    def finish(self) -> None:
        """Puts the tar and its index on the disk, and gives it its name."""
        self._write(bytes(2 * _BLOCK))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        entry = ShardEntry(self._path.name, self.samples, self._bytes, self._sha256.hexdigest())
        statistics = Statistics.of(self._caption_characters, self._image_sizes)
        save_index(self._path.parent, entry, statistics, self._rows, self._embeddings, self._source)
        os.replace(self._partial, self._path)

    def abandon(self) -> None:
        """Removes what there is of it."""
        self._file.close()
        self._partial.unlink(missing_ok=True)
