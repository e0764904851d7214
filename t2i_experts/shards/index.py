"""Where each sample of a tar lies, so that any one is read by offset: found by a scan, and kept in a file beside the tar."""

from __future__ import annotations

import dataclasses
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from t2i_experts.shards.format import IMAGE_EXTENSIONS, ShardEntry, Statistics, split_member, write_atomically

_SUFFIX = ".index"
_HEADER = "t2i-experts shard index 1"


@dataclass(frozen=True)
class Row:
    """The members of one sample as (offset, bytes) in the tar; (0, 0) where there is none."""

    key: str
    image: tuple[int, int]
    text: tuple[int, int]
    fields: tuple[int, int]


def pack_rows(rows: Sequence[Row]) -> np.ndarray:
    """(N,) structured array of the rows, sorted by the key's bytes, whatever their order in the tar."""
    packed = sorted((row.key.encode(), *row.image, *row.text, *row.fields) for row in rows)
    return np.array(packed, dtype=_row_type(max((len(row[0]) for row in packed), default=1)))


def unpack_row(rows: np.ndarray, i: int) -> Row:
    """One row of a packed array."""
    key, image, image_bytes, text, text_bytes, fields, fields_bytes = rows[i].item()
    return Row(key.decode(), (image, image_bytes), (text, text_bytes), (fields, fields_bytes))


def _row_type(key_bytes: int) -> np.dtype[Any]:
    numbers = ("image", "image_bytes", "text", "text_bytes", "fields", "fields_bytes")
    return np.dtype([("key", f"S{key_bytes}"), *((name, "<i8") for name in numbers)])


@dataclass(frozen=True)
class Scan:
    """What a walk over a tar's headers finds.

    rows: the complete samples, packed. incomplete: (key, what is wrong) for the others. unsorted: a key whose members do not
    stand together, so that sequential readers would see it as two halves; None if there is no such key.
    """

    rows: np.ndarray
    incomplete: tuple[tuple[str, str], ...] = ()
    unsorted: str | None = None


def scan(tar: Path) -> Scan:
    """Walks over the headers of a tar: ustar, GNU or pax.

    Raises ValueError if it is damaged or compressed, or holds links, devices, absolute paths or `..`.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    wrong: dict[str, str] = {}
    unsorted: str | None = None
    last = ""
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                name = split_member(member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise ValueError(f"member {member.name!r} is no plain file")
                if name is None:
                    continue
                key, extension = name
                if key != last and key in samples:
                    unsorted = unsorted or key
                last = key
                members = samples.setdefault(key, {})
                if extension in members:
                    wrong[key] = f"it has two members .{extension}"
                members[extension] = (member.offset_data, member.size)
    except (tarfile.TarError, ValueError, OSError, EOFError) as error:
        raise ValueError(f"{tar}: cannot be read as an uncompressed tar: {error}") from error
    rows = []
    for key, members in samples.items():
        images = [members[extension] for extension in IMAGE_EXTENSIONS if extension in members]
        if len(images) != 1:
            wrong.setdefault(key, "it has no image (jpg, png or webp)" if not images else "it has several images")
        elif "txt" not in members and "json" not in members:
            wrong.setdefault(key, "it has no caption (txt or json)")
        if key not in wrong:
            rows.append(Row(key, images[0], members.get("txt", (0, 0)), members.get("json", (0, 0))))
    return Scan(pack_rows(rows), tuple(sorted(wrong.items())), unsorted)


def without(rows: np.ndarray, keys: Sequence[str]) -> np.ndarray:
    """The packed rows without those of some keys."""
    left_out = [key.encode() for key in keys]
    return rows[~np.isin(rows["key"], left_out)] if left_out else rows


def save_index(folder: Path, entry: ShardEntry, statistics: Statistics, rows: np.ndarray) -> None:
    """Writes the index file of a shard: a line of JSON, padded to a multiple of 64 bytes, then the packed rows."""
    head = {
        "kind": _HEADER,
        "key_bytes": rows.dtype["key"].itemsize,
        "entry": dataclasses.asdict(entry),
        "statistics": dataclasses.asdict(statistics),
    }
    line = json.dumps(head).encode()
    line += b" " * (-(len(line) + 1) % 64) + b"\n"
    write_atomically((folder / entry.file).with_suffix(_SUFFIX), [line, rows.tobytes()])


def read_index_header(tar: Path) -> dict[str, Any] | None:
    """The first line of a tar's index file, with `offset` (bytes) of its rows; None if there is no such file or it is not ours."""
    try:
        with open(tar.with_suffix(_SUFFIX), "rb") as file:
            line = file.readline()
        head = json.loads(line)
        return {**head, "offset": len(line)} if head["kind"] == _HEADER else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def open_index(folder: Path, entry: ShardEntry) -> np.ndarray:
    """The packed rows of a shard: mapped from its index file if that belongs to the entry, otherwise from a scan.

    Raises ValueError if the tar is missing or is not the one that the manifest describes.
    """
    tar = folder / entry.file
    size = tar.stat().st_size if tar.is_file() else None
    if size != entry.bytes:
        found = "is missing" if size is None else f"has {size} bytes where the manifest says {entry.bytes}"
        raise ValueError(f"{tar} {found}: run `t2i-experts shards check {folder}`")
    head = read_index_header(tar)
    if head is not None and head.get("entry") == {**dataclasses.asdict(entry), "skipped": list(entry.skipped)}:
        dtype, path = _row_type(head["key_bytes"]), tar.with_suffix(_SUFFIX)
        if os.path.getsize(path) == head["offset"] + entry.samples * dtype.itemsize:
            return np.memmap(path, dtype, "r", head["offset"], (entry.samples,)) if entry.samples else np.empty(0, dtype)
    rows = without(scan(tar).rows, entry.skipped)
    if len(rows) != entry.samples:
        raise ValueError(f"{tar} has {len(rows)} samples where the manifest says {entry.samples}: run `t2i-experts shards check {folder}`")
    return rows
