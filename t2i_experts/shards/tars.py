"""Tars of captioned pictures as a source: the output folder of img2dataset, or other shards that are to be filtered or shrunk."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t2i_experts.shards.format import parse_captions
from t2i_experts.shards.index import Row, scan
from t2i_experts.shards.sources import Record, Skipped


def img2dataset_source(path: Path, images: Path | None, skipped: Skipped) -> Iterator[Record]:
    """The samples of all tars of a folder; the pictures stay in the tars until they are written.

    The other fields of KEY.json become metadata. The Parquet file that img2dataset writes beside each tar is not needed: it holds the same
    fields, and those of the pictures that could not be downloaded. A tar that cannot be read to its end is left out as a whole.

    Raises ValueError if `images` is given, because the tars hold the images, and if there is no tar.
    """
    if images is not None:
        raise ValueError(f"--images {images} has no meaning for tars, which hold their images themselves")
    paths = sorted(path.glob("[!.]*.tar"))
    if not paths:
        raise ValueError(f"{path} holds no tars" if path.is_dir() else f"source {path} must be a folder of tars")
    for tar in paths:
        try:
            found = scan(tar)
        except ValueError as error:
            skipped.add("tar cannot be read", str(error))
            continue
        for key, detail in found.incomplete:
            skipped.add("sample of a tar is incomplete", f"{tar.stem}/{key}: {detail}")
        with open(tar, "rb") as file:
            for row in found.rows:
                name = f"{tar.stem}/{row.key}"
                try:
                    captions, metadata = _texts(file.fileno(), row)
                except ValueError as error:
                    skipped.add("sample's caption cannot be read", f"{name}: {error}")
                    continue
                yield Record(name, tar, captions, metadata, functools.partial(_read_part, tar, *row.image))


def _texts(file: int, row: Row) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Captions and metadata of a sample, as `parse_captions` reads them. Raises ValueError."""
    text, fields = (os.pread(file, place[1], place[0]) if place[0] else None for place in (row.text, row.fields))
    return parse_captions(text, fields)


def _read_part(path: Path, offset: int, length: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(length)
    if len(data) != length:
        raise ValueError(f"{path} ends within it")
    return data
