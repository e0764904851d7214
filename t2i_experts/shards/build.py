"""From a source of captioned pictures to a folder of shards."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from t2i_experts.registry import registry
from t2i_experts.shards.build_state import BuildState, digest, refuse_other_build
from t2i_experts.shards.format import CAPTION_FIELDS, MAX_CAPTION_CHARACTERS, MAX_IMAGE_BYTES, Manifest, dump_fields
from t2i_experts.shards.images import prepare
from t2i_experts.shards.parallel import in_order
from t2i_experts.shards.sources import Record, Skipped, source_name
from t2i_experts.shards.where import Incomparable, Where
from t2i_experts.shards.writer import ShardWriter

Progress = Callable[[int, int | None], None]
"""Is told (pictures done, pictures in all); while the source is still being read, (pictures found, None)."""

_KEY_CHARACTERS = 80


@dataclass(frozen=True)
class BuildOptions:
    """samples_per_shard: in each tar but the last. resize: pixels of the shorter side to which larger pictures are shrunk.

    workers: threads that read and decode. source: the registry's name of the source, or None to go by the path.
    where: an expression of `where.Where` that a record's metadata must fulfil, or None for all.
    """

    samples_per_shard: int = 8192
    resize: int | None = None
    workers: int = 1
    source: str | None = None
    where: str | None = None


def build_shards(
    source: Path, out: Path, images: Path | None, options: BuildOptions, progress: Progress = lambda done, total: None
) -> tuple[Manifest, Skipped]:
    """Builds the shards in an empty or new folder; returns their manifest, and what was left out and why.

    Blank captions, pictures without a caption, missing and undecodable ones are left out and counted, and so are records that `where`
    does not want or that lack one of its fields. Samples are in the order of their keys, so the same pictures give the same bytes
    whatever the number of workers. A build that was killed goes on after its last complete tar when it is repeated.

    Raises ValueError if the source or `where` is malformed, if `out` is neither empty nor holds the same build unfinished, or if nothing is
    left to write.
    """
    for name, value in (("samples-per-shard", options.samples_per_shard), ("resize", options.resize), ("workers", options.workers)):
        if value is not None and value < 1:
            raise ValueError(f"--{name}={value} must be at least 1")
    if images is not None and not images.is_dir():
        raise ValueError(f"--images {images} is not a folder")
    where = None if options.where is None else Where(options.where)
    kind = options.source or source_name(source)
    read = registry.get("source", kind)
    arguments = {
        "source": str(source.resolve()),
        "kind": kind,
        "images": None if images is None else str(images.resolve()),
        "resize": options.resize,
        "samples-per-shard": options.samples_per_shard,
        "where": options.where,
    }
    refuse_other_build(out, arguments)
    skipped = Skipped()
    try:
        records, listed = _records(read(source, images, skipped), where, skipped, progress)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise ValueError(f"source {source} cannot be read as {kind}: {error}") from error
    if not records:
        raise ValueError(f"nothing to build from {source}: {listed} pictures listed; {_reasons(skipped) or 'none found'}")
    keyed = sorted(zip(keys_for([record.name for record in records]), records, strict=True), key=lambda pair: pair[0])
    with BuildState(out, arguments, digest(keyed)) as state:
        done = state.written
        pending = [(key, record) for key, record in keyed if key not in done.keys]
        progress(len(done.keys), len(keyed))
        with ShardWriter(out, samples_per_shard=options.samples_per_shard, first_shard=done.shards) as writer:
            written = len(done.keys)
            for i, (key, record, prepared) in enumerate(_prepared(pending, options), start=len(done.keys) + 1):
                if not isinstance(prepared, ValueError) and key < done.last_key:  # the interrupted build could not read it
                    prepared = ValueError("it could not be read when its tar was written")
                if isinstance(prepared, ValueError):
                    skipped.add("picture cannot be decoded", f"{record.name}: {prepared}")
                else:
                    writer.write(key, *prepared, record.captions, {"file": record.name, **record.metadata})
                    written += 1
                progress(i, len(keyed))
            if not written:
                raise ValueError(f"nothing to build from {source}: {listed} pictures listed; {_reasons(skipped)}")
    return Manifest.load(out), skipped


def keys_for(names: Sequence[str]) -> list[str]:
    """A unique key for each of some different file names: their ASCII letters, digits, `_` and `-`, and `_` for the rest.

    Names that would share a key (in a file system that takes upper and lower case as one, too) carry a hash of the whole name.
    """
    plain = [re.sub(r"[^A-Za-z0-9_-]+", "_", os.path.splitext(name)[0].strip("/"))[:_KEY_CHARACTERS] or "_" for name in names]
    shared = {key for key, count in Counter(key.lower() for key in plain).items() if count > 1}
    taken = {key for key in plain if key.lower() not in shared}
    keys = []
    for name, key in zip(names, plain, strict=True):
        if key.lower() in shared:
            digest, length = hashlib.sha256(name.encode()).hexdigest(), 8
            while f"{key}-{digest[:length]}" in taken:
                length += 1
            key = f"{key}-{digest[:length]}"
            taken.add(key)
        keys.append(key)
    return keys


def _records(found: Iterator[Record], where: Where | None, skipped: Skipped, progress: Progress) -> tuple[list[Record], int]:
    """The records that are to be built, and how many there were. Raises ValueError for a field of `where` that none of them has."""
    records: list[Record] = []
    fields: set[str] = set()
    listed = 0
    for listed, record in enumerate(found, start=1):
        if where is not None:
            fields.update(record.metadata)
        if where is None or _wanted(record, where, skipped):
            kept = _checked(record, skipped)
            records += [kept] if kept is not None else []
        progress(listed, None)
    if where is not None and listed:
        where.check_fields(fields)
    return records, listed


def _wanted(record: Record, where: Where, skipped: Skipped) -> bool:
    """Whether `where` keeps a record; a note why, if it does not."""
    lacking = where.lacking(record.metadata)
    try:
        wanted = lacking is None and where(record.metadata)
        reason = "left out by --where" if lacking is None else f"--where: no value of {lacking}"
    except Incomparable as error:
        wanted, reason = False, f"--where: {error}"
    if not wanted:
        skipped.add(reason, record.name)
    return wanted


def _checked(record: Record, skipped: Skipped) -> Record | None:
    """The record with its blank captions left out; None, and a note why, if that is not enough for a sample."""
    captions = tuple(caption.strip() for caption in record.captions if caption.strip())
    blank = len(record.captions) - len(captions)
    if not record.file.is_file():
        skipped.add("picture not found", str(record.file))
    elif not captions:
        skipped.add("picture without a caption", record.name)
    elif any("\ud800" <= character <= "\udfff" for caption in captions for character in caption):
        skipped.add("caption is not valid Unicode", record.name)
    elif any(len(caption) > MAX_CAPTION_CHARACTERS for caption in captions):
        skipped.add(f"caption of more than {MAX_CAPTION_CHARACTERS:,} characters", record.name)
    else:
        metadata = {k: v for k, v in record.metadata.items() if k not in CAPTION_FIELDS}
        try:
            dump_fields(captions, metadata)
        except (ValueError, TypeError) as error:
            skipped.add("field cannot be written as JSON", f"{record.name}: {error}")
            return None
        for _ in range(blank):
            skipped.add("blank caption", record.name)
        return dataclasses.replace(record, captions=captions, metadata=metadata)
    return None


def _prepared(keyed: Sequence[tuple[str, Record]], options: BuildOptions) -> Iterator[tuple[str, Record, tuple[bytes, str] | ValueError]]:
    """Reads and prepares the pictures in parallel and yields them in order; only a few more than the workers are in memory."""

    def load(item: tuple[str, Record]) -> tuple[str, Record, tuple[bytes, str] | ValueError]:
        key, record = item
        try:
            data, extension = prepare(record.read(), options.resize)
            if len(data) > MAX_IMAGE_BYTES:
                raise ValueError(f"it has {len(data):,} bytes; at most {MAX_IMAGE_BYTES:,} are stored; --resize makes it smaller")
            return key, record, (data, extension)
        except OSError as error:
            return key, record, ValueError(f"cannot be read: {error.strerror}")
        except ValueError as error:
            return key, record, error

    if options.workers == 1:
        yield from map(load, keyed)
        return
    with ThreadPoolExecutor(options.workers) as pool:
        try:
            yield from in_order(pool, options.workers, load, keyed)
        finally:
            pool.shutdown(cancel_futures=True)


def _reasons(skipped: Skipped) -> str:
    return "; ".join(f"{reason}: {count} ({', '.join(skipped.first[reason])})" for reason, count in skipped.counts.items())
