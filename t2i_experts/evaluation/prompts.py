"""The prompts that a model is measured on, as a list that can be written, read back and told by its hash: which captions of which
pictures, in which order. The place in the list is the picture's index, and with the seed decides its noise."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from t2i_experts.shards.coco import read_captions
from t2i_experts.shards.format import not_utf8

RULE = "images by rising sha256('SEED/image/ID'); of the k captions of one, in the file's order, number sha256('SEED/caption/ID') mod k"
"""How captions are chosen. The first n of a longer choice are the choice of n, and the order of the file's images does not matter."""

_COLUMNS = {
    "image_id": ("image_id", "coco_id", "id"),
    "file_name": ("file_name", "file"),
    "text": ("caption", "prompt", "text"),
    "category": ("category",),
}
"""What a list may say of a prompt, and what its columns may be called, in any case; the first that is there counts."""

_LISTED = 5

Identity = TypeVar("Identity", int, str, int | str)


@dataclass(frozen=True)
class Prompt:
    """image_id, file_name: the picture that it is a caption of, as COCO numbers it and in its folder. text: white space is one blank each.

    category: in which scores are also given, such as PartiPrompts'.
    """

    text: str
    image_id: int | str | None = None
    file_name: str | None = None
    category: str | None = None


@dataclass(frozen=True)
class PromptList:
    """Prompts in their order. origin: how the list came about, as JSON's plain values."""

    prompts: Sequence[Prompt]
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def texts(self) -> list[str]:
        """The prompts alone."""
        return [prompt.text for prompt in self.prompts]

    @property
    def file_names(self) -> list[str]:
        """The pictures that the prompts are captions of, each once, in the order of the list."""
        return list(dict.fromkeys(prompt.file_name for prompt in self.prompts if prompt.file_name is not None))

    @cached_property
    def sha256(self) -> str:
        """Of the file that `csv` is."""
        return hashlib.sha256(self.csv().encode()).hexdigest()

    def csv(self) -> str:
        """The list as a CSV file with the columns image_id, file_name, caption and category, as far as any prompt has them."""
        names = {"image_id": "image_id", "file_name": "file_name", "text": "caption", "category": "category"}
        used = [name for name in names if any(getattr(prompt, name) is not None for prompt in self.prompts)]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(names[name] for name in used)
        writer.writerows([getattr(prompt, name) for name in used] for prompt in self.prompts)
        return out.getvalue()

    def first(self, num: int | None, received: str) -> PromptList:
        """The first `num` prompts; None is all. Raises ValueError, which begins with what was `received`, if there are fewer."""
        if num is not None and num > len(self.prompts):
            raise ValueError(f"{received}: there are only {len(self.prompts):,} in {self.origin.get('path', 'the list')}")
        return replace(self, prompts=self.prompts[:num])


def choose_captions(annotations: Path, num: int | None, seed: int) -> PromptList:
    """One caption for each of `num` images of a COCO captions file, by `RULE`; None is all images.

    Raises ValueError for a file of another kind, for images without captions and captions without images, and for too large a number.
    """
    entries = _complete_entries(annotations)
    if num is not None and num > len(entries):
        raise ValueError(f"--num={num}: {annotations} has captions of only {len(entries):,} images")
    chosen = first_by_rule(entries, num, seed)
    prompts = tuple(Prompt(caption_of(entries[one][1], seed, one), one, entries[one][0]) for one in chosen)
    origin = {"kind": "COCO captions", "path": str(annotations), "file_sha256": _file_sha256(annotations)}
    return PromptList(prompts, {**origin, "images": len(entries), **rule_of(seed)})


def first_by_rule(identities: Iterable[Identity], num: int | None, seed: int) -> list[Identity]:
    """The first `num` images by `RULE`; None is all."""
    return sorted(identities, key=lambda identity: _draw(seed, "image", identity))[:num]


def caption_of(captions: Sequence[str], seed: int, identity: int | str) -> str:
    """One of an image's captions, by `RULE`; white space is one blank each."""
    return _words(captions[_draw(seed, "caption", identity) % len(captions)])


def rule_of(seed: int) -> dict[str, Any]:
    """What a list that was chosen by `RULE` says of it."""
    return {"caption_seed": seed, "rule": RULE}


def read_prompts(path: Path) -> PromptList:
    """A list: CSV or TSV with a header that names at least one of `_COLUMNS`, or a text file with a prompt on each line.

    A TSV, such as PartiPrompts', has no quotes: tabs and line ends alone divide it. Raises ValueError that names the line.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {not_utf8(error)}") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    kind = {".csv": "CSV", ".tsv": "TSV"}.get(path.suffix.lower(), "text")
    if kind == "text":
        prompts = [Prompt(words) for line in text.splitlines() if (words := _words(line))]
    else:
        prompts = list(_rows(io.StringIO(text, newline=""), kind, path))
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return PromptList(tuple(prompts), {"kind": kind, "path": str(path), "file_sha256": hashlib.sha256(data).hexdigest()})


def read_ids(path: Path, annotations: Path | None, seed: int) -> PromptList:
    """A list of pictures, as `PromptList.csv` writes it and others publish: what it lacks of file names and captions, a COCO captions
    file gives, the caption by `RULE`.

    Raises ValueError for a picture that the captions file does not list, and for what neither of both says.
    """
    found = read_prompts(path)
    if all(prompt.image_id is None and prompt.file_name is None for prompt in found.prompts):
        raise ValueError(f"{path} names no pictures; a list of ids has a column image_id, coco_id, id or file_name")
    if annotations is None:
        for place, prompt in enumerate(found.prompts, start=1):
            lacking = [name for name, value in (("file_name", prompt.file_name), ("caption", prompt.text)) if not value]
            if lacking:
                raise ValueError(f"{path}: picture {place} has no {' and no '.join(lacking)}; give --annotations too")
        return found
    entries = _complete_entries(annotations)
    names = {Path(name).name: identity for identity, (name, _) in entries.items()}
    numbers: dict[Any, str] = {int(one): one for one in entries if isinstance(one, str) and one.isdecimal()}  # that are text there
    prompts, unknown = [], []
    for prompt in found.prompts:
        identity = prompt.image_id if prompt.image_id is not None else names.get(Path(prompt.file_name or "").name)
        identity = identity if identity in entries else numbers.get(identity, identity)
        if identity not in entries:
            unknown.append(f"{prompt.image_id if prompt.image_id is not None else prompt.file_name}")
            continue
        name, captions = entries[identity]
        if prompt.file_name is not None and Path(prompt.file_name).name != Path(name).name:
            raise ValueError(f"{path}: image_id {identity} is {prompt.file_name} there and {name} in {annotations}")
        prompts.append(replace(prompt, text=prompt.text or caption_of(captions, seed, identity), image_id=identity, file_name=name))
    if unknown:
        raise ValueError(f"{len(unknown):,} of the {len(found.prompts):,} pictures of {path} are not in {annotations}: {some(unknown)}")
    origin = {**found.origin, "annotations": str(annotations), "annotations_sha256": _file_sha256(annotations)}
    if not all(prompt.text for prompt in found.prompts):
        origin |= rule_of(seed)
    return PromptList(tuple(prompts), origin)


def listed_images(annotations: Path) -> list[str]:
    """The file names of all images of a COCO captions file, in its order. Raises ValueError."""
    return [name for name, _ in _complete_entries(annotations).values()]


def _complete_entries(annotations: Path) -> dict[int | str, tuple[str, list[str]]]:
    """File name and captions by image id. Raises ValueError for captions without their image, and images without captions."""
    entries, unlisted = read_captions(annotations)
    if unlisted:
        without = dict.fromkeys(identity for identity, _ in unlisted)
        raise ValueError(f"{annotations}: {len(unlisted):,} captions of images that it does not list: {some(without)}")
    found = {entry["id"]: (entry["file_name"].strip(), [words for text in texts if (words := _words(text))]) for entry, texts in entries}
    mute = [name for name, captions in found.values() if not captions]
    if mute:
        raise ValueError(f"{annotations}: {len(mute):,} of its {len(found):,} images have no caption: {some(mute)}")
    if not found:
        raise ValueError(f"{annotations} lists no images")
    return found


def _rows(file: io.StringIO, kind: str, path: Path) -> Iterator[Prompt]:
    plain = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if kind == "TSV" else csv.reader(file, strict=True)
    try:
        header = [name.strip().lower() for name in next(plain, [])]
        places = {name: header.index(found) for name, names in _COLUMNS.items() if (found := next((n for n in names if n in header), ""))}
        if not {"text", "image_id", "file_name"} & set(places):
            allowed = ", ".join(name for known in fields(Prompt) for name in _COLUMNS[known.name])
            raise ValueError(f"{path}, line 1: no column of prompts or pictures; its columns are: {', '.join(header)}; known: {allowed}")
        for cells in plain:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) < len(header):
                raise ValueError(f"{path}, line {plain.line_num}: {len(cells)} cells where the header has {len(header)} columns")
            row = {name: _words(cells[place]) for name, place in places.items()}
            identity = row.get("image_id") or None
            number = int(identity) if identity is not None and identity.isdecimal() else identity
            prompt = Prompt(row.get("text", ""), number, row.get("file_name") or None, row.get("category") or None)
            if not (prompt.text or prompt.file_name or prompt.image_id is not None):
                raise ValueError(f"{path}, line {plain.line_num}: neither a prompt nor a picture")
            yield prompt
    except csv.Error as error:
        raise ValueError(f"{path}, line {plain.line_num}: {error}") from error


def _draw(seed: int, purpose: str, identity: int | str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{identity}".encode()).digest(), "big")


def _words(text: str) -> str:
    return " ".join(text.split())


def _file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def some(names: Iterable[Any]) -> str:
    """The first few names, and how many more there are."""
    shown = [str(name) for name in names]
    return ", ".join(shown[:_LISTED]) + (f" and {len(shown) - _LISTED:,} more" if len(shown) > _LISTED else "")
