"""Where captioned pictures come from before they are shards: a folder, a CSV file or a JSONL file; others have modules of their own.

A source is a function of (path, base folder of the images or None, `Skipped`) that yields a `Record` for each picture. It reads
captions only: whether the pictures exist and can be decoded is seen when the shards are built.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from t2i_experts.shards.format import CAPTION_FIELDS, how_to_convert, not_utf8
from t2i_experts.shards.images import SOURCE_EXTENSIONS


@dataclass
class Skipped:
    """Counts what is left out, by reason, and keeps the first few names of each."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Notes one picture or caption."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.first.setdefault(reason, [])
        if len(names) < 5:
            names.append(name)


@dataclass(frozen=True)
class Record:
    """A picture that is to become a sample.

    name: its path as the source gives it, relative where that is so, with `/`; no two records of a source share one.
    file: the file that is the picture, or that holds it. load: returns its bytes where the file holds more than that; several threads
    may call it at once, and it raises OSError or ValueError.
    """

    name: str
    file: Path
    captions: tuple[str, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    load: Callable[[], bytes] | None = None

    def read(self) -> bytes:
        """The picture file's bytes. Raises OSError or ValueError."""
        return self.file.read_bytes() if self.load is None else self.load()


Source = Callable[[Path, Path | None, Skipped], Iterator[Record]]

_SUFFIXES = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "coco", ".parquet": "parquet"}


def source_name(path: Path) -> str:
    """The registry's name of the source for a path: by its suffix, and for a folder by what lies in it. Raises ValueError."""
    if path.is_dir():
        suffixes = {file.suffix.lower() for file in path.iterdir() if not file.name.startswith(".")}
        return "img2dataset" if ".tar" in suffixes else "parquet" if suffixes == {".parquet"} else "folder"
    if not path.is_file():
        raise ValueError(f"source not found: {path}")
    name = _SUFFIXES.get(path.suffix.lower())
    if name is None:
        raise ValueError(f"source {path} has the suffix {path.suffix!r}; allowed: a folder, {', '.join(_SUFFIXES)}")
    return name


def folder_source(path: Path, images: Path | None, skipped: Skipped) -> Iterator[Record]:
    """All pictures under a folder, sorted by path, whose captions lie beside them: IMAGE.txt, one a line, and/or IMAGE.json.

    The JSON is an object with `caption` and/or `captions`; its other fields become metadata. Hidden files and folders are passed over.
    Raises ValueError if `images` is given, because the folder itself holds the images.
    """
    if images is not None:
        raise ValueError(f"--images {images} has no meaning for a folder, which holds its images itself; it belongs to lists, such as CSV")
    for file in _walk(path):
        if file.suffix.lower().lstrip(".") not in SOURCE_EXTENSIONS:
            continue
        name = file.relative_to(path).as_posix().encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        try:
            yield Record(name, file, *_sidecars(file))
        except UnicodeDecodeError as error:
            skipped.add(f"caption file is not UTF-8; {how_to_convert(error.object)}", name)
        except ValueError as error:
            skipped.add("caption file cannot be read", f"{name}: {error}")


def csv_source(path: Path, images: Path | None, skipped: Skipped) -> Iterator[Record]:
    """A CSV file (tab-separated if it ends in .tsv) with a header that names at least the columns `file` and `caption`.

    Rows of one file are its several captions; its other columns become metadata, as text, from the file's first row.
    Raises ValueError that names the line for a row that does not fit the header, and the columns there are if one is missing.
    """

    def rows() -> Iterator[tuple[str, list[str], dict[str, Any]]]:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            try:
                header = next(reader, [])
                missing = [column for column in ("file", "caption") if column not in header]
                if missing:
                    raise ValueError(f"{path}, line 1: column {' and '.join(missing)} missing; its columns are: {', '.join(header)}")
                if len(set(header)) < len(header):
                    raise ValueError(f"{path}, line 1: a column occurs twice: {', '.join(header)}")
                for cells in reader:
                    if not cells:
                        continue
                    if len(cells) != len(header):
                        quotes = f"; a caption with a {reader.dialect.delimiter!r} must stand in double quotes"
                        raise ValueError(
                            f"{path}, line {reader.line_num}: {len(cells)} cells where the header has {len(header)} columns "
                            f"({', '.join(header)}){quotes if len(cells) > len(header) else ''}"
                        )
                    row: dict[str, Any] = dict(zip(header, cells, strict=True))
                    if not row["file"].strip():
                        raise ValueError(f"{path}, line {reader.line_num}: the cell `file` is empty")
                    yield row.pop("file"), [row.pop("caption")], row
            except csv.Error as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
            except UnicodeDecodeError as error:
                raise ValueError(_first_not_utf8(path)) from error

    yield from grouped(rows(), images or path.parent)


def _first_not_utf8(path: Path) -> str:
    """The first line of a text file that is not UTF-8, and what to do; a decoder that reads ahead does not know the line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"{path}, line {number}: {not_utf8(error)}"
    return f"{path} is not UTF-8"


def jsonl_source(path: Path, images: Path | None, skipped: Skipped) -> Iterator[Record]:
    """A file of JSON objects, one a line, with `file` and `caption` (a string) or `captions` (a list of strings).

    Lines of one file are joined; other fields become metadata, from the file's first line. Raises ValueError that names the line.
    """

    def rows() -> Iterator[tuple[str, list[str], dict[str, Any]]]:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json_object(line)
                    if not isinstance(row.get("file"), str) or not row["file"].strip():
                        raise ValueError(f"field `file` missing or not a string; its fields are: {', '.join(row)}")
                    if not any(name in row for name in CAPTION_FIELDS):
                        raise ValueError(f"field `caption` or `captions` missing; its fields are: {', '.join(row)}")
                    name, captions = row.pop("file"), pop_captions(row)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
                yield name, captions, row

    yield from grouped(rows(), images or path.parent)


def grouped(rows: Iterable[tuple[str, list[str], dict[str, Any]]], base: Path) -> Iterator[Record]:
    """One record a file, in the order in which the files first occur."""
    captions: dict[str, list[str]] = {}
    metadata: dict[str, dict[str, Any]] = {}
    for file, more, fields in rows:
        name = Path(os.path.normpath(file.strip())).as_posix()
        captions.setdefault(name, []).extend(more)
        metadata.setdefault(name, {k: v for k, v in fields.items() if k not in CAPTION_FIELDS})
    for name, texts in captions.items():
        yield Record(name, base / name, tuple(texts), metadata[name])


def _walk(folder: Path) -> Iterator[Path]:
    """Files under a folder, sorted within each folder. Raises ValueError for a folder that cannot be listed."""

    def fail(error: OSError) -> NoReturn:
        raise ValueError(f"cannot read {error.filename}: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def _sidecars(image: Path) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Captions and metadata beside an image, each caption once. Raises ValueError for a file that is not UTF-8 or not JSON."""
    captions: list[str] = []
    metadata: dict[str, Any] = {}
    fields, text = image.with_suffix(".json"), image.with_suffix(".txt")
    if fields.is_file():
        metadata = json_object(fields.read_bytes())
        captions += pop_captions(metadata)
    if text.is_file():
        captions += text.read_bytes().decode("utf-8-sig").splitlines()
    return tuple(dict.fromkeys(caption.strip() for caption in captions)), metadata


def json_object(data: bytes) -> dict[str, Any]:
    """Strict JSON: UTF-8, an object, no NaN."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON number")

    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(error)) from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value


def pop_captions(fields: dict[str, Any]) -> list[str]:
    """Takes `caption` and `captions` out of an object; either may be absent or null."""
    one, several = (fields.pop(name, None) for name in CAPTION_FIELDS)
    captions = ([] if one is None else [one]) + (several if isinstance(several, list) else [] if several is None else [several])
    if (several is not None and not isinstance(several, list)) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError("`caption` must be a string and `captions` a list of strings")
    return captions
