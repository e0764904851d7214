"""Adds the embeddings of all captions to shards: a folder is copied, tar by tar, into a new one whose samples bring them.

The tar is the unit of work. Processes share the tars out by their numbers and never speak to each other; a tar gets its name when it is
whole, and whoever finds the last one in its place writes the manifest. So any process may be killed and started again, alone.
"""

from __future__ import annotations

import fcntl
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from t2i_experts.shards.embeddings import pack_features, refuse_other_encoders
from t2i_experts.shards.format import MANIFEST, EncoderRecord, Manifest, ShardEntry, parse_captions
from t2i_experts.shards.images import STORED, open_image
from t2i_experts.shards.index import IndexFile, Row, open_index, read_index_header
from t2i_experts.shards.reader import Unreadable
from t2i_experts.shards.writer import TarWriter, write_manifest
from t2i_experts.types import TextFeatures

_SAMPLES_AT_ONCE = 512
_BYTES_AT_ONCE = 2**26
"""Of samples that are read, and their captions encoded, at once, whichever is reached first."""

Encode = Callable[[Sequence[str]], Mapping[str, Sequence[TextFeatures]]]
"""Captions to the features of each of them, by encoder."""


@dataclass
class EmbedResult:
    """What one process did.

    tars, samples, captions: that it wrote now. tokens, bytes: by encoder, features written and the size of their members.
    unreadable: samples that are left out. manifest: of the whole folder, or None as long as other processes have tars to write.
    """

    tars: int = 0
    samples: int = 0
    captions: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    unreadable: list[Unreadable] = field(default_factory=list)
    manifest: Manifest | None = None


@dataclass(frozen=True)
class _Sample:
    """A sample on its way: its members by extension, the image first."""

    key: str
    members: dict[str, bytes]
    captions: tuple[str, ...]
    size: tuple[int, int]


def embed_shards(
    folder: Path,
    out: Path,
    records: Sequence[EncoderRecord],
    encode: Encode,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EmbedResult:
    """Writes the tars of `folder` with numbers rank, rank + world_size, ... into `out`, with the features that `encode` gives.

    Image, JSON and text are copied byte for byte, embeddings that are there already are replaced, and a sample that cannot be read is
    left out and named. What is in `out` already stays, so that the same call goes on where it was killed, and the bytes are the same.
    `progress` is told (samples done, samples of this process's tars).

    Raises ValueError if `out` is `folder` or holds anything but tars made from these by these encoders, if two encoders' names differ
    in nothing but case, and if another process is writing the same tar.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} must lie in [0, world-size) = [0, {world_size})")
    members = [record.member for record in records]
    if len(set(members)) < len(members):
        raise ValueError(f"the encoders {', '.join(record.name for record in records)} have names that differ in nothing but case")
    source = Manifest.load(folder)
    if out.resolve() == folder.resolve():
        raise ValueError(f"--out {out} is the folder itself; name another one: a run that reads shards must not see them change")
    _refuse_other(out, source, records)
    out.mkdir(parents=True, exist_ok=True)
    mine = source.shards[rank::world_size]
    total = sum(entry.samples for entry in mine)
    result, done = EmbedResult(), 0
    progress(0, total)
    for entry in mine:
        if not (out / entry.file).is_file():
            with _locked(out / f".{entry.file}.lock"):
                if not (out / entry.file).is_file():  # another process may have written it meanwhile
                    _embed_tar(folder, entry, out, records, encode, result, functools.partial(_after, done, total, progress))
        done += entry.samples
        progress(done, total)
    if all((out / entry.file).is_file() for entry in source.shards):
        for leftover in (*out.glob(".*.lock"), *out.glob(".*.tar.partial")):
            leftover.unlink(missing_ok=True)
        result.manifest = write_manifest(out)
    return result


def _after(before: int, total: int, progress: Callable[[int, int], None], done: int) -> None:
    progress(before + done, total)


def _refuse_other(out: Path, source: Manifest, records: Sequence[EncoderRecord]) -> None:
    """Raises ValueError unless all that `out` holds was made from this source by these encoders."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder that is empty or new")
    made_from = {entry.file: entry.sha256 for entry in source.shards}
    for path in sorted(out.glob("[!.]*")):
        if path.suffix == ".tar":
            head = read_index_header(path)
            if head is None and path.name in made_from:
                raise ValueError(f"--out {out} holds {path.name} without its .index file, which says what it was made from; delete the tar")
            if head is None or path.name not in made_from or head.get("source") != made_from[path.name]:
                raise ValueError(f"--out {out} holds {path.name}, which was not made from this source: name another folder")
            refuse_other_encoders(f"--out {out}", head["embeddings"], records, "name another folder")
        elif path.suffix not in (".index", ".sizes") and path.name != MANIFEST:
            raise ValueError(f"--out {out} is not empty: it holds {path.name}; name another folder")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other processes of this host from the same work. The file goes when the work is done, and may stay when it fails."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            name = path.name.removeprefix(".").removesuffix(".lock")
            raise ValueError(f"another process is writing {path.parent / name}: give each its own --rank") from None
        except OSError:  # a file system without locks
            pass
        yield
        path.unlink(missing_ok=True)


def _embed_tar(
    folder: Path,
    entry: ShardEntry,
    out: Path,
    records: Sequence[EncoderRecord],
    encode: Encode,
    result: EmbedResult,
    progress: Callable[[int], None],
) -> None:
    """Writes one tar, and adds what it holds to `result`. `progress` is told the samples done."""
    index = open_index(folder, entry)
    rows = index.rows() if isinstance(index, IndexFile) else index
    writer = TarWriter(out / entry.file, records, entry.sha256)
    try:
        done = 0
        for some in _chunks(rows):
            samples = list(_read(folder / entry.file, some, result.unreadable))
            features = encode([caption for sample in samples for caption in sample.captions])
            at = 0
            for sample in samples:
                here = slice(at, at + len(sample.captions))
                for record in records:
                    rows_of = features[record.name][here]
                    sample.members[record.member] = pack_features(rows_of)
                    result.tokens[record.name] = result.tokens.get(record.name, 0) + sum(len(f.tokens) for f in rows_of)
                    result.bytes[record.name] = result.bytes.get(record.name, 0) + len(sample.members[record.member])
                writer.add(sample.key, sample.members, [len(caption) for caption in sample.captions], sample.size)
                at = here.stop
            result.samples += len(samples)
            result.captions += at
            done += len(some)
            progress(done)
        writer.finish()
    except BaseException:
        writer.abandon()
        raise
    result.tars += 1


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows in their order, so many at a time as may be read at once, and at least one."""
    chunk: list[Row] = []
    held = 0
    for row in rows:
        size = row.image[1] + row.text[1] + row.fields[1]
        if chunk and (len(chunk) == _SAMPLES_AT_ONCE or held + size > _BYTES_AT_ONCE):
            yield chunk
            chunk, held = [], 0
        chunk.append(row)
        held += size
    if chunk:
        yield chunk


def _read(tar: Path, rows: Sequence[Row], unreadable: list[Unreadable]) -> Iterator[_Sample]:
    """The samples of these rows, but for those that are broken, which are noted. Raises OSError, which names the tar, if reading fails."""
    with open(tar, "rb") as file:
        for row in rows:
            try:
                row.check_sizes()
                image, text, fields = (
                    os.pread(file.fileno(), place[1], place[0]) if place[0] else None for place in (row.image, row.text, row.fields)
                )
                captions, _ = parse_captions(text, fields)
                with open_image(image or b"") as picture:
                    extension, size = STORED[picture.format or ""], picture.size
            except ValueError as error:
                unreadable.append(Unreadable(str(tar), row.key, str(error)))
                continue
            except OSError as error:  # which may pass: the sample is not left out for good
                raise OSError(error.errno, error.strerror, str(tar)) from error
            members = {extension: image, "json": fields, "txt": text}
            yield _Sample(row.key, {name: data for name, data in members.items() if data is not None}, captions, size)
