"""COCO's captions: one JSON with `images` and `annotations`, and the pictures in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t2i_experts.shards.sources import Record, Skipped, grouped, json_object


def coco_source(path: Path, images: Path | None, skipped: Skipped) -> Iterator[Record]:
    """Every image of the list with all its captions, in the order of the annotations; the image's other fields become metadata.

    Raises ValueError that names the entry if the file is not such JSON; an instances file, say, has annotations without captions.
    """
    entries, unlisted = read_captions(path)
    for identity, caption in unlisted:
        skipped.add("caption of an image that is not listed", f"image_id {identity}: {caption}")
    rows = ((entry["file_name"], captions, {k: v for k, v in entry.items() if k != "file_name"}) for entry, captions in entries)
    yield from grouped(rows, images or path.parent)


def read_captions(path: Path) -> tuple[list[tuple[dict[str, Any], list[str]]], list[tuple[int | str, str]]]:
    """(the entries of the images with their captions, both in the file's order; image_id and caption of images that are not listed).

    Each entry has at least `id`, a whole number or text, and `file_name`. Raises ValueError as `coco_source`, and for a missing file.
    """
    try:
        document = json_object(path.read_bytes())
        entries, annotations = (document.get(name) for name in ("images", "annotations"))
        if not isinstance(entries, list) or not isinstance(annotations, list):
            raise ValueError(f"a captions file has the lists `images` and `annotations`; its fields are: {', '.join(document)}")
        captions: dict[int | str, list[str]] = {}
        for i, entry in enumerate(entries):
            _field(entry, "file_name", (str,), f"images[{i}]")
            identity = _field(entry, "id", (int, str), f"images[{i}]")
            if identity in captions:
                raise ValueError(f"images[{i}]: the id {identity!r} occurs twice")
            captions[identity] = []
        unlisted = []
        for i, annotation in enumerate(annotations):
            caption = _field(annotation, "caption", (str,), f"annotations[{i}]")
            identity = _field(annotation, "image_id", (int, str), f"annotations[{i}]")
            if identity in captions:
                captions[identity].append(caption)
            else:
                unlisted.append((identity, caption))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return [(entry, captions[entry["id"]]) for entry in entries], unlisted


def _field(entry: Any, name: str, kinds: tuple[type, ...], place: str) -> Any:
    """A field of an entry. Raises ValueError that names the place if it is missing, blank or of another type."""
    if not isinstance(entry, dict):
        raise ValueError(f"{place} is a {type(entry).__name__}, not an object")
    value = entry.get(name)
    if type(value) not in kinds or (name == "file_name" and not str(value).strip()):
        found = f"its fields are: {', '.join(entry)}" if name not in entry else f"received {value!r}"
        raise ValueError(f"{place}: `{name}` must be {' or '.join({int: 'a whole number', str: 'text'}[kind] for kind in kinds)}; {found}")
    return value
