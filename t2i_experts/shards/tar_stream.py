"""One tar as a stream of samples, from its first byte to its last, with retries.

Not webdataset's iterator (1.0.2): that reads members of any size into memory, takes a tar that was cut off between two members or has a
damaged header for a whole one, and does not see that a pipe's command failed.
"""

from __future__ import annotations

import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

from t2i_experts.shards.format import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES, MAX_TEXT_BYTES
from t2i_experts.shards.index import BAD_KEY, bad_key, compression, sample_member, sample_row, walk, what_lacks
from t2i_experts.shards.reader import Unreadable
from t2i_experts.shards.urls import ByteStream, is_gone, open_url

RETRY_AFTER = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further attempt to read a tar."""

_READ = (*IMAGE_EXTENSIONS, "txt", "json")
_BLOCK = 512
_CHUNK = 2**20


@dataclass(frozen=True)
class StreamedSample:
    """A sample as it is stored. tar: its URL. image: the bytes of the picture file; text, fields: of its txt and json, None without."""

    tar: str
    key: str
    image: bytes
    text: bytes | None
    fields: bytes | None

    @property
    def bytes(self) -> int:
        """What it occupies."""
        return len(self.image) + len(self.text or b"") + len(self.fields or b"")


def read_tar(url: str, *, patient: bool = True) -> Iterator[StreamedSample | Unreadable]:
    """The samples of a tar in their order there, and what is wrong with those that are broken.

    patient: with further attempts, after `RETRY_AFTER`.

    An attempt that fails in the middle is followed by one that begins anew and passes over what has been given already. When the last has
    failed too, the end is an Unreadable of the whole tar; that comes sooner if there is no such file, or the same damage twice.
    """
    given, before = 0, ""
    for seconds in (*(RETRY_AFTER if patient else ()), None):
        try:
            with open_url(url) as stream:
                for i, found in enumerate(read_samples(url, stream)):
                    if i == given:
                        given += 1
                        yield found
            if not given:
                yield Unreadable(url, None, "it holds no samples")
            return
        except MemoryError:
            raise
        except Exception as error:  # fsspec's file systems raise errors of the libraries that they stand on
            why = str(error) or type(error).__name__
            damaged = isinstance(error, (ValueError, tarfile.TarError)) and why == before
            if seconds is None or damaged or is_gone(error):
                after = f" (after {given:,} samples, which were read)" if given else ""
                yield Unreadable(url, None, why + after)
                return
            before = why
        time.sleep(seconds)


def read_samples(url: str, stream: ByteStream) -> Iterator[StreamedSample | Unreadable]:
    """The samples of a tar, each as soon as its last member has come; only one is in memory.

    Raises ValueError or tarfile's errors for a tar that is damaged, compressed or cut off.
    """
    file = _Forward(stream)
    parts: _Parts | None = None
    for member in file.members():
        name = sample_member(member)
        if name is None:
            continue
        key, extension = name
        if parts is not None and key != parts.key:
            yield parts.sample(url)
            parts = None
        if bad_key(key):
            yield Unreadable(url, f"{key[:64]}...", BAD_KEY)
            continue
        parts = parts or _Parts(key)
        if extension in _READ:
            parts.add(extension, member, file)
    if parts is not None:
        yield parts.sample(url)
    file.check_end()


class _Parts:
    """The members of one sample, as they come."""

    def __init__(self, key: str) -> None:
        self.key = key
        self._places: dict[str, tuple[int, int]] = {}
        self._data: dict[str, bytes] = {}
        self._wrong: str | None = None

    def add(self, extension: str, member: tarfile.TarInfo, file: _Forward) -> None:
        """Reads a member, unless it is too large or of no use. Raises ValueError if the stream ends in it."""
        if extension in self._places:
            self._wrong = f"it has two members .{extension}"
        self._places[extension] = (member.offset_data, member.size)
        most = MAX_IMAGE_BYTES if extension in IMAGE_EXTENSIONS else MAX_TEXT_BYTES
        if self._wrong is None and member.size <= most:
            file.seek(member.offset_data)
            self._data[extension] = file.read(member.size)
            if len(self._data[extension]) < member.size:
                raise ValueError(f"it ends within sample {self.key!r}")

    def sample(self, url: str) -> StreamedSample | Unreadable:
        """The sample, or what is wrong with it."""
        if self._wrong is None and (lacks := what_lacks(self._places)) is not None:
            self._wrong = f"{lacks} beside its other members"  # as in half of a sample whose members do not stand together
        if self._wrong is None:
            try:
                sample_row(self.key, self._places).check_sizes()
            except ValueError as error:
                self._wrong = str(error)
        if self._wrong is not None:
            return Unreadable(url, self.key, self._wrong)
        (image,) = (data for extension, data in self._data.items() if extension in IMAGE_EXTENSIONS)
        return StreamedSample(url, self.key, image, self._data.get("txt"), self._data.get("json"))


class _Forward:
    """A stream as the file that tarfile wants: it can be read and, forwards, sought."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._at = 0
        self._last = b""

    def members(self) -> Iterator[tarfile.TarInfo]:
        """The headers, one by one. Raises ValueError or tarfile's errors, by the first bytes for what is compressed."""
        members = walk(self)
        try:
            first = next(members, None)
        except tarfile.TarError as error:
            found = compression(self._last)
            if found is None:
                raise
            name, command = found
            raise ValueError(f"it is {name}-compressed; shards are read uncompressed: pipe:... | {command} undoes it on the way") from error
        if first is not None:
            yield first
            yield from members

    def tell(self) -> int:
        return self._at

    def read(self, size: int, /) -> bytes:
        """`size` bytes, or fewer where the stream ends: a stream itself gives what has just come."""
        parts = []
        while size and (part := self._stream.read(min(size, _CHUNK))):
            parts.append(part)
            size -= len(part)
        self._last = b"".join(parts)
        self._at += len(self._last)
        return self._last

    def seek(self, offset: int, /) -> None:
        if offset < self._at:
            raise ValueError(f"its headers lead back from byte {self._at:,} to {offset:,}")
        while self._at < offset and self.read(min(offset - self._at, _CHUNK)):
            pass

    def check_end(self) -> None:
        """Raises ValueError unless the last that was read is the block of zeros that ends a tar, and only zeros follow.

        Python's tarfile takes a damaged header, and the end of the stream, for the end of the archive.
        """
        if len(self._last) < _BLOCK:
            raise ValueError("it ends without an end mark: it has been cut off")
        while self._last:
            if self._last.count(0) < len(self._last):
                raise ValueError(f"before byte {self._at:,} it is damaged, or a second archive has been appended")
            self.read(_CHUNK)
