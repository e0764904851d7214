"""Pictures with their captions: shards bring them; a folder has them beside its pictures, or in one file.

Of several captions of a picture the first counts. A picture without a caption and a caption without a picture are errors: a score of
what happens to match would be that of another set.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from t2i_experts.evaluation.pictures import PictureSet, Stored, find_pictures, walk
from t2i_experts.shards.format import not_utf8

_LISTED = 10


@dataclass(frozen=True)
class CaptionedPictures:
    """pictures: each of which has at least one caption. source: where the captions come from, in words or as the file's path."""

    pictures: PictureSet
    source: str


def open_captioned(path: Path, captions: Path | None = None) -> CaptionedPictures:
    """The pictures of a folder or of its shards. captions: a file of them, for a folder of pictures: see `read_captions`.

    Raises ValueError for what is not there, pictures without captions and captions without pictures.
    """
    pictures = find_pictures(path, "PICTURES")
    if pictures.kind == "shards":
        if captions is not None:
            raise ValueError(f"--captions {captions} has no meaning for the shards of {path}, which hold their captions themselves")
        return CaptionedPictures(pictures, "shards")
    if captions is None:
        found, source = _beside(pictures), "a .txt beside each picture"
    else:
        found, source = read_captions(captions, pictures), str(captions)

    def load(index: int) -> Stored:
        return replace(pictures.load(index), captions=found[pictures.names[index]])

    return CaptionedPictures(replace(pictures, load=load), source)


def _beside(pictures: PictureSet) -> Mapping[str, tuple[str, ...]]:
    """By the pictures' names, the lines of the .txt of the same name but for its extension that are not blank."""
    names: dict[Path, list[str]] = {}
    for name in pictures.names:
        names.setdefault(pictures.path / Path(name).with_suffix(".txt"), []).append(name)
    found: dict[str, tuple[str, ...]] = {}
    lonely = []
    for file in walk(pictures.path, ("txt",)):
        if file not in names:
            lonely.append(file.relative_to(pictures.path).as_posix())
            continue
        captions = tuple(line.strip() for line in _text(file).splitlines() if line.strip())
        if captions:
            found |= dict.fromkeys(names[file], captions)
    missing = [name for name in pictures.names if name not in found]
    if missing:
        raise ValueError(
            f"{len(missing):,} of the {pictures.count:,} pictures of {pictures.path} have no caption in a .txt of the same name: "
            f"{_some(missing)}; write it there, or give all of them as --captions FILE"
        )
    if lonely:
        raise ValueError(f"{len(lonely):,} captions in {pictures.path} have no picture of the same name: {_some(lonely)}")
    return found


def read_captions(path: Path, pictures: PictureSet) -> Mapping[str, tuple[str, ...]]:
    """The captions of a folder's pictures, by their names relative to the folder, from a file.

    .jsonl: objects with `file` (or `name`) and `caption`, one a line. .tsv: the same two as columns, in this order, with or without a
    header; quoted as in CSV. .txt: one caption a line, in the order of the pictures by name.
    """
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".tsv", ".txt"):
        raise ValueError(f"--captions {path} has the suffix {path.suffix!r}; allowed: .jsonl, .tsv, .txt")
    if not path.is_file():
        raise ValueError(f"--captions {path} is not there")
    if suffix == ".txt":
        return _in_order(path, pictures)
    rows = _json_rows(path) if suffix == ".jsonl" else _tab_rows(path)
    known, found = set(pictures.names), dict[str, tuple[str, ...]]()
    lonely = []
    for number, given, caption in rows:
        name = Path(os.path.normpath(given)).as_posix()
        if name in found:
            raise ValueError(f"{path}, line {number}: a second caption of {name}")
        if not caption.strip():
            raise ValueError(f"{path}, line {number}: the caption of {name} is empty")
        if name not in known:
            lonely.append(name)
        found[name] = (caption.strip(),)
    missing = [name for name in pictures.names if name not in found]
    if missing:
        raise ValueError(
            f"{path} has no caption for {len(missing):,} of the {pictures.count:,} pictures of {pictures.path}: {_some(missing)}"
            + (f"; it has some of files that are not there: {_some(lonely)}" if lonely else "")
        )
    if lonely:
        raise ValueError(f"{path} has captions for {len(lonely):,} pictures that {pictures.path} does not have: {_some(lonely)}")
    return found


def _in_order(path: Path, pictures: PictureSet) -> Mapping[str, tuple[str, ...]]:
    """One caption a line; only where the order of the names is not open to doubt."""
    lines = [line.strip() for line in _text(path).removesuffix("\n").split("\n")]
    names = sorted(pictures.names)
    if len(lines) != len(names):
        raise ValueError(
            f"{path} has {len(lines):,} lines for the {len(names):,} pictures of {pictures.path}: one caption a line is needed"
        )
    for number, line in enumerate(lines, start=1):
        if not line:
            raise ValueError(f"{path}, line {number}: the caption of {names[number - 1]} is empty")
    by_number = sorted(names, key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)])
    for first, second in zip(names, by_number, strict=True):
        if first != second:
            raise ValueError(
                f"--captions {path} goes by the order of the pictures, which is in doubt: {first} comes first by its letters, {second} by "
                "its number; write the names into a .jsonl or .tsv"
            )
    return {name: (line,) for name, line in zip(names, lines, strict=True)}


def _json_rows(path: Path) -> Iterable[tuple[int, str, str]]:
    """Line, name and caption."""
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        fields = row if isinstance(row, dict) else {}
        name, caption = fields.get("file", fields.get("name")), fields.get("caption")
        if not isinstance(name, str) or not name.strip() or not isinstance(caption, str):
            found = f"the fields {', '.join(fields)}" if fields else line[:60]
            raise ValueError(f"{path}, line {number}: an object with the strings `file` and `caption` is needed; received {found}")
        yield number, name.strip(), caption


def _tab_rows(path: Path) -> Iterable[tuple[int, str, str]]:
    """Line, name and caption."""
    reader = csv.reader(_text(path).split("\n"), delimiter="\t", strict=True)
    try:
        for cells in reader:
            if not cells or (reader.line_num == 1 and cells in (["file", "caption"], ["name", "caption"])):
                continue
            if len(cells) != 2 or not cells[0].strip():
                raise ValueError(f"{path}, line {reader.line_num}: a name, a tab and a caption are needed; received {len(cells)} cells")
            yield reader.line_num, cells[0].strip(), cells[1]
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num}: {error}; a caption that begins with a quotation mark is quoted as in CSV"
        ) from error


def _text(path: Path) -> str:
    """Raises ValueError for what is not UTF-8 or cannot be read."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is {not_utf8(error)}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
