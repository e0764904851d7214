"""The shard format: the members of a sample in a tar, and the manifest beside the tars (`shards/README.md` says it to people)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VERSION = 1
MANIFEST = "manifest.json"
BUILD_STATE = "building.json"  # beside the tars of a build that has not ended
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_FIELDS = ("caption", "captions")

MAX_KEY_BYTES = 1024
MAX_IMAGE_BYTES = 2**28
MAX_TEXT_BYTES = 2**24
MAX_EMBEDDING_BYTES = 2**28
MAX_CAPTION_CHARACTERS = 2**14
"""What is larger is refused before it costs memory or time: an index row holds the whole key, and tokenisers read the whole caption."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def split_member(name: str) -> tuple[str, str] | None:
    """(key, extension in lower case) of a member's name; None for one that belongs to no sample.

    As in webdataset, the key ends at the first dot after the last slash, so `a/b.t5.npz` is ("a/b", "t5.npz").
    Raises ValueError for an absolute path or one with `..`.
    """
    name = name.removeprefix("./")
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        raise ValueError(f"member {name!r} has an absolute path or '..'")
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else None


def parse_captions(text: bytes | None, fields: bytes | None) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The captions and the other fields of a sample, from its `.txt` and `.json` members.

    The list `captions` of the JSON comes first; without it, the text is the one caption; without that, `caption` of the JSON.
    Numbers in the JSON that are not finite (NaN, 1e999) become null. Raises ValueError if a member is not UTF-8, if the JSON is not an
    object, if a caption is too long or not valid Unicode, or if no caption has a visible character.
    """
    metadata: dict[str, Any] = {}
    if fields is not None:
        try:
            parsed = json.loads(fields.decode("utf-8-sig"), parse_float=_finite, parse_constant=_finite)
        except UnicodeDecodeError as error:
            raise ValueError(f"its json is {not_utf8(error)}") from error
        except (ValueError, RecursionError) as error:  # plain ValueError: an integer of more than 4,300 digits
            raise ValueError(f"its json cannot be read: {error}") from error
        if not isinstance(parsed, dict):
            raise ValueError(f"its json is a {type(parsed).__name__}, not an object")
        metadata = parsed
    one, several = metadata.pop(CAPTION_FIELDS[0], None), metadata.pop(CAPTION_FIELDS[1], None)
    if several is not None:
        if not isinstance(several, list) or not all(isinstance(caption, str) for caption in several):
            raise ValueError("`captions` in its json is not a list of strings")
        found: Sequence[str] = several
    elif text is not None:
        try:
            found = [text.decode().removeprefix("\ufeff")]  # as utf-8-sig, which is no codec in C
        except UnicodeDecodeError as error:
            raise ValueError(f"its txt is {not_utf8(error)}") from error
    elif isinstance(one, str) or one is None:
        found = [one or ""]
    else:
        raise ValueError(f"`caption` in its json is a {type(one).__name__}, not a string")
    captions = tuple(caption.strip() for caption in found if caption.strip())
    if not captions:
        raise ValueError("it has no caption")
    for caption in captions:
        if len(caption) > MAX_CAPTION_CHARACTERS:
            raise ValueError(f"a caption has {len(caption):,} characters; at most {MAX_CAPTION_CHARACTERS:,} are read")
        if _SURROGATE.search(caption):
            raise ValueError("a caption is not valid Unicode: it holds half of a surrogate pair")
    return captions, metadata


def _finite(number: str) -> float | None:
    value = float(number)
    return value if math.isfinite(value) else None


def not_a_folder(folder: Path) -> str:
    """What is wrong with a shard folder that is no folder."""
    return f"{folder} is a file; name the folder that the tars are in" if folder.exists() else f"shard folder not found: {folder}"


def not_utf8(error: UnicodeDecodeError) -> str:
    """What is wrong with text that is not UTF-8, and what to do: for messages that go on after `it is`."""
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start:,}); {how_to_convert(error.object)}"


def how_to_convert(data: bytes) -> str:
    """What text that is not UTF-8 may be, and the command that converts it."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or 0 in data:
        encoding, name = "UTF-16", "utf-16"
    elif re.search(rb"[\x80-\x9f]", data):  # control characters in Latin-1, letters and quotation marks in Windows-1252
        encoding, name = "Windows-1252", "cp1252"
    else:
        encoding, name = "Latin-1", "latin1"
    return f"it may be {encoding}: convert it with iconv -f {name} -t utf-8 OLD > NEW"


def dump_fields(captions: Sequence[str], metadata: Mapping[str, Any]) -> bytes | None:
    """The `.json` member for a sample, or None if its `.txt` (the first caption) says everything."""
    reserved = sorted(set(CAPTION_FIELDS) & set(metadata))
    if reserved:
        raise ValueError(f"metadata must not hold {reserved}: captions are given apart")
    if len(captions) == 1 and not metadata:
        return None
    head = {"captions": list(captions)} if len(captions) > 1 else {"caption": captions[0]}
    text = json.dumps({**head, **metadata}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode(errors="backslashreplace")  # half surrogate pairs in metadata become JSON escapes again


@dataclass(frozen=True)
class Spread:
    """How many numbers, their smallest, largest and sum: enough to tell the mean, and two spreads add up."""

    count: int = 0
    min: int = 0
    max: int = 0
    total: int = 0

    @classmethod
    def of(cls, values: Sequence[int]) -> Spread:
        """The spread of some whole numbers."""
        return cls(len(values), min(values), max(values), sum(values)) if values else cls()

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    def __add__(self, other: Spread) -> Spread:
        if not (self.count and other.count):
            return self if self.count else other
        return Spread(self.count + other.count, min(self.min, other.min), max(self.max, other.max), self.total + other.total)


@dataclass(frozen=True)
class Statistics:
    """Captions in characters, images in pixels as stored (before an EXIF rotation)."""

    caption_characters: Spread = Spread()
    image_width: Spread = Spread()
    image_height: Spread = Spread()

    @classmethod
    def of(cls, caption_characters: Sequence[int], image_sizes: Sequence[tuple[int, int]]) -> Statistics:
        """From the lengths of all captions and the (width, height) of all images."""
        return cls(Spread.of(caption_characters), Spread.of([w for w, _ in image_sizes]), Spread.of([h for _, h in image_sizes]))

    @classmethod
    def from_plain(cls, plain: Mapping[str, Mapping[str, int]]) -> Statistics:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{name: Spread(**spread) for name, spread in plain.items()})

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.caption_characters + other.caption_characters,
            self.image_width + other.image_width,
            self.image_height + other.image_height,
        )


@dataclass(frozen=True)
class ShardEntry:
    """One tar. samples: those that are read; skipped: keys of complete samples that are left out because they are broken."""

    file: str
    samples: int
    bytes: int
    sha256: str
    skipped: tuple[str, ...] = ()

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> ShardEntry:
        """Raises ValueError, KeyError or TypeError for anything but what `dataclasses.asdict` gives."""
        entry = cls(**{**plain, "skipped": tuple(plain.get("skipped", ()))})
        whole = all(type(n) is int and n >= 0 for n in (entry.samples, entry.bytes))
        if not whole or not all(isinstance(text, str) for text in (entry.file, entry.sha256, *entry.skipped)):
            raise ValueError(f"shard {plain!r} has a field of a wrong type")
        if entry.file != os.path.basename(entry.file) or "\\" in entry.file or not entry.file.endswith(".tar"):
            raise ValueError(f"shard file {entry.file!r} must be the name of a .tar beside the manifest")
        return entry


@dataclass(frozen=True)
class EncoderRecord:
    """A text encoder whose features the tars hold, as `KEY.NAME.npz` with the name in lower case.

    kind, model, dtype, max_tokens, width, pooled_width: of its config. fingerprint: sha256 of its weights, which tells whether two are
    the same, wherever they were read from.
    """

    name: str
    kind: str
    model: str = field(compare=False)
    dtype: str = field(compare=False)
    fingerprint: str
    max_tokens: int
    width: int
    pooled_width: int

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> EncoderRecord:
        """Raises ValueError or TypeError for anything but what `dataclasses.asdict` gives."""
        record = cls(**plain)
        texts = (record.name, record.kind, record.model, record.dtype, record.fingerprint)
        numbers = (record.max_tokens, record.width, record.pooled_width)
        if not all(isinstance(text, str) for text in texts) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"embeddings {plain!r} have a field of a wrong type")
        return record

    @property
    def member(self) -> str:
        """The extension of its members."""
        return f"{self.name.lower()}.npz"


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says of a folder of tars."""

    shards: tuple[ShardEntry, ...]
    statistics: Statistics = field(default_factory=Statistics)
    embeddings: tuple[EncoderRecord, ...] = ()
    version: int = VERSION

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def hash(self) -> str:
        """sha256 of what the shards hold, in order; wherever the folder lies and whatever its files are called."""
        content = [[shard.sha256, shard.samples, list(shard.skipped)] for shard in self.shards]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes `manifest.json` at once or not at all."""
        plain = {
            "version": self.version,
            "samples": self.samples,
            "hash": self.hash,
            "statistics": dataclasses.asdict(self.statistics),
            **({"embeddings": [dataclasses.asdict(record) for record in self.embeddings]} if self.embeddings else {}),
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
        }
        write_atomically(Path(folder) / MANIFEST, [json.dumps(plain, indent=1).encode() + b"\n"])

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Raises ValueError if the folder has no manifest (and then says how to make one) or if it is damaged."""
        path = Path(folder) / MANIFEST
        if not path.parent.is_dir():
            raise ValueError(not_a_folder(path.parent))
        if not path.is_file():
            if any(path.parent.glob("*.tar")):
                raise ValueError(
                    f"{folder} has tars but no {MANIFEST}: repeat the command that was writing them; "
                    f"tars from elsewhere are adopted by `t2i-experts shards check {folder} --write-manifest`"
                )
            raise ValueError(
                f"{folder} is not a shard folder: it holds neither {MANIFEST} nor tars; make one with `t2i-experts shards build`"
            )
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
            if plain["version"] != VERSION:
                raise ValueError(f"version {plain['version']!r}, where this program reads {VERSION}")
            entries = tuple(ShardEntry.from_plain(shard) for shard in plain["shards"])
            embeddings = tuple(EncoderRecord.from_plain(record) for record in plain.get("embeddings", ()))
            manifest = cls(entries, Statistics.from_plain(plain["statistics"]), embeddings)
            if plain["samples"] != manifest.samples:
                raise ValueError(f"samples={plain['samples']!r}, where its shards have {manifest.samples}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): check the folder and write it anew") from error
        return manifest


def header_line(head: Mapping[str, Any]) -> bytes:
    """What a file beside a tar begins with: a line of JSON, padded to a multiple of 64 bytes."""
    line = json.dumps(head).encode()
    return line + b" " * (-(len(line) + 1) % 64) + b"\n"


def write_atomically(path: Path, chunks: Iterable[bytes]) -> None:
    """Writes a file under a temporary name in the same folder, syncs it to disk and renames it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
