"""Parquet tables as a source, with the pictures as files or inside the table. The only module that needs pyarrow, an optional package."""

from __future__ import annotations

import datetime
import decimal
import functools
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i_experts.shards.format import CAPTION_FIELDS
from t2i_experts.shards.sources import Record, Skipped, grouped, pop_captions


def parquet_source(path: Path, images: Path | None, skipped: Skipped) -> Iterator[Record]:
    """A Parquet file, or a folder of them: one table, sorted by file name.

    It has a column `caption` (text) and/or `captions` (lists of text), and either `file`, which names picture files as in a CSV, or
    `image`: the bytes of a picture file, or Hugging Face's struct of `bytes` and `path`. With `image`, each row is a picture, called by
    its table and number; else rows of one file are joined. Other columns become metadata, a struct's `path` that of the name `path`.

    Raises ValueError if pyarrow is not installed, if columns are missing (and lists those there are), and if `images` is given for a
    table that holds the pictures.
    """
    paths = sorted(path.glob("[!.]*.parquet")) if path.is_dir() else [path]
    if not paths:
        raise ValueError(f"{path} holds no .parquet files")
    tables = [_Table.open(file) for file in paths]
    inside = [table.file for table in tables if table.holds_pictures]
    if inside and len(inside) < len(tables):
        raise ValueError(f"{path}: some tables have the column `image` and others `file`; build them one by one")
    if inside and images is not None:
        raise ValueError(f"--images {images} has no meaning for {inside[0]}, whose column `image` holds the pictures")
    if inside:
        groups = _RowGroups()
        for table in tables:
            digits = len(str(table.count))
            for number, (group, i, captions, fields) in enumerate(_rows(table)):
                # Called by numbers, so that the order of the keys is that of the table and each row group is read once.
                name = f"{table.file.stem}/{number:0{digits}d}"
                yield Record(name, table.file, tuple(captions), fields, functools.partial(groups.picture, table.file, group, i))
    else:
        rows = ((fields.pop("file"), captions, fields) for table in tables for _, _, captions, fields in _rows(table))
        yield from grouped(rows, images or (path if path.is_dir() else path.parent))


@dataclass(frozen=True)
class _Table:
    """One Parquet file. columns: those that are read with the captions, everything but the bytes of pictures. count: rows."""

    file: Path
    columns: tuple[str, ...]
    holds_pictures: bool
    count: int

    @classmethod
    def open(cls, file: Path) -> _Table:
        """Reads the schema. Raises ValueError as `parquet_source` says."""
        with _reader(file) as reader:
            schema, count = reader.schema_arrow, reader.metadata.num_rows
        names: list[str] = schema.names
        known = f"its columns are: {', '.join(names)}"
        if not set(names) & set(CAPTION_FIELDS):
            raise ValueError(f"{file}: column `caption` or `captions` missing; {known}")
        if ("file" in names) == ("image" in names):
            raise ValueError(f"{file}: one of the columns `file` and `image` must be there; {known}")
        if "file" in names:
            return cls(file, tuple(names), False, count)
        inner = _fields_of_struct(file, schema.field("image").type)
        return cls(file, (*(name for name in names if name != "image"), *(["image.path"] if "path" in inner else [])), True, count)


class _RowGroups:
    """The picture columns of the row groups that were read last: two, since threads near the end of one already want the next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[Path, int], Any] = OrderedDict()

    def picture(self, file: Path, group: int, i: int) -> bytes:
        """The bytes of picture i of a row group. Raises ValueError if there are none."""
        with self._lock:
            if (file, group) not in self._held:
                while len(self._held) >= 2:
                    self._held.popitem(last=False)
                with _reader(file) as reader:
                    self._held[file, group] = reader.read_row_group(group, columns=["image"]).column("image")
            value = self._held[file, group][i].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes) or not data:
            raise ValueError("its row holds no bytes")
        return data


@contextmanager
def _reader(file: Path) -> Iterator[Any]:
    """The open table. Raises ValueError for a file that is not Parquet or is damaged, also when it is read in the block."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"reading {file} needs pyarrow: pip install 't2i-experts[parquet]', or pip install pyarrow") from error
    try:
        with parquet.ParquetFile(file) as reader:
            yield reader
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as Parquet: {error}") from error


def _rows(table: _Table) -> Iterator[tuple[int, int, list[str], dict[str, Any]]]:
    """(row group, number in it, captions, other fields) for each row. Raises ValueError that names a row that cannot be used."""
    number = 0
    with _reader(table.file) as reader:
        for group in range(reader.num_row_groups):
            first = number
            for batch in reader.iter_batches(batch_size=1024, row_groups=[group], columns=list(table.columns)):
                for row in batch.to_pylist():
                    image = row.pop("image", None)
                    if isinstance(image, dict) and image.get("path") is not None:
                        row.setdefault("path", image["path"])
                    fields = {name: _plain(value) for name, value in row.items()}
                    try:
                        captions = pop_captions(fields)
                    except ValueError as error:
                        raise ValueError(f"{table.file}, row {number}: {error}") from error
                    if not table.holds_pictures and not (isinstance(fields["file"], str) and fields["file"].strip()):
                        raise ValueError(f"{table.file}, row {number}: `file` is blank or no text")
                    yield group, number - first, captions, fields
                    number += 1


def _fields_of_struct(file: Path, kind: Any) -> list[str]:
    """The names of the fields of the column `image`, none for plain bytes. Raises ValueError for a type that holds no bytes."""
    from pyarrow import types

    def binary(candidate: Any) -> bool:
        return bool(types.is_binary(candidate) or types.is_large_binary(candidate))

    if binary(kind):
        return []
    fields = [kind.field(i) for i in range(kind.num_fields)] if types.is_struct(kind) else []
    if not any(field.name == "bytes" and binary(field.type) for field in fields):
        raise ValueError(f"{file}: column `image` holds {kind}; allowed: binary, or a struct with the binary field `bytes`")
    return [field.name for field in fields]


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: dates and decimals as text, bytes and NaN as null."""
    match value:
        case bytes():
            return None
        case datetime.date() | datetime.time() | datetime.timedelta() | decimal.Decimal():
            return str(value)
        case dict():
            return {str(name): _plain(item) for name, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value
