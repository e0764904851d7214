"""Tars behind URLs: how a list of them is written, and how one is opened as a stream of bytes.

    http://HOST/{000000..000099}.tar    https too; braces stand for several
    pipe:aws s3 cp s3://BUCKET/7.tar -  what a shell command writes to its standard output
    s3://BUCKET/7.tar, gs://, file://   whatever fsspec has a file system for

webdataset holds the pipes. Its own way to HTTP is not taken: `curl -s` with no limit on a server that stalls, thirty retries of its own,
and no other word on what went wrong than an exit code.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from t2i_experts import __version__

MAX_TARS = 2**20

_TIMEOUT = 30  # seconds without a byte from an HTTP server, or for a command to end that has written everything
_GONE = (404, 410)
_RANGE = re.compile(r"\{(-?[0-9]+)\.\.(-?[0-9]+)")
_WATCH = 'read -r line; kill -s KILL -- "-$1"'


class ByteStream(Protocol):
    """Bytes that come once, in order."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""
        ...


def expand_urls(urls: Sequence[str]) -> list[str]:
    """The URL of each tar, in order: braces written out as a shell does, `{000..099}` and `{a,b}`.

    Raises ValueError for braces that do not match, for more than 2^20 tars, for a URL that nothing installed here can open, and for a
    pipe where webdataset's WDS_SECURE forbids them.
    """
    from braceexpand import braceexpand

    tars: list[str] = []
    for url in urls:
        most = math.prod(abs(int(first) - int(last)) + 1 for first, last in _RANGE.findall(url))
        if most + len(tars) > MAX_TARS:  # before they are in memory
            raise ValueError(f"data.train={url!r} stands for {most:,} tars; at most {MAX_TARS:,} are read in all")
        try:
            tars += braceexpand(url, escape=False)
        except ValueError as error:
            raise ValueError(f"data.train={url!r}: {error}") from error
        _check_protocol(url)
    return tars


def _check_protocol(url: str) -> None:
    protocol = _protocol(url)
    if protocol in ("http", "https"):
        return
    if protocol == "pipe":
        from webdataset import utils

        if utils.enforce_security:
            raise ValueError(f"data.train={url!r}: WDS_SECURE in the environment forbids pipes")
        return
    try:
        import fsspec

        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise ValueError(f"data.train={url!r} needs a package that is not installed here: {error}") from error
    except ValueError as error:
        raise ValueError(f"data.train={url!r}: allowed are http://, https://, pipe: and the protocols of fsspec: {error}") from error


def _protocol(url: str) -> str:
    return url.partition(":")[0].lower()


@contextmanager
def open_url(url: str) -> Iterator[ByteStream]:
    """The bytes behind a URL. Raises whatever the way there raises, at the end too: OSError if a command fails after its last byte."""
    match _protocol(url):
        case "http" | "https":
            request = urllib.request.Request(url, headers={"User-Agent": f"t2i-experts/{__version__}"})
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
                yield response
        case "pipe":
            with _open_pipe(url) as pipe:
                yield pipe
        case _:
            import fsspec

            with fsspec.open(url, "rb") as file:
                yield file


@contextmanager
def _open_pipe(url: str) -> Iterator[ByteStream]:
    """What a command writes. It ends with this context, and with this process however that ends, and so does all that it has started."""
    from webdataset.gopen import Pipe

    command = url.partition(":")[2]  # ignore_errors: its own message is a dump of arguments, and it may come before the last bytes
    pipe = Pipe(command, mode="rb", shell=True, stdin=subprocess.DEVNULL, start_new_session=True, ignore_errors=True)
    try:
        with _killed_with_this_process(pipe.proc.pid):
            yield pipe
            try:
                status = pipe.proc.wait(_TIMEOUT)
            except subprocess.TimeoutExpired:
                raise OSError(f"the command has not ended {_TIMEOUT} s after its last byte") from None
        if status:
            raise OSError(f"the command ended with exit code {status}")
    except (ValueError, tarfile.TarError) as error:  # what was read is no tar; that the command failed says more
        with contextlib.suppress(subprocess.TimeoutExpired):
            if status := pipe.proc.wait(1):
                raise OSError(f"the command ended with exit code {status}") from error
        raise
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all of it has ended, or is ending
            os.killpg(pipe.proc.pid, signal.SIGKILL)  # even if the shell has: what it started may outlive it
        pipe.close()


@contextmanager
def _killed_with_this_process(group: int) -> Iterator[None]:
    """Has a process group killed if this process ends within the context, even by SIGKILL.

    A shell waits for the end of its input, of which this process alone holds the other end.
    """
    null = subprocess.DEVNULL
    shell = ["/bin/sh", "-c", _WATCH, "sh", str(group)]
    with subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=null, stderr=null, start_new_session=True) as watch:
        try:
            yield
        finally:
            watch.kill()


def is_gone(error: Exception) -> bool:
    """Whether to ask again is of no use: there is no such file."""
    return isinstance(error, FileNotFoundError) or (isinstance(error, urllib.error.HTTPError) and error.code in _GONE)
