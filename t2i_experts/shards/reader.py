"""Reads samples of local shards at random, by offset, in the global order."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from t2i_experts.shards.buckets import BucketOrder, Buckets, nearest_bucket
from t2i_experts.shards.embeddings import common_records, unpack_features
from t2i_experts.shards.format import Manifest, ShardEntry, parse_captions
from t2i_experts.shards.index import IndexFile, Row, check_tar, open_index
from t2i_experts.shards.order import GlobalOrder, PositionDraws
from t2i_experts.shards.sizes import picture_sizes
from t2i_experts.shards.transforms import decode_image
from t2i_experts.types import TextFeatures

_OPEN_FILES = 256
_ATTEMPTS = 16
_RETRY_AFTER = (0.1, 1.0)  # seconds


@dataclass(frozen=True)
class Unreadable:
    """What cannot be read, and why. shard: path or URL of its tar. key: the sample's, or None if the tar as a whole cannot be read.

    draws: how many samples it counts as; more than one for the rest of a tar that is read as a stream.
    """

    shard: str
    key: str | None
    why: str
    draws: int = 1


class UnreadableSample(ValueError):
    """A sample that cannot be read; `what` says it in parts."""

    def __init__(self, what: Unreadable) -> None:
        self.what = what
        where = what.shard if what.key is None else f"{what.shard}: sample {what.key!r}"
        remedy = f"`t2i-experts shards check {Path(what.shard).parent} --write-manifest` leaves out what is broken"
        super().__init__(f"{where}: {what.why}; {remedy}")


@dataclass(frozen=True)
class Sample:
    """position: in the global order (or the index, for `ShardReader.item`). image: (3, height, width) uint8, RGB.

    metadata: the fields of the sample's JSON but for its captions. unreadable: what was drawn before for this position and could not
    be read; this sample stands in for it. features: of the caption, by encoder, if the reader was asked for stored embeddings.
    """

    position: int
    key: str
    image: Tensor
    caption: str
    metadata: dict[str, Any]
    unreadable: tuple[Unreadable, ...] = ()
    features: Mapping[str, TextFeatures] = field(default_factory=dict)


@dataclass(frozen=True)
class RawSample:
    """A sample as it is stored. shard: path of its tar. image: the bytes of the picture file.

    features: by encoder, of each caption, if the reader was asked for stored embeddings.
    """

    shard: Path
    key: str
    image: bytes
    captions: tuple[str, ...]
    metadata: dict[str, Any]
    features: Mapping[str, Sequence[TextFeatures]] = field(default_factory=dict)


class ShardReader:
    """The samples of some shard folders, each with a manifest, as one dataset.

    `reader[position]` follows the infinite global order, a pure function of (dataset_hash, seed, position): how many processes and
    workers read it, and where they begin, changes nothing. Files are opened when they are first read, in each process for itself,
    so that a reader can be pickled and forked.

    A sample that cannot be read is replaced by another one, drawn by `GlobalOrder.substitute`, which names it: as long as the files stay
    as they are, whether broken or not, that too is the same everywhere.
    """

    def __init__(
        self,
        folders: Sequence[str | Path],
        *,
        size: int,
        seed: int,
        embeddings: Sequence[str] = (),
        buckets: Buckets | None = None,
        progress: bool = False,
    ) -> None:
        """size: pixels of the square images. embeddings: names of the encoders whose stored features samples are to bring.

        buckets: the shapes of the images, instead, and of the global batches; see `BucketOrder`. The sizes of all pictures are then
        read first unless they are known (see `shard_sizes`), with a bar if `progress`.

        Raises ValueError for a missing or damaged manifest, for a tar that is missing or has not the manifest's size, if there is no
        sample at all, and if a folder lacks the embeddings or two folders have them of different encoders.
        """
        if isinstance(folders, (str, Path)):
            raise ValueError(f"folders={folders!r} must be a list of folders")
        if size < 1:
            raise ValueError(f"size={size} must be positive")
        self.size = size
        self.seed = seed
        manifests = [(Path(folder), Manifest.load(folder)) for folder in folders]
        self.embeddings = common_records({str(folder): manifest.embeddings for folder, manifest in manifests}, embeddings)
        self._shards: list[tuple[Path, ShardEntry]] = [(folder, entry) for folder, manifest in manifests for entry in manifest.shards]
        for folder, entry in self._shards:
            check_tar(folder, entry)
        self._tars = [folder / entry.file for folder, entry in self._shards]
        self._ends = list(itertools.accumulate(entry.samples for _, entry in self._shards))
        self.samples = self._ends[-1] if self._ends else 0
        if not self.samples:
            raise ValueError(f"no samples in the shard folders {[str(folder) for folder in folders]}")
        self.dataset_hash = hashlib.sha256("\n".join(manifest.hash for _, manifest in manifests).encode()).hexdigest()
        self.buckets = buckets
        self.order: GlobalOrder | BucketOrder
        if buckets is None:
            self.order = GlobalOrder(self.samples, self.dataset_hash, seed)
        else:
            sizes = picture_sizes(self._shards, progress=progress)
            self._bucket_of = np.concatenate([nearest_bucket(shard, buckets.shapes) for shard in sizes])
            self.order = BucketOrder(self._bucket_of, buckets, self.dataset_hash, seed)
        self._caption_draws = PositionDraws(seed, "caption")
        self._indices: dict[int, IndexFile | tuple[Row, ...] | Unreadable] = {}
        self._files: OrderedDict[str, int] = OrderedDict()

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position of the global order, or its first substitute that can be read, with one of its captions.

        Raises ValueError if sixteen samples in a row cannot be read.
        """
        unreadable: list[Unreadable] = []
        while len(unreadable) < _ATTEMPTS:
            try:
                index = self.order.substitute(position, len(unreadable)) if unreadable else self.order[position]
                raw = self.raw(index)
                several = len(raw.captions) > 1
                choice = int(self._caption_draws.at(position).integers(len(raw.captions))) if several else 0
                sample = self._sample(position, raw, choice, self.shape(index))
                return replace(sample, unreadable=tuple(unreadable)) if unreadable else sample
            except UnreadableSample as error:
                unreadable.append(error.what)
        raise ValueError(f"{UnreadableSample(unreadable[0])}. Nor can {_ATTEMPTS - 1} others be read that were drawn in its place")

    def item(self, index: int) -> Sample:
        """The sample at an index in [0, samples) of the dataset's own order (folders, tars, keys), with its first caption.

        Raises IndexError, and UnreadableSample for one that cannot be read.
        """
        raw = self.raw(index)
        return self._sample(index, raw, 0, self.shape(index))

    def shape(self, index: int) -> tuple[int, int]:
        """(width, height) of the image of the sample at an index of the dataset's own order."""
        return (self.size, self.size) if self.buckets is None else self.buckets.shapes[self._bucket_of[index]]

    def bucket_samples(self) -> dict[str, int]:
        """How many samples each bucket has, by its name WIDTHxHEIGHT; empty without buckets."""
        if self.buckets is None:
            return {}
        counts = np.bincount(self._bucket_of, minlength=len(self.buckets.shapes)).tolist()
        return {f"{width}x{height}": count for (width, height), count in zip(self.buckets.shapes, counts, strict=True)}

    def raw(self, index: int) -> RawSample:
        """The sample at an index of the dataset's own order, not decoded. Raises as `item` does."""
        shard, row = self._place(index)
        tar = self._tars[shard]
        path = str(tar)
        try:
            row.check_sizes()
            image, text, fields = self._read(path, *row.image), self._read(path, *row.text), self._read(path, *row.fields)
            captions, metadata = parse_captions(text if row.text[0] else None, fields if row.fields[0] else None)
            features = {
                record.name: unpack_features(self._read(path, *row.embeddings.get(record.member, (0, 0))), record, len(captions))
                for record in self.embeddings
            }
        except (ValueError, OSError) as error:
            raise UnreadableSample(Unreadable(str(tar), row.key, str(error))) from error
        return RawSample(tar, row.key, image, captions, metadata, features)

    def name(self, index: int) -> str:
        """What no other sample of its folder is called: the tar's file and the key, `00000.tar/000123`. Raises as `item` does."""
        shard, row = self._place(index)
        return f"{self._shards[shard][1].file}/{row.key}"

    def _place(self, index: int) -> tuple[int, Row]:
        if not 0 <= index < self.samples:
            raise IndexError(f"index {index} is not in [0, {self.samples})")
        shard = bisect.bisect_right(self._ends, index)
        return shard, self._row(shard, index - self._ends[shard] + self._shards[shard][1].samples)

    def _sample(self, position: int, raw: RawSample, caption: int, shape: tuple[int, int]) -> Sample:
        try:
            image = decode_image(raw.image, *shape)
        except ValueError as error:
            raise UnreadableSample(Unreadable(str(raw.shard), raw.key, str(error))) from error
        features = {name: rows[caption] for name, rows in raw.features.items()}
        return Sample(position, raw.key, image, raw.captions[caption], raw.metadata, features=features)

    def _row(self, shard: int, i: int) -> Row:
        """Where sample i of a shard lies, from its index file, or from a scan of the tar; what a scan finds or misses is kept in memory."""
        for _ in range(2):
            index = self._index(shard)
            if isinstance(index, tuple):
                return index[i]
            if isinstance(index, Unreadable):
                raise UnreadableSample(index)
            try:
                return index.unpack(self._read(str(index.path), *index.place(i)))
            except (ValueError, OSError) as error:
                del self._indices[shard]  # the index file has been deleted or cut since it was opened: it is found anew
                broken = _unreadable_tar(self._tars[shard], error)
        raise UnreadableSample(broken)

    def _index(self, shard: int) -> IndexFile | tuple[Row, ...] | Unreadable:
        folder, entry = self._shards[shard]
        if shard not in self._indices:
            try:
                self._indices[shard] = open_index(folder, entry, self.embeddings)
            except OSError as error:
                return _unreadable_tar(folder / entry.file, error)  # may pass, unlike what a scan misses
            except ValueError as error:
                self._indices[shard] = _unreadable_tar(folder / entry.file, error)
        return self._indices[shard]

    def _read(self, path: str, offset: int, length: int) -> bytes:
        """Bytes of a file, none at offset 0, where no member lies. A file system that fails is asked again twice."""
        if not offset:
            return b""
        for seconds in _RETRY_AFTER:
            try:
                return self._read_once(path, offset, length)
            except FileNotFoundError:
                raise
            except OSError:
                if path in self._files:
                    os.close(self._files.pop(path))
                time.sleep(seconds)
        return self._read_once(path, offset, length)

    def _read_once(self, path: str, offset: int, length: int) -> bytes:
        """Reads through a file that stays open, as the most recently used ones do."""
        if path in self._files:
            self._files.move_to_end(path)
        else:
            self._files[path] = os.open(path, os.O_RDONLY)
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        data = os.pread(self._files[path], length, offset)
        if len(data) != length:
            raise ValueError(f"{path} ends within it ({len(data)} of {length} bytes)")
        return data

    def close(self) -> None:
        """Closes the files; they are opened again when something is read."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indices": {}, "_files": OrderedDict()}


def _unreadable_tar(tar: Path, error: Exception) -> Unreadable:
    return Unreadable(str(tar), None, str(error).removeprefix(str(tar)).lstrip(": "))
