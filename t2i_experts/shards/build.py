"""From a source of captioned pictures to a folder of shards."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from t2i_experts.registry import registry
from t2i_experts.shards.format import CAPTION_FIELDS, MAX_CAPTION_CHARACTERS, MAX_IMAGE_BYTES, Manifest
from t2i_experts.shards.images import prepare
from t2i_experts.shards.sources import Record, Skipped, source_name
from t2i_experts.shards.writer import ShardWriter

Progress = Callable[[int, int], None]
"""Is told (pictures done, pictures in all)."""

_KEY_CHARACTERS = 80


@dataclass(frozen=True)
class BuildOptions:
    """samples_per_shard: in each tar but the last. resize: pixels of the shorter side to which larger pictures are shrunk.

    workers: threads that read and decode (Pillow lets go of Python's lock meanwhile, so they keep as many cores busy).
    source: the registry's name of the source, or None to go by the path.
    """

    samples_per_shard: int = 8192
    resize: int | None = None
    workers: int = 1
    source: str | None = None


def build_shards(
    source: Path, out: Path, images: Path | None, options: BuildOptions, progress: Progress = lambda done, total: None
) -> tuple[Manifest, Skipped]:
    """Builds the shards in an empty or new folder; returns their manifest, and what was left out and why.

    Blank captions, pictures without a caption, missing and undecodable ones are left out and counted. Samples are in the order
    of their keys, so the same pictures give the same bytes whatever the number of workers.

    Raises ValueError if the source is malformed, if `out` is not empty, or if nothing is left to write.
    """
    for name, value in (("samples-per-shard", options.samples_per_shard), ("resize", options.resize), ("workers", options.workers)):
        if value is not None and value < 1:
            raise ValueError(f"--{name}={value} must be at least 1")
    if images is not None and not images.is_dir():
        raise ValueError(f"--images {images} is not a folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder that is empty or new")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty: name another folder, or delete this one first if it may go")
    skipped = Skipped()
    read = registry.get("source", options.source or source_name(source))
    found = list(read(source, images, skipped))
    records = [record for record in (_checked(record, skipped) for record in found) if record is not None]
    if not records:
        raise ValueError(f"nothing to build from {source}: {len(found)} pictures listed; {_reasons(skipped) or 'none found'}")
    keyed = sorted(zip(keys_for([record.name for record in records]), records, strict=True), key=lambda pair: pair[0])
    written = 0
    progress(0, len(keyed))
    with ShardWriter(out, samples_per_shard=options.samples_per_shard) as writer:
        for done, (key, record, prepared) in enumerate(_prepared(keyed, options), start=1):
            if isinstance(prepared, ValueError):
                skipped.add("picture cannot be decoded", f"{record.name}: {prepared}")
            else:
                metadata = {k: v for k, v in record.metadata.items() if k not in CAPTION_FIELDS}
                writer.write(key, *prepared, record.captions, {"file": record.name, **metadata})
                written += 1
            progress(done, len(keyed))
        if not written:
            raise ValueError(f"nothing to build from {source}: {len(found)} pictures listed; {_reasons(skipped)}")
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
        for _ in range(blank):
            skipped.add("blank caption", record.name)
        return Record(record.name, record.file, captions, record.metadata)
    return None


def _prepared(keyed: Sequence[tuple[str, Record]], options: BuildOptions) -> Iterator[tuple[str, Record, tuple[bytes, str] | ValueError]]:
    """Reads and prepares the pictures in parallel and yields them in order; only a few more than the workers are in memory."""

    def load(record: Record) -> tuple[bytes, str] | ValueError:
        try:
            data, extension = prepare(record.file.read_bytes(), options.resize)
            if len(data) > MAX_IMAGE_BYTES:
                return ValueError(f"it has {len(data):,} bytes; at most {MAX_IMAGE_BYTES:,} are stored; --resize makes it smaller")
            return data, extension
        except OSError as error:
            return ValueError(f"cannot be read: {error.strerror}")
        except ValueError as error:
            return error

    if options.workers == 1:
        for key, record in keyed:
            yield key, record, load(record)
        return
    waiting: deque[tuple[str, Record, Future[tuple[bytes, str] | ValueError]]] = deque()
    with ThreadPoolExecutor(options.workers) as pool:
        try:
            for key, record in keyed:
                waiting.append((key, record, pool.submit(load, record)))
                if len(waiting) > 4 * options.workers:
                    first = waiting.popleft()
                    yield first[0], first[1], first[2].result()
            for key, record, future in waiting:
                yield key, record, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _reasons(skipped: Skipped) -> str:
    return "; ".join(f"{reason}: {count} ({', '.join(skipped.first[reason])})" for reason, count in skipped.counts.items())
