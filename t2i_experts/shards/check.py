"""Checks a folder of shards, this project's or another's, and writes the manifest of what is good in it."""

from __future__ import annotations

import codecs
import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from t2i_experts.shards.embeddings import unpack_features
from t2i_experts.shards.format import BUILD_STATE, MANIFEST, EncoderRecord, Manifest, ShardEntry, Statistics, not_a_folder, parse_captions
from t2i_experts.shards.images import verify
from t2i_experts.shards.index import Row, read_index_header, save_index, scan
from t2i_experts.shards.parallel import in_order

_ROWS_A_TASK = 16


@dataclass(frozen=True)
class Problem:
    """Something wrong with a tar, or with one sample of it if there is a key."""

    shard: str
    key: str | None
    detail: str


@dataclass
class CheckReport:
    """manifest: of what is good. problems: what makes the check fail. notes: what a user should know.

    left_out: broken samples that the manifest leaves out (already, or from now on), so that training never meets them.
    """

    folder: str
    manifest: Manifest
    problems: list[Problem] = field(default_factory=list)
    left_out: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Sample:
    """What decoding one sample shows."""

    key: str
    caption_characters: tuple[int, ...] = ()
    size: tuple[int, int] = (0, 0)
    digest: bytes = b""
    byte_order_mark: bool = False
    problem: str | None = None


@dataclass(frozen=True)
class _Tar:
    """What one tar holds.

    digests: of the pictures' bytes, one for each of `rows`. byte_order_marks: caption files that begin with one. broken: samples whose
    image or caption cannot be read. incomplete: those without one of them.
    """

    entry: ShardEntry
    statistics: Statistics
    rows: tuple[Row, ...]
    digests: tuple[bytes, ...]
    byte_order_marks: int
    broken: tuple[Problem, ...]
    incomplete: tuple[Problem, ...]
    unsorted: str | None


def check_shards(
    folder: Path, *, write_manifest: bool = False, workers: int = 1, progress: Callable[[int, int], None] = lambda done, total: None
) -> CheckReport:
    """Reads every byte of every tar, decodes every image, caption and embedding, and compares all with the manifest if there is one.

    With `write_manifest`, writes a manifest (and the index files) of the good samples; it names the broken ones, which are then left
    out. `workers` threads decode. `progress` is told (samples done, samples in the tars begun so far).

    Raises ValueError if the folder holds no tars, if its manifest is damaged and is not to be written anew, and if
    `write_manifest` finds no good sample at all.
    """
    paths = sorted(folder.glob("[!.]*.tar"))
    if not paths:
        raise ValueError(f"{folder} holds no tars" if folder.is_dir() else not_a_folder(folder))
    if write_manifest and (folder / BUILD_STATE).is_file():
        raise ValueError(f"{folder} holds an unfinished build, and no manifest is written of it: repeat the command that was building it")
    if workers < 1:
        raise ValueError(f"--workers={workers} must be at least 1")
    known: dict[str, ShardEntry] = {}
    report = CheckReport(str(folder), Manifest(()))
    if not write_manifest and (folder / MANIFEST).is_file():
        known = {entry.file: entry for entry in Manifest.load(folder).shards}
    elif not write_manifest:
        report.problems.append(
            Problem(
                MANIFEST,
                None,
                "is missing, and training needs it: repeat the command that was writing these tars, or adopt them with --write-manifest",
            )
        )
    embeddings = _recorded_embeddings(folder, paths)
    tars: list[_Tar] = []
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        for path in paths:
            try:
                if not path.is_file():  # opening a pipe would wait for ever
                    raise ValueError("is no file")
                tar = _check_tar(path, embeddings, pool, workers, functools.partial(_after, done, progress))
            except ValueError as error:
                report.problems.append(Problem(path.name, None, str(error).removeprefix(f"{path}: ")))
                continue
            tars.append(tar)
            done += len(tar.rows) + len(tar.broken)
    for tar in tars:
        entry = known.get(tar.entry.file)
        expected = tar.entry.skipped if write_manifest else entry.skipped if entry else ()
        for problem in tar.broken:
            (report.left_out if problem.key in expected else report.problems).append(problem)
        (report.left_out if write_manifest or entry else report.problems).extend(tar.incomplete)
        if known:
            report.problems += _differences(entry, tar.entry)
    for name in sorted(set(known) - {path.name for path in paths}):
        report.problems.append(Problem(name, None, "is in the manifest, but there is no such file"))
    report.notes = [*_notes(tars), *_unknown_embeddings(tars, embeddings)]
    report.manifest = Manifest(tuple(tar.entry for tar in tars), sum((tar.statistics for tar in tars), Statistics()), embeddings)
    if write_manifest:
        _write(folder, report, tars)
    return report


def _write(folder: Path, report: CheckReport, tars: Iterable[_Tar]) -> None:
    if not report.manifest.samples:
        found = [*report.problems, *report.left_out]
        first = f", such as {found[0].shard}{f' {found[0].key!r}' if found[0].key else ''}: {found[0].detail}" if found else ""
        count = f"{len(found)} problem{'' if len(found) == 1 else 's'}"
        raise ValueError(f"no manifest written for {folder}: it has no good sample, and {count}{first}")
    for tar in tars:
        head = read_index_header(folder / tar.entry.file) or {}
        save_index(folder, tar.entry, tar.statistics, tar.rows, report.manifest.embeddings, head.get("source"))
    report.manifest.save(folder)


def _recorded_embeddings(folder: Path, tars: Iterable[Path]) -> tuple[EncoderRecord, ...]:
    """The encoders whose embeddings the tars hold: as the manifest says, or an index file if the manifest is missing or damaged."""
    try:
        return Manifest.load(folder).embeddings
    except ValueError:
        heads = (read_index_header(tar) for tar in tars)
        return next((head["embeddings"] for head in heads if head is not None and head["embeddings"]), ())


def _unknown_embeddings(tars: Iterable[_Tar], embeddings: Sequence[EncoderRecord]) -> Iterator[str]:
    """A note for each kind of .npz members that no record says the encoder of."""
    known = {record.member for record in embeddings}
    unknown = Counter(extension for tar in tars for row in tar.rows for extension in row.embeddings if extension not in known)
    for extension, count in sorted(unknown.items()):
        yield f"{count:,} samples have members .{extension}, and the manifest does not say of which encoder: they are never read"


def _check_tar(
    path: Path, embeddings: Sequence[EncoderRecord], pool: ThreadPoolExecutor, workers: int, progress: Callable[[int, int], None]
) -> _Tar:
    """Raises ValueError for a tar that cannot be read or must not be."""
    digest = pool.submit(_sha256, path)
    found = scan(path)
    pieces = (found.rows[i : i + _ROWS_A_TASK] for i in range(0, len(found.rows), _ROWS_A_TASK))
    samples: list[_Sample] = []
    progress(0, len(found.rows))
    for piece in in_order(pool, workers, functools.partial(_read_samples, path, embeddings), pieces):
        samples += piece
        progress(len(samples), len(found.rows))
    good = [sample for sample in samples if sample.problem is None]
    broken = tuple(Problem(path.name, sample.key, sample.problem) for sample in samples if sample.problem is not None)
    skipped = tuple(sample.key for sample in samples if sample.problem is not None)
    return _Tar(
        ShardEntry(path.name, len(good), path.stat().st_size, digest.result(), skipped),
        Statistics.of([n for sample in good for n in sample.caption_characters], [sample.size for sample in good]),
        tuple(row for row, sample in zip(found.rows, samples, strict=True) if sample.problem is None),
        tuple(sample.digest for sample in good),
        sum(sample.byte_order_mark for sample in good),
        broken,
        tuple(Problem(path.name, key, detail) for key, detail in found.incomplete),
        found.unsorted,
    )


def _after(before: int, progress: Callable[[int, int], None], done: int, total: int) -> None:
    progress(before + done, before + total)


def _notes(tars: Sequence[_Tar]) -> Iterator[str]:
    """What is no obstacle here, but may be elsewhere."""
    keys: dict[str, str] = {}
    pictures: dict[bytes, str] = {}
    repeated: list[str] = []
    copies: list[str] = []
    marks = 0
    for tar in tars:
        file = tar.entry.file
        if tar.unsorted is not None:
            yield (
                f"{tar.entry.file} is not sorted: the members of {tar.unsorted!r} do not stand together. They are read correctly "
                "here; readers that go through a tar from its beginning would see two halves"
            )
        marks += tar.byte_order_marks
        for row, digest in zip(tar.rows, tar.digests, strict=True):
            here = f"{row.key!r} in {file}"
            if keys.setdefault(row.key, file) != file:
                repeated.append(f"{row.key!r} in {keys[row.key]} and {file}")
            if (first := pictures.setdefault(digest, here)) is not here:
                copies.append(f"{here} of {first}")
    if repeated:
        yield f"{len(repeated):,} keys occur in more than one tar, such as {repeated[0]}; each is a sample of its own here"
    if copies:
        yield f"{len(copies):,} pictures are copies, byte for byte, of earlier ones, such as {copies[0]}"
    wrong = sum("not UTF-8" in problem.detail for tar in tars for problem in tar.broken)
    if wrong:
        yield f"{wrong:,} samples have captions that are not UTF-8: convert them, and they can be read"
    if marks:
        yield f"{marks:,} captions begin with a byte-order mark, which is passed over"


def _differences(known: ShardEntry | None, found: ShardEntry) -> Iterator[Problem]:
    """Where a tar is not what the manifest says of it."""
    if known is None:
        yield Problem(found.file, None, "is not in the manifest, so that it is never read")
    elif known.bytes != found.bytes:
        yield Problem(found.file, None, f"has {found.bytes} bytes where the manifest says {known.bytes}")
    elif known.sha256 != found.sha256:
        yield Problem(found.file, None, f"has sha256 {found.sha256} where the manifest says {known.sha256}: its content has changed")


def _sha256(tar: Path) -> str:
    with open(tar, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_samples(tar: Path, embeddings: Sequence[EncoderRecord], rows: Iterable[Row]) -> list[_Sample]:
    """Reads and decodes some samples of a tar."""
    found = []
    file = os.open(tar, os.O_RDONLY)
    try:
        for row in rows:
            try:
                row.check_sizes()
                image, text, fields = (
                    os.pread(file, place[1], place[0]) if place[0] else None for place in (row.image, row.text, row.fields)
                )
                captions, _ = parse_captions(text, fields)
                size, digest = verify(image or b""), hashlib.blake2b(image or b"", digest_size=16).digest()
                for record in embeddings:
                    _check_embedding(file, row, record, len(captions))
                marked = codecs.BOM_UTF8 in ((text or b"")[:3], (fields or b"")[:3])
                found.append(_Sample(row.key, tuple(len(caption) for caption in captions), size, digest, marked))
            except (ValueError, OSError) as error:
                found.append(_Sample(row.key, problem=str(error)))
    finally:
        os.close(file)
    return found


def _check_embedding(file: int, row: Row, record: EncoderRecord, captions: int) -> None:
    """Raises ValueError unless the sample has a finite embedding of each of its captions by this encoder."""
    offset, size = row.embeddings.get(record.member, (0, 0))
    if not offset:
        raise ValueError(f"it has no {record.member}, where the manifest promises embeddings of {record.name}")
    for features in unpack_features(os.pread(file, size, offset), record, captions):
        if not all(bool(part.isfinite().all()) for part in (features.tokens, features.pooled) if part is not None):
            raise ValueError(f"its {record.member} holds what is not finite")
