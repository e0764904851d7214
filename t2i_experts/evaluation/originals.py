"""The pictures that captions were written for, by name: files of a folder, or samples of shards."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from t2i_experts.evaluation.prompts import Prompt, PromptList, caption_of, first_by_rule, rule_of, some
from t2i_experts.shards.reader import ShardReader


class Originals(Protocol):
    """path: where they are. kind: `folder` or `shards`. identity: what is known of those that were checked without reading them, beside
    their names."""

    path: Path
    kind: str

    @property
    def identity(self) -> Mapping[str, Any]:
        """As JSON's plain values."""
        ...

    def check(self, names: Sequence[str]) -> None:
        """Raises ValueError, with their number and some of their names, for pictures that are not there."""
        ...

    def read(self, name: str) -> bytes:
        """The picture's file, for several threads at once. Raises OSError and ValueError for one that cannot be read."""
        ...


class FolderOriginals:
    """Names are paths relative to the folder. Of files of the same names in another folder, the sizes tell that they are others."""

    kind = "folder"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity: Mapping[str, Any] = {}

    def check(self, names: Sequence[str]) -> None:
        """See `Originals`."""
        sizes = " ".join(map(str, _sizes(self.path, names)))
        self.identity = {"sizes_sha256": hashlib.sha256(sizes.encode()).hexdigest()}

    def read(self, name: str) -> bytes:
        """See `Originals`."""
        return (self.path / name).read_bytes()


class ShardOriginals:
    """Names are `TAR/KEY`, the tar relative to the folder. Bytes are read by one thread at a time: the reader's open files are shared."""

    kind = "shards"

    def __init__(self, path: Path) -> None:
        """Raises ValueError as `ShardReader` does."""
        self.path = path
        self._reader = ShardReader([path], size=1, seed=0)
        self._lock = threading.Lock()
        self.identity: Mapping[str, Any] = {"dataset_sha256": self._reader.dataset_hash}

    @cached_property
    def names(self) -> Sequence[str]:
        """All of them, in the order of the shards. Raises ValueError for a tar that cannot be read."""
        return [self._reader.name(index) for index in range(self._reader.samples)]

    def check(self, names: Sequence[str]) -> None:
        """See `Originals`."""
        missing = [name for name in names if name not in self._indices]
        if missing:
            raise ValueError(f"{len(missing):,} of the {len(names):,} pictures are not in the shards of {self.path}: {some(missing)}")

    def read(self, name: str) -> bytes:
        """See `Originals`."""
        with self._lock:
            return self._reader.raw(self._indices[name]).image

    def choose(self, num: int | None, seed: int) -> PromptList:
        """One caption for each of `num` samples, by the rule of `choose_captions` with their names as ids; None is all samples.

        Raises ValueError for too large a number and for samples that cannot be read.
        """
        if num is not None and num > len(self.names):
            raise ValueError(f"--num={num}: the shards of {self.path} hold only {len(self.names):,} samples")
        prompts = []
        for name in first_by_rule(self.names, num, seed):
            captions = self._reader.raw(self._indices[name]).captions
            prompts.append(Prompt(caption_of(captions, seed, name), file_name=name))
        origin = {"kind": "shards", "path": str(self.path), **self.identity, "images": len(self.names), **rule_of(seed), "id": "TAR/KEY"}
        return PromptList(tuple(prompts), origin)

    @cached_property
    def _indices(self) -> Mapping[str, int]:
        return {name: index for index, name in enumerate(self.names)}


def _sizes(folder: Path, names: Sequence[str]) -> list[int]:
    """Of pictures in a folder, in bytes. Raises ValueError, with their number and some of their names, for those that are not there."""
    if not folder.is_dir():
        raise ValueError(f"--images={str(folder)!r} is {'not a folder' if folder.exists() else 'not there'}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{len(missing):,} of the {len(names):,} pictures are not in {folder}: {some(missing)}")
    return [(folder / name).stat().st_size for name in names]
